"""What is learnt: standardised targets, or classes."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
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
from .losses import LOSSES, MEANS, Auc, Mean
from .recipe import Recipe
from .schedules import SCHEDULES, WHOLE


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


class Regression(lightning.LightningModule):
    """A Crystalformer learning standardised targets, or classes by logistic regression, by a `Recipe`.

    Logs train_loss and val_loss, in standard deviations, and train_mae/NAME and val_mae/NAME of each target, in its own
    units; of classes the area under the ROC curve and the accuracy, train_auc/NAME, train_accuracy/NAME, ... All are of
    all known values of an epoch, whatever the batches and the number of processes, and NaN without any.

    Targets are standardised in fp64 before a batch goes to its device (`on_before_batch_transfer`); the steps take them
    standardised, in the dtype of the network.

    Args:
        model: predicts the standardised targets while it is trained; `finish` makes it predict in units.
        mean, deviation: (T) fp64, of the training targets; of classes, which are 0 or 1, they are 0 and 1.
        names: of the targets, for the log.
        lr, betas, weight_decay, decay_steps, bias_decay, loss, schedule: see `Recipe`.
        measured: what is logged beside the loss, where that is not the errors of the targets alone.

    Raises:
        ValueError: if names, mean and deviation are not as many as the model's targets, or the loss does not fit it.
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
        loss: str = Recipe.loss,
        schedule: str = Recipe.schedule,
        measured: Sequence[str] = (),
    ) -> None:
        super().__init__()
        number = model.config.num_targets
        if not len(names) == len(mean) == len(deviation) == number:
            raise ValueError(f"names, mean and deviation must be of {number} targets, as the model, not {len(names)}")
        self.model, self.names = model, tuple(names)
        self.lr, self.betas, self.weight_decay, self.decay_steps = lr, betas, weight_decay, decay_steps
        self.bias_decay = bias_decay
        self.loss = checks.check_choice("loss", loss, LOSSES)
        if (loss == "bce") != model.config.probabilities:
            raise ValueError(f"loss must be bce where the model's config has probabilities, and only there, not {loss}")
        self.schedule = checks.check_choice("schedule", schedule, SCHEDULES)
        self.steps = 1  # of the whole training, which `fit` counts
        self.rate_held = False
        # No buffers: on the CPU, where they are needed, and in fp64, whatever the network is cast to.
        self.mean, self.deviation = mean.double().cpu(), deviation.double().cpu()
        self.scales = tuple(self.deviation.tolist())
        kinds = ("auc", "accuracy") if loss == "bce" else ("mae",)
        self.measured = tuple(measured or (f"{kind}/{name}" for name in names for kind in kinds))
        self.train_metrics, self.val_metrics = (
            nn.ModuleList([Mean(), *(Auc() if name.startswith("auc/") else Mean() for name in self.measured)])
            for _ in range(2)
        )

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(C,T) fp64, in the units of the targets, or probabilities."""
        return in_units(self.model(batch), self.mean.tolist(), self.scales)

    def on_before_batch_transfer(self, batch: Example, dataloader_idx: int) -> Example:
        """The example with its targets standardised."""
        targets = (batch.targets - self.mean) / self.deviation
        return batch._replace(targets=targets.to(batch.weight.dtype))

    def training_step(self, example: Example, index: int) -> Tensor:
        return self._step("train", self.train_metrics, example)

    def validation_step(self, example: Example, index: int) -> None:
        self._step("val", self.val_metrics, example)

    def _step(self, stage: str, metrics: nn.ModuleList, example: Example) -> Tensor:
        crystals, targets, weight = example
        with self._finite_features():
            outputs = self.model.outputs(crystals)
        known = ~targets.isnan()
        targets = targets.masked_fill(~known, 0).to(outputs.dtype)  # a trained model that learns anew has fp64
        losses = LOSSES[self.loss](outputs, targets, reduction="none") * known
        counted = known & (weight > 0)[:, None]
        self._log(stage, metrics, [(losses.detach(), counted), *self._measured(outputs.detach(), targets, counted)])
        return losses.sum(1) @ weight.to(losses.dtype)

    def _measured(self, outputs: Tensor, targets: Tensor, counted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What the metrics of each target take, in the order of `measured`."""
        columns = zip(outputs.to(MEANS).T, targets.to(MEANS).T, counted.T, self.scales, strict=True)
        for x, y, here, scale in columns:
            if self.loss == "bce":
                yield x.sigmoid(), y.masked_fill(~here, torch.nan)
                yield (x > 0) == (y > 0), here
            else:
                yield (x - y).abs() * scale, here

    @contextlib.contextmanager
    def _finite_features(self) -> Iterator[None]:
        try:
            yield
        except checks.NotFinite as error:  # of the attention, which checks what it gets
            raise FloatingPointError(f"the features are not finite in step {self.global_step}: lower lr") from error

    def _log(self, stage: str, metrics: nn.ModuleList, found: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Logs the loss and what is `measured`, of what their metrics take; the first of that are the crystals'."""
        for name, metric, values in zip(("loss", *self.measured), metrics, found, strict=True):
            assert isinstance(metric, Metric)
            metric.update(*values)
            self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True, batch_size=len(found[0][0]))

    def configure_optimizers(self) -> Any:
        learning = [(name, x) for name, x in self.named_parameters() if x.requires_grad]
        biases = [x for name, x in learning if name.endswith("bias")]
        weights = [x for name, x in learning if not name.endswith("bias")]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": self.bias_decay}]
        groups = [group for group in groups if group["params"]]
        # Fused: one call for all weights, where one for each operation on each of them takes longer than small batches.
        optimizer = torch.optim.AdamW(groups, self.lr, self.betas, weight_decay=self.weight_decay, fused=True)
        schedule = SCHEDULES[self.schedule](optimizer, self.decay_steps, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self.rate_held or self.schedule in WHOLE:
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
            known = sorted({*before.elements, *elements})
            energies = [float(model.element_energies[z - 1]) for z in known] if before.element_energies else ()
            seen |= {"elements": tuple(known), "element_energies": tuple(energies)}
        if first or before.largest_cell:
            seen["largest_cell"] = max(before.largest_cell, largest_cell)
        if (first or before.atom_volumes) and (volumes := (*before.atom_volumes, *atom_volumes)):
            seen["atom_volumes"] = (min(volumes), max(volumes))
        model.config = replace(model.config, **seen)
        return model.eval()
