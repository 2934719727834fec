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
from ..data.dataset import Example, check_targets
from ..model.model import Crystalformer, in_units
from .recipe import Recipe

MEANS = torch.float64  # over an epoch


def standardisation(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (T) of targets (C,T), in fp64; the deviation is 1 where the targets are all equal.

    Values that are not known, NaN, do not count.

    Raises:
        ValueError: if a target has no value, or if the targets or their deviation are not finite.
    """
    if targets.dim() != 2 or not len(targets):
        raise ValueError(f"targets must be (C,T) of at least one crystal, not {tuple(targets.shape)}")
    check_targets(targets)
    means, deviations = [], []
    for number, column in enumerate(targets.double().T):
        known = column[~column.isnan()]
        if not len(known):
            raise ValueError(f"targets must hold a known value of each target, but targets[:, {number}] are all NaN")
        equal = bool((known == known[0]).all())  # they may differ from their mean by a rounding
        means.append(known[0] if equal else known.mean())
        deviations.append(torch.ones_like(known[0]) if equal else known.std(correction=0))
    mean, deviation = torch.stack(means), torch.stack(deviations)
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
        """Takes values where counted, of the same shape, is 1, not where it is 0."""
        self.total += (values.to(MEANS) * counted).sum()
        self.count += counted.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


class Regression(lightning.LightningModule):
    """A Crystalformer learning standardised targets by the paper's recipe (`Recipe`).

    Logs train_loss and val_loss, in standard deviations, and train_mae/NAME and val_mae/NAME of each target, in its own
    units: means over all known values of an epoch, whatever the batches and the number of processes; NaN over none.

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
            outputs = self.model(crystals)
        except checks.NotFinite as error:  # of the attention, which checks what it gets
            raise FloatingPointError(f"the features are not finite in step {self.global_step}: lower lr") from error
        known = ~targets.isnan()
        losses = (outputs - targets.masked_fill(~known, 0)).abs() * known
        counted = (known & (weight > 0)[:, None]).to(MEANS)
        exact = losses.detach().to(MEANS)
        columns = [(exact, counted)]
        columns += [(x * scale, y) for x, y, scale in zip(exact.T, counted.T, self.scales, strict=True)]
        names = [f"{stage}_loss", *(f"{stage}_mae/{name}" for name in self.names)]
        for name, mean, column in zip(names, means, columns, strict=True):
            assert isinstance(mean, Mean)
            mean.update(*column)
            self.log(name, mean, on_step=False, on_epoch=True, batch_size=len(crystals))
        return losses.sum(1) @ weight.to(losses.dtype)  # a trained model that learns anew has outputs in fp64

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

    def finish(self, elements: Iterable[int] = ()) -> Crystalformer:
        """The model, predicting in the units of the targets from now on, in eval mode.

        Args:
            elements: atomic numbers in the training crystals, for `config.elements`.
        """
        model, before = self.model, self.model.config
        model.rescale_(self.mean, self.deviation)
        if before.elements or not before.target_mean:  # else it was trained before on elements that are not known
            model.config = replace(model.config, elements=tuple(sorted({*before.elements, *elements})))
        return model.eval()
