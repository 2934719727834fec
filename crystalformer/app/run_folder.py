"""The folder of a training: it belongs to one training while this runs, and is removed if it holds no result."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..common.folder_lock import LOCK, folder_lock
from ..common.storage import UNFINISHED
from ..data.samples import DataError
from ..training.checkpoints import CheckpointError

CONFIG, PROBLEMS, SPLIT, HISTORY = "config.yaml", "problems.csv", "split.json", "history.csv"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
# What is there before the first checkpoint: files, and folders with files of these names.
BEGINNING = (CONFIG, PROBLEMS, SPLIT, HISTORY)
FOLDERS = {CHECKPOINTS: (LOCK, UNFINISHED), TENSORBOARD: ("events.out.tfevents.*", "hparams.yaml")}


def check_folder(out: Path, resume: bool) -> None:
    """Raises where a training cannot begin, or be resumed, in this folder."""
    if resume:
        if not (out / CONFIG).is_file():
            raise CheckpointError(f"out must be the folder of a training to resume it: no {out / CONFIG}")
    elif out.exists() and not (out.is_dir() and _is_free(out)):
        raise FileExistsError(f"out must be a new or an empty folder, not {out}; --resume goes on with its training")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise DataError(f"out must be a folder that can be written, not {out}: {error.strerror}") from error


@contextlib.contextmanager
def run_folder(out: Path, resume: bool, begun: Callable[[Path], bool] | None = None) -> Iterator[None]:
    """Makes the folder and keeps other trainings out of it.

    A new training that fails before its first checkpoint removes what it has written, so that it can be started
    again in the same folder, with other options too.

    Args:
        begun: whether there is something that cannot be removed; a checkpoint if None.

    Raises:
        FileExistsError, CheckpointError, DataError: as `check_folder`; FileExistsError while another training runs.
    """
    check_folder(out, resume)
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(out, "out"):
            check_folder(out, resume)  # again: another may have ended in between
            if not resume:
                _clear(out)
            try:
                yield
            except BaseException:
                if not resume and not (begun or has_checkpoint)(out):
                    _clear(out)
                raise
    finally:
        for path in made:
            _remove_empty(path)


def has_checkpoint(out: Path) -> bool:
    return any((out / CHECKPOINTS).glob("*.ckpt"))


def _is_free(out: Path) -> bool:
    """Whether a folder is empty, but for the files of a training killed before its first checkpoint was whole."""
    names = {path.name for path in out.iterdir()}
    begun = {name for name in names if name in (LOCK, *BEGINNING) or fnmatch(name, UNFINISHED)}
    for name, patterns in FOLDERS.items():
        inside = [x.name for x in (out / name).iterdir()] if (out / name).is_dir() else [name]
        if name in names and all(any(fnmatch(x, pattern) for pattern in patterns) for x in inside):
            begun.add(name)
    return not names or (LOCK in names and names == begun)


def _clear(out: Path) -> None:
    """Removes what `_is_free` allows, but for the lock, which this training holds."""
    files = [path for name, patterns in FOLDERS.items() for x in patterns for path in (out / name).glob(x)]
    for path in (*(out / name for name in BEGINNING), *out.glob(UNFINISHED), *files):
        path.unlink(missing_ok=True)
    for name in FOLDERS:
        _remove_empty(out / name)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
