"""Training with the paper's recipe, on lightning. Needs the extra [train].

train = CrystalDataset(structures, targets, model)                 # targets (C,T)
loader = train.loader(batch_size=128, seed=0)
model.calibrate(next(iter(loader))[0])                             # once, before training
task = Regression(model, *standardisation(train.targets))
history = fit(task, loader, validation.loader(128), epochs=500)    # then the model predicts in the targets' units
"""

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError
from tqdm import tqdm

from .data import CrystalBatch
from .model import Crystalformer

Example = tuple[CrystalBatch, Tensor]

GRADIENT_NORM = 1.0
DECAY_STEPS = 4000


class CrystalDataset(Dataset[Example]):
    """Crystals with their targets; the images and wave vectors of each crystal are built once, here.

    Args:
        structures: pymatgen Structures or ase Atoms.
        targets: (C,T).
        model: the model whose certified image lists are wanted.

    Raises:
        ValueError: if structures and targets are not equally many.
    """

    def __init__(self, structures: Sequence[Any], targets: Tensor, model: Crystalformer) -> None:
        if targets.dim() != 2 or len(targets) != len(structures):
            raise ValueError(f"targets must be ({len(structures)}, T), as structures, not {tuple(targets.shape)}")
        self.targets = targets.to(torch.get_default_dtype())
        self.crystals = []
        for structure in structures:
            self.crystals.append(model.prepare(CrystalBatch.from_structures([structure])))

    def __len__(self) -> int:
        return len(self.crystals)

    def __getitem__(self, index: int) -> Example:
        return self.crystals[index], self.targets[index]

    def loader(self, batch_size: int, seed: int | None = None) -> DataLoader[Example]:
        """Batches of crystals in order, or shuffled anew each epoch if a seed is given."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle=seed is not None, collate_fn=collate, generator=generator)


def collate(examples: Sequence[Example]) -> Example:
    """One batch, with its images, and its targets (C,T)."""
    crystals, targets = zip(*examples, strict=True)
    return CrystalBatch.cat(crystals), torch.stack(targets)


def standardisation(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (T) of targets (C,T); the deviation is 1 where the targets are all equal."""
    deviation = targets.std(0, correction=0)
    return targets.mean(0), torch.where(deviation > 0, deviation, 1.0)


class Regression(lightning.LightningModule):
    """A Crystalformer learning standardised targets by the paper's recipe.

    L1 loss; AdamW, with weight decay not on biases; learning rate lr·sqrt(4000 / (4000 + t)) in step t. Logs train_loss
    and val_loss, in standard deviations, and train_mae/NAME and val_mae/NAME of each target, in its own units.

    Args:
        model: predicts the standardised targets while it is trained; `finish` makes it predict in units.
        mean, deviation: (T), of the training targets.
        names: of the targets, for the log.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        model: Crystalformer,
        mean: Tensor,
        deviation: Tensor,
        names: Sequence[str] = ("target",),
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__()
        number = model.config.num_targets
        if not len(names) == len(mean) == len(deviation) == number:
            raise ValueError(f"names, mean and deviation must be of {number} targets, as the model, not {len(names)}")
        self.model, self.names = model, tuple(names)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.train_mae, self.val_mae = (nn.ModuleList(MeanAbsoluteError() for _ in names) for _ in range(2))

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(C,T), in the units of the targets."""
        return self._in_units(self.model(batch))

    def _in_units(self, outputs: Tensor) -> Tensor:
        return outputs * self.deviation + self.mean

    def training_step(self, example: Example, index: int) -> Tensor:
        return self._step("train", self.train_mae, example)

    def validation_step(self, example: Example, index: int) -> None:
        self._step("val", self.val_mae, example)

    def _step(self, stage: str, metrics: nn.ModuleList, example: Example) -> Tensor:
        batch, targets = example
        outputs = self.model(batch)
        loss = F.l1_loss(outputs, (targets - self.mean) / self.deviation)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        predictions = self._in_units(outputs.detach())
        for name, metric, column, target in zip(self.names, metrics, predictions.T, targets.T, strict=True):
            assert isinstance(metric, MeanAbsoluteError)
            metric.update(column, target)
            self.log(f"{stage}_mae/{name}", metric, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        biases = [x for name, x in self.named_parameters() if name.endswith("bias")]
        weights = [x for name, x in self.named_parameters() if not name.endswith("bias")]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: math.sqrt(DECAY_STEPS / (DECAY_STEPS + t)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def finish(self) -> Crystalformer:
        """The model, predicting in the units of the targets from now on, in eval mode."""
        return self.model.rescale_(self.mean, self.deviation).eval()


class History(Callback):
    """Keeps what is logged: `rows`, one dictionary an epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **metrics})


class AverageLastEpochs(WeightAveraging):
    """Validates and ends with the mean of the weights over the steps of the last epochs, once these have begun.

    Args:
        epochs: how many of them.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__(use_buffers=False)
        self.epochs = epochs
        self.begun = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.begun = trainer.current_epoch >= (trainer.max_epochs or 0) - self.epochs

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


class Progress(Callback):
    """One bar for the whole training, with the last validation error and the time left; lines where it is no terminal.

    Args:
        name: of the target whose error is shown.
        unit: of it.
    """

    def __init__(self, name: str, unit: str = "") -> None:
        self.name, self.unit = name, unit

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar = tqdm(
            total=int(trainer.estimated_stepping_batches),
            unit="step",
            bar_format="{desc} {percentage:3.0f} % |{bar:30}| {n}/{total} steps, {remaining} left{postfix}",
            desc="  training",
            disable=not sys.stderr.isatty(),
        )

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.bar.update()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        error = f"validation MAE {float(trainer.callback_metrics[f'val_mae/{self.name}']):.3g} {self.unit}"
        self.bar.set_postfix_str(error)
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if self.bar.disable and epoch % max(1, epochs // 10) == 0:
            print(f"  epoch {epoch:3d} of {epochs}   {error}", flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar.close()


def fit(
    task: Regression,
    train: DataLoader[Example],
    val: DataLoader[Example],
    epochs: int,
    callbacks: Sequence[Callback] = (),
    max_seconds: float | None = None,
) -> list[dict[str, float]]:
    """Trains, validating after each epoch, and folds the units into the model (`Regression.finish`).

    Returns:
        One row an epoch: epoch, step and what the task logs.
    """
    history = History()
    with quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            max_time=None if max_seconds is None else timedelta(seconds=max_seconds),
            gradient_clip_val=GRADIENT_NORM,
            deterministic=True,
            callbacks=[history, *callbacks],
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, train, val)
    task.finish()
    return history.rows


@torch.no_grad()
def predict(model: Crystalformer, loader: DataLoader[Example]) -> Tensor:
    """(C,T) the model's predictions, in the order of the loader."""
    model.eval()
    return torch.cat([model(batch) for batch, _ in loader])


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without lightning's banners and its advice on loader processes: batches are only joined, which takes no time."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning's own use of torch's trees, of no concern to us.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
