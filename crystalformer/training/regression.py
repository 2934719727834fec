"""What is learnt: standardised targets, by an L1 loss."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ..common import checks
from ..data import CrystalBatch
from ..data.dataset import Example
from ..model.model import Crystalformer, in_units
from .recipe import Recipe

MEANS = torch.float64  # over an epoch


def standardisation(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (T) of targets (C,T), in fp64; the deviation is 1 where the targets are all equal.

    Raises:
        ValueError: if there are no targets, or if they or their deviation are not finite.
    """
    if targets.dim() != 2 or not len(targets):
        raise ValueError(f"targets must be (C,T) of at least one crystal, not {tuple(targets.shape)}")
    checks.check_finite("targets", targets)
    targets = targets.double()
    # Equal targets may differ from their mean by a rounding.
    equal = (targets == targets[0]).all(0)
    mean = torch.where(equal, targets[0], targets.mean(0))
    deviation = torch.where(equal, 1.0, targets.std(0, correction=0))
    checks.check_finite("the deviation of targets", deviation)
    return mean, deviation


class Mean(Metric):
    """Mean over all processes of the values that are counted. torchmetrics' own mean looks for NaN in every batch."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=MEANS), dist_reduce_fx="sum")

    def update(self, values: Tensor, counted: Tensor) -> None:
        """Takes values (C) where counted (C) is 1, not where it is 0."""
        self.total += values.to(MEANS) @ counted
        self.count += counted.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class Regression(lightning.LightningModule):
    """A Crystalformer learning standardised targets by the paper's recipe (`Recipe`).

    Logs train_loss and val_loss, in standard deviations, and train_mae/NAME and val_mae/NAME of each target, in its own
    units: means over all crystals of an epoch, whatever the batches and the number of processes.

    Targets are standardised in fp64 before a batch goes to its device (`on_before_batch_transfer`); the steps take them
    standardised, in the dtype of the network.

    Args:
        model: predicts the standardised targets while it is trained; `finish` makes it predict in units.
        mean, deviation: (T) fp64, of the training targets.
        names: of the targets, for the log.
        lr, betas, weight_decay, decay_steps, bias_decay: see `Recipe`.

    Raises:
        ValueError: if names, mean and deviation are not as many as the model's targets.
    """

    def __init__(
        self,
        model: Crystalformer,
        mean: Tensor,
        deviation: Tensor,
        names: Sequence[str] = ("target",),
        lr: float = Recipe.lr,
        betas: tuple[float, float] = Recipe.betas,
        weight_decay: float = Recipe.weight_decay,
        decay_steps: int = Recipe.decay_steps,
        bias_decay: float = Recipe.bias_decay,
    ) -> None:
        super().__init__()
        number = model.config.num_targets
        if not len(names) == len(mean) == len(deviation) == number:
            raise ValueError(f"names, mean and deviation must be of {number} targets, as the model, not {len(names)}")
        self.model, self.names = model, tuple(names)
        self.lr, self.betas, self.weight_decay, self.decay_steps = lr, betas, weight_decay, decay_steps
        self.bias_decay = bias_decay
        self.rate_held = False
        # No buffers: on the CPU, where they are needed, and in fp64, whatever the network is cast to.
        self.mean, self.deviation = mean.double().cpu(), deviation.double().cpu()
        self.scales = tuple(self.deviation.tolist())
        # Of the loss, then of the targets' errors.
        self.train_means, self.val_means = (nn.ModuleList(Mean() for _ in range(number + 1)) for _ in range(2))

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(C,T) fp64, in the units of the targets."""
        return in_units(self.model(batch), self.mean.tolist(), self.scales)

    def on_before_batch_transfer(self, batch: Example, dataloader_idx: int) -> Example:
        """The example with its targets standardised."""
        targets = (batch.targets - self.mean) / self.deviation
        return batch._replace(targets=targets.to(batch.weight.dtype))

    def training_step(self, example: Example, index: int) -> Tensor:
        return self._step("train", self.train_means, example)

    def validation_step(self, example: Example, index: int) -> None:
        self._step("val", self.val_means, example)

    def _step(self, stage: str, means: nn.ModuleList, example: Example) -> Tensor:
        crystals, targets, weight = example
        try:
            errors = (self.model(crystals) - targets).abs()
        except checks.NotFinite as error:  # of the attention, which checks what it gets
            raise FloatingPointError(f"the features are not finite in step {self.global_step}: lower lr") from error
        losses = errors.mean(1)
        exact = errors.detach().to(MEANS).T
        columns = [losses.detach(), *(x * scale for x, scale in zip(exact, self.scales, strict=True))]
        names = [f"{stage}_loss", *(f"{stage}_mae/{name}" for name in self.names)]
        counted = (weight > 0).to(MEANS)
        for name, mean, column in zip(names, means, columns, strict=True):
            assert isinstance(mean, Mean)
            mean.update(column, counted)
            self.log(name, mean, on_step=False, on_epoch=True, batch_size=len(crystals))
        return losses @ weight.to(losses.dtype)  # a trained model that learns anew has outputs in fp64

    def configure_optimizers(self) -> Any:
        biases = [x for name, x in self.named_parameters() if name.endswith("bias")]
        weights = [x for name, x in self.named_parameters() if not name.endswith("bias")]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": self.bias_decay}]
        # Fused: one call for all weights, where one for each operation on each of them takes longer than small batches.
        optimizer = torch.optim.AdamW(groups, self.lr, self.betas, weight_decay=self.weight_decay, fused=True)
        steps = self.decay_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: math.sqrt(steps / (steps + t)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self.rate_held:
            scheduler.step()

    def finish(
        self, elements: Iterable[int] = (), largest_cell: int = 0, atom_volumes: Sequence[float] = ()
    ) -> Crystalformer:
        """The model, predicting in the units of the targets from now on, in eval mode.

        Args:
            elements, largest_cell, atom_volumes: of the training crystals, for `config`.
        """
        model, before = self.model, self.model.config
        model.rescale_(self.mean, self.deviation)
        seen: dict[str, Any] = {}
        first = not before.target_mean  # else it was trained before, on crystals that may not be known
        if first or before.elements:
            seen["elements"] = tuple(sorted({*before.elements, *elements}))
        if first or before.largest_cell:
            seen["largest_cell"] = max(before.largest_cell, largest_cell)
        if (first or before.atom_volumes) and (volumes := (*before.atom_volumes, *atom_volumes)):
            seen["atom_volumes"] = (min(volumes), max(volumes))
        model.config = replace(model.config, **seen)
        return model.eval()
