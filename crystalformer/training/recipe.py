"""The numbers of the paper's training, for each of its data sets."""

import math
from dataclasses import dataclass

from ..common import checks

MOST_COUNT = 2**31 - 1  # the most epochs, crystals, images or steps
MOST = 1e6  # the largest learning rate and decay: fp32 holds their products with any weight


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. L1 loss on standardised targets, AdamW, learning rate lr·sqrt(T / (T + t)) in step t.

    Attributes:
        epochs: passes over the training crystals.
        batch_size: crystals a step, of all processes together.
        max_images_per_batch: images a step, of all processes together; a batch ends before it exceeds them, and a
            crystal that has more is a batch of its own. The default leaves the paper's batches whole.
        lr: learning rate of the first step.
        betas: of AdamW.
        weight_decay: of AdamW, on all weights but biases.
        bias_decay: of AdamW, on biases. In the paper's code they are a group without a decay of its own, which
            therefore has AdamW's default.
        decay_steps: T, steps after which the learning rate is lr / sqrt(2).
        gradient_norm: longer gradients are shortened to this.
        average_epochs: the model is the mean of the weights over the steps of this many last epochs, in which the
            learning rate is constant; at most a third of all epochs.
        energy_weight: of the energy in the loss of a training with forces.
        forces_weight: of the forces in it.
        stress_weight: of the stress in it.
    """

    epochs: int = 500
    batch_size: int = 128
    max_images_per_batch: int = 1 << 22
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 1e-5
    bias_decay: float = 1e-2
    decay_steps: int = 4000
    gradient_norm: float = 1.0
    average_epochs: int = 50
    energy_weight: float = 1.0
    forces_weight: float = 1.0
    stress_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_images_per_batch", "decay_steps"):
            checks.check_integer(name, getattr(self, name), 1, MOST_COUNT)
        checks.check_integer("average_epochs", self.average_epochs, 0, MOST_COUNT)
        checks.check_number("gradient_norm", self.gradient_norm)
        checks.check_number("lr", self.lr, high=MOST)
        for name in ("weight_decay", "bias_decay", "energy_weight", "forces_weight", "stress_weight"):
            checks.check_number(name, getattr(self, name), high=MOST, closed=True)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, not {self.betas!r}")
        for beta in self.betas:
            checks.check_number("betas", beta, high=1.0, closed=True)
        object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def averaged(self) -> int:
        """How many epochs the average is over: of a short training the last third."""
        return min(self.average_epochs, math.ceil(self.epochs / 3))


PRESETS = {
    "mp": Recipe(epochs=500, batch_size=128),
    "jarvis": Recipe(epochs=800, batch_size=256),
    "jarvis-mbj": Recipe(epochs=1600, batch_size=256),
}
