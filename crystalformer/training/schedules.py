"""The learning rate over the steps of a training, by the name of its schedule."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR


def inverse_sqrt(optimizer: Optimizer, decay_steps: int, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda t: math.sqrt(decay_steps / (decay_steps + t)))


def cosine(optimizer: Optimizer, decay_steps: int, steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, steps)


def one_cycle(optimizer: Optimizer, decay_steps: int, steps: int) -> LRScheduler:
    largest = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, largest, steps, cycle_momentum=False)  # betas are those of the recipe


def constant(optimizer: Optimizer, decay_steps: int, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda t: 1.0)


# Each takes the optimizer, `Recipe.decay_steps` and the number of steps of the whole training.
SCHEDULES: dict[str, Callable[[Optimizer, int, int], LRScheduler]] = {
    "inverse_sqrt": inverse_sqrt,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "constant": constant,
}
# Those that end with the training, whose length they have to know when it begins.
WHOLE = ("cosine", "one_cycle")
