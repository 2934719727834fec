"""What happens beside the steps of a training: the weights it ends with, the record, the progress bar."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ..common import storage
from ..common.words import short
from ..data.dataset import BoundedBatches
from .recipe import Recipe
from .regression import Regression


class History(Callback):
    """Keeps what is logged and the seconds it took: `rows`, one dictionary an epoch. They are part of checkpoints.

    Args:
        path: a CSV file of them, whole behind every epoch.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def write(self) -> None:
        if self.path is not None and getattr(rank_zero_only, "rank", 0) == 0:
            columns = list(self.rows[0])
            rows = ([row[name] for name in columns] for row in self.rows)
            storage.write(self.path, storage.csv_text([columns, *rows]))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **metrics}
        self.rows.append(row | {"seconds": time.perf_counter() - self.start})
        self.write()
        for name, text in (("train_loss", "training"), ("val_loss", "validation")):
            if not np.isfinite(metrics[name]):
                raise FloatingPointError(f"the {text} loss of epoch {row['epoch']} is not finite: lower lr")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class SeedEpochs(Callback):
    """Seeds what is random in a step, dropout, by seed, epoch and process: a resumed training goes on as it would have.

    Args:
        seed: of the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        words = np.random.SeedSequence((self.seed, trainer.current_epoch, trainer.global_rank)).generate_state(1)
        torch.manual_seed(int(words[0]))


class AverageLastEpochs(WeightAveraging):
    """Validates and ends with the mean of the weights over the steps of the last epochs, once these have begun.

    The learning rate is held in these epochs, as in the paper's code. A training that is made longer begins a new mean
    in its own last epochs, or, where it is among these already, in the first one that it adds.

    Args:
        epochs: how many of them.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__(use_buffers=False)
        self.epochs = epochs
        self.begun = False
        self.first = -1  # epoch of the mean

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Regression)
        assert self._average_model is not None
        start = (trainer.max_epochs or 0) - self.epochs
        self.begun = pl_module.rate_held = trainer.current_epoch >= start
        if self.begun and self.first < start:
            self.first = trainer.current_epoch
            self._average_model.n_averaged.zero_()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.first = state_dict["first"]

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return self.begun and step_idx is not None

    # Lightning's own callback would also put its copy of the first weights in place before there is any mean.
    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.begun:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.begun:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.begun:
            super().on_train_end(trainer, pl_module)


class BestEpoch(Callback):
    """Ends with the weights of the epoch whose validation loss is smallest, the first of equal ones."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if loss < self.loss:
            self.loss = loss
            self.weights = {name: x.detach().clone() for name, x in pl_module.state_dict().items()}

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.weights:  # else no epoch was done
            pl_module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss = state_dict["loss"]

    # As lightning's averages: a checkpoint's state_dict is what the training would end with.
    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], self.weights

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.weights = {name: x.to(pl_module.device) for name, x in checkpoint["state_dict"].items()}
        pl_module.load_state_dict(checkpoint["current_model_state"])


def weight_callbacks(recipe: Recipe) -> list[Callback]:
    """What a recipe says of the weights that a training ends with, and of its end."""
    found: list[Callback] = []
    if recipe.averaged:
        found.append(AverageLastEpochs(recipe.averaged))
    if recipe.ema:
        found.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)))
    if recipe.best_epoch:
        found.append(BestEpoch())
    if recipe.patience:
        found.append(EarlyStopping("val_loss", patience=recipe.patience))
    return found


class Progress(Callback):
    """One bar for the whole training, with the last validation MAE or AUC, the time of an epoch and the time left;
    without a terminal, lines.

    Args:
        name: of the target whose score is shown.
        unit: of it.
    """

    def __init__(self, name: str, unit: str = "") -> None:
        self.name, self.unit = name, unit

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_epochs,
            initial=trainer.current_epoch,
            bar_format="{desc} {percentage:3.0f} % |{bar:30}| epoch {n:.1f} of {total}, {remaining} left{postfix}",
            desc="  training",
            disable=not sys.stderr.isatty() or trainer.global_rank > 0,
        )

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        sampler = trainer.train_dataloader.sampler  # type: ignore[union-attr]
        assert isinstance(sampler, BoundedBatches)
        self.bar.update(1 / len(sampler.batches))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Regression)
        word, unit = ("AUC", "") if pl_module.loss == "bce" else ("MAE", self.unit)
        value = float(trainer.callback_metrics[f"val_{word.lower()}/{self.name}"])
        score = f"validation {word} of {self.name} {short(value)} {unit}".rstrip()
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = time.perf_counter() - self.start
        score += f", {short(seconds)} s an epoch"
        self.bar.set_postfix_str(score)
        if self.bar.disable and trainer.global_rank == 0 and (epoch % max(1, epochs // 10) == 0 or epoch == epochs):
            left = tqdm.format_interval((epochs - epoch) * seconds)
            print(f"  epoch {epoch:3d} of {epochs}   {score}, {left} left", flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar.close()
