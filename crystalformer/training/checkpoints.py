"""The state of a training on disk: whole at any moment, so that a stop loses at most the epoch that is under way."""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from ..common import storage
from .schedules import WHOLE

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class CheckpointError(ValueError):
    """A training cannot be resumed. The message says why in one line."""


class AtomicIO(TorchCheckpointIO):
    """Lightning's files, written atomically and with a checksum, the one before kept."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # In memory first: torch.save into a file hides a full disk behind errors of its own.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_sealed(path, content.getvalue(), path.with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        content = io.BytesIO(storage.read_sealed(path))
        return torch.load(content, map_location=map_location, weights_only=weights_only)


class Checkpoints(Checkpoint):
    """Saves the training after every epoch.

    Args:
        folder: for last.ckpt and previous.ckpt.
        identity: what tells this training from others, names to JSON values; `latest` refuses another one, but not one
            of more "epochs".
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.dumps(identity)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / LAST)

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity}


def latest(folder: Path, identity: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the last whole checkpoint in a folder, or None if there is no checkpoint.

    Warns if the last one cannot be read and the one before it takes its place.

    Raises:
        CheckpointError: if none can be read, or it is of another training.
    """
    errors = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            content = AtomicIO().load_checkpoint(path)
            stored = json.loads(content["callbacks"]["Checkpoints"]["identity"])
            if "rows" not in content["callbacks"]["History"] or "state_dict" not in content:
                raise ValueError("it lacks what a resumed training begins with")
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever a torn or foreign file brings torch to raise
            errors.append(f"{path} is no whole checkpoint of this program ({type(error).__name__})")
            continue
        _check_identity(path, stored, json.loads(json.dumps(identity)))
        if errors:
            warnings.warn(f"{errors[0]}: going on from {path}, one epoch earlier", stacklevel=2)
        return path, content
    if errors:
        raise CheckpointError("; ".join(errors))
    return None


def _check_identity(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if differing := sorted(stored.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"the training in {path.parent} must have been begun by this version to be resumed, but it does not know "
            f"the same settings ({', '.join(differing)}): start anew, or go on with the version that began it"
        )
    for name in sorted(stored):
        if name == "epochs" and wanted[name] > stored[name]:
            _check_longer(path, stored)
        elif stored[name] != wanted[name]:
            raise CheckpointError(
                f"{name} must be {stored[name]!r}, as when the training in {path.parent} began, not "
                f"{wanted[name]!r}: a resumed training {'has no fewer' if name == 'epochs' else 'cannot change it'}"
            )


def _check_longer(path: Path, stored: Mapping[str, Any]) -> None:
    """Refuses more epochs for a training whose learning rates depend on their number."""
    if stored.get("schedule") in WHOLE:
        raise CheckpointError(
            f"epochs must be {stored['epochs']}, as when the training in {path.parent} began: its learning rate "
            f"follows {stored['schedule']} to its end. Start another training from its model, by --from"
        )
