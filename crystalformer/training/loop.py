"""Training and predicting, by lightning's Trainer."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from ..common import checks
from ..common.folder_lock import folder_lock
from ..common.words import one_line
from ..data.dataset import BoundedBatches, CrystalDataset, Example
from ..model.model import Crystalformer
from .callbacks import History, SeedEpochs
from .checkpoints import AtomicIO, CheckpointError, Checkpoints, latest
from .machine import check_machine
from .recipe import MOST_COUNT, Recipe
from .regression import Regression
from .schedules import WHOLE


def fit(
    task: Regression,
    train: DataLoader[Example],
    val: DataLoader[Example],
    epochs: int,
    callbacks: Sequence[Callback] = (),
    max_seconds: float | None = None,
    *,
    seed: int = 0,
    gradient_norm: float = Recipe.gradient_norm,
    checkpoints: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    accelerator: str | torch.device = "auto",
    devices: int = 1,
    nodes: int = 1,
    history_file: Path | None = None,
    tensorboard: Path | None = None,
) -> list[dict[str, float]]:
    """Trains, validating after each epoch, and gives the model units and what it has seen (`Regression.finish`).

    With several devices or nodes, or under torchrun, every process computes its share of each batch: the training is
    the same as on one process, up to rounding.

    Args:
        train, val: loaders of `CrystalDataset`.
        epochs: of the whole training.
        max_seconds: stops after this time, between epochs.
        seed: of dropout. The order of the crystals has its seed in the loader.
        gradient_norm: longer gradients are shortened to this.
        checkpoints: a folder to save the training in after every epoch. If it holds one already, that is gone on
            with; on the CPU it ends with the same bits as if it had never been stopped.
        identity: what tells this training from others, for its checkpoints.
        accelerator: "auto", "cpu" or "gpu"; or the device that `check_machine` has found for these devices and nodes.
        devices, nodes: as lightning's Trainer takes them; under torchrun, its processes.
        history_file: CSV of what is returned, written behind every epoch.
        tensorboard: a folder for event files. Needs the package tensorboard.

    Returns:
        One row an epoch: epoch, step, what the task logs, and the seconds that it took.

    Raises:
        CheckpointError: for checkpoints of another training, or that cannot be read.
        FileExistsError: while another training runs in the folder of the checkpoints.
        FloatingPointError: if the loss is not finite.
        ValueError: for accelerators, devices or nodes that are not there.
    """
    checks.check_integer("epochs", epochs, 1, MOST_COUNT)
    device = accelerator if isinstance(accelerator, torch.device) else check_machine(accelerator, devices, nodes)
    with _only_one(checkpoints):
        assert isinstance(train.dataset, CrystalDataset)
        seen = train.dataset.seen
        history = History(history_file)
        path = None
        more: list[Callback] = [SeedEpochs(seed)]
        if checkpoints is not None:
            more.append(Checkpoints(checkpoints, identity or {}))
            if found := latest(checkpoints, identity or {}):
                path, content = found
                history.load_state_dict(content["callbacks"]["History"])
                history.write()
                try:
                    task.load_state_dict(content["state_dict"])
                except RuntimeError as error:
                    raise CheckpointError(f"{path} must hold the weights of this model: {one_line(error)}") from error
                if len(history.rows) >= epochs or _out_of_patience(callbacks, content):  # it is complete
                    task.finish(**seen)
                    return history.rows
        # Lightning starts to draw the first epoch's batches before it says which epoch it is.
        assert isinstance(train.sampler, BoundedBatches)
        if task.schedule in WHOLE:
            task.steps = train.sampler.steps(epochs)
        train.sampler.set_epoch(len(history.rows))
        if TorchElasticEnvironment.detect():
            devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            nodes = int(os.environ.get("WORLD_SIZE", devices)) // devices
        with quiet_lightning():
            trainer = lightning.Trainer(
                accelerator=device.type,
                devices=devices,
                num_nodes=nodes,
                strategy="ddp" if devices * nodes > 1 else "auto",
                plugins=[AtomicIO()],
                use_distributed_sampler=False,  # the loaders share the batches out
                max_epochs=epochs,
                max_time=None if max_seconds is None else timedelta(seconds=max_seconds),
                gradient_clip_val=gradient_norm,
                deterministic=True,
                callbacks=[history, *callbacks, *more],
                num_sanity_val_steps=0,
                inference_mode=False,  # forces are derivatives in a validation, too
                logger=False if tensorboard is None else _logger(tensorboard),
                log_every_n_steps=1,
                enable_checkpointing=checkpoints is not None,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(task, train, val, ckpt_path=path, weights_only=True)
        task.finish(**seen)
        return history.rows


@contextlib.contextmanager
def _only_one(folder: Path | None) -> Iterator[None]:
    """Keeps other trainings out of a folder of checkpoints, and takes away what it has made if none was written."""
    if folder is None or getattr(rank_zero_only, "rank", 0) != 0:  # the first process keeps it for all of them
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(folder, "checkpoints"):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _logger(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder.parent, folder.name, version="", default_hp_metric=False)


def _out_of_patience(callbacks: Sequence[Callback], content: Mapping[str, Any]) -> bool:
    """Whether the training of a checkpoint was stopped early, by what lightning kept of it."""
    kept = [content["callbacks"].get(x.state_key) for x in callbacks if isinstance(x, EarlyStopping)]
    return any(x is not None and x["wait_count"] >= x["patience"] for x in kept)


@torch.no_grad()
def predict(model: Crystalformer, loader: DataLoader[Example]) -> Tensor:
    """(C,T) fp64, the model's predictions for all batches of a loader, in their order, on the CPU.

    Every process computes all of them, also where a training has several.
    """
    model.eval()
    device, sampler = next(model.parameters()).device, loader.sampler
    assert isinstance(sampler, BoundedBatches)
    examples = (loader.dataset[sampler.shard(batch, 0, 1)] for batch in sampler.batches)
    return torch.cat([model(example.crystals.to(device)).cpu().double() for example in examples])


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
