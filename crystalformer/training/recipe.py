"""The numbers of a training: the paper's, for each of its data sets, and those for small data."""

import math
from dataclasses import dataclass
from typing import Any

from ..common import checks
from .losses import LOSSES
from .schedules import SCHEDULES

MOST_COUNT = 2**31 - 1  # the most epochs, crystals, images or steps
EMBEDDINGS = ("random", "properties")
MOST = 1e6  # the largest learning rate and decay: fp32 holds their products with any weight


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, with AdamW. The default is the paper's.

    Attributes:
        epochs: passes over the training crystals.
        batch_size: crystals a step, of all processes together.
        max_images_per_batch: images a step, of all processes together; a batch ends before it exceeds them, and a
            crystal that has more is a batch of its own. The default leaves the paper's batches whole.
        lr: learning rate of the first step; of one_cycle the largest.
        betas: of AdamW.
        weight_decay: of AdamW, on all weights but biases.
        bias_decay: of AdamW, on biases. In the paper's code they are a group without a decay of its own, which
            therefore has AdamW's default.
        decay_steps: T of inverse_sqrt, steps after which the learning rate is lr / sqrt(2).
        gradient_norm: longer gradients are shortened to this.
        average_epochs: the model is the mean of the weights over the steps of this many last epochs, at most a third of
            all epochs, in which the learning rate of inverse_sqrt is constant.
        loss: "l1", "mse" or "huber" (quadratic up to one standard deviation) of the standardised targets; or "bce" for
            classes, which are 0 or 1, true or false, yes or no, and of which the probability is learnt.
        schedule: of the learning rate. "inverse_sqrt", lr·sqrt(T / (T + t)) in step t; "constant"; "cosine", down to 0
            behind the last step; "one_cycle", from lr / 25 up to lr over 30 % of the steps, then down to lr / 250,000.
            The last two run over all steps, also those of the average, in which the first one holds its rate.
        ema: the model is the exponential moving average of the weights over all steps, which keeps this part of itself
            in each, instead of the mean; 0 for none.
        best_epoch: the model has the weights of the epoch with the smallest validation loss, instead of the mean.
        patience: stop behind this many epochs without a smaller validation loss; 0 for never.
        embedding: first weights of the elements' features: "random", as in the paper, or "properties", a random linear
            map of the properties of the elements (`embed_properties`), so that similar ones begin alike. A training
            that starts from a trained model keeps that one's.
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
    loss: str = "l1"
    schedule: str = "inverse_sqrt"
    ema: float = 0.0
    best_epoch: bool = False
    patience: int = 0
    embedding: str = "random"
    energy_weight: float = 1.0
    forces_weight: float = 1.0
    stress_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_images_per_batch", "decay_steps"):
            checks.check_integer(name, getattr(self, name), 1, MOST_COUNT)
        checks.check_integer("average_epochs", self.average_epochs, 0, MOST_COUNT)
        checks.check_choice("loss", self.loss, LOSSES)
        checks.check_choice("schedule", self.schedule, SCHEDULES)
        checks.check_choice("embedding", self.embedding, EMBEDDINGS)
        checks.check_number("gradient_norm", self.gradient_norm)
        checks.check_number("lr", self.lr, high=MOST)
        for name in ("weight_decay", "bias_decay", "energy_weight", "forces_weight", "stress_weight"):
            checks.check_number(name, getattr(self, name), high=MOST, closed=True)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be two numbers, not {self.betas!r}")
        for beta in self.betas:
            checks.check_number("betas", beta, high=1.0, closed=True)
        object.__setattr__(self, "betas", tuple(self.betas))
        checks.check_number("ema", self.ema, high=1.0, closed=True)
        checks.check_integer("patience", self.patience, 0, MOST_COUNT)
        if self.ema and self.best_epoch:
            raise ValueError(f"ema must be 0 with best_epoch, not {self.ema}: a model has the weights of one of them")
        if self.patience and self.averaged:
            raise ValueError(
                f"patience must be 0, not {self.patience}, where the model is the mean over the last epochs, before "
                "which it would stop: give best_epoch, ema or average_epochs=0"
            )

    @property
    def averaged(self) -> int:
        """How many epochs the mean of the weights is over: of a short training the last third."""
        return 0 if self.ema or self.best_epoch else min(self.average_epochs, math.ceil(self.epochs / 3))


PRESETS = {
    "mp": Recipe(epochs=500, batch_size=128),
    "jarvis": Recipe(epochs=800, batch_size=256),
    "jarvis-mbj": Recipe(epochs=1600, batch_size=256),
    # Not the paper's: found by validation within a thousand crystals, docs/benchmarks.md says how.
    "small": Recipe(epochs=200, batch_size=32, lr=1e-3, embedding="properties"),
}
# Of the model, where a preset has it otherwise than `CrystalformerConfig`.
PRESET_MODELS: dict[str, dict[str, Any]] = {"small": {"r0": (2.0,)}}
