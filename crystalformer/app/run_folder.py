"""The folder of a training: it belongs to one training while this runs, and is removed if it holds no result."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..common.storage import UNFINISHED
from ..data.samples import DataError
from ..training.checkpoints import CheckpointError

CONFIG, PROBLEMS, SPLIT, CHECKPOINTS = "config.yaml", "problems.csv", "split.json", "checkpoints"
# What is there before the first checkpoint.
BEGINNING = (CONFIG, PROBLEMS, SPLIT)
# Held by the training that runs; freed by the system when that ends, however it does. The file stays only after a kill.
LOCK = ".lock"


def check_folder(out: Path, resume: bool) -> None:
    """Raises where a training cannot begin, or be resumed, in this folder."""
    if resume:
        if not (out / CONFIG).is_file():
            raise CheckpointError(f"out must be the folder of a training to resume it: no {out / CONFIG}")
    elif out.exists() and not (out.is_dir() and _is_free({path.name for path in out.iterdir()})):
        raise FileExistsError(f"out must be a new or an empty folder, not {out}; --resume goes on with its training")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise DataError(f"out must be a folder that can be written, not {out}: {error.strerror}") from error


@contextlib.contextmanager
def run_folder(out: Path, resume: bool) -> Iterator[None]:
    """Makes the folder and keeps other trainings out of it.

    A new training that fails before its first checkpoint removes what it has written, so that it can be started
    again in the same folder, with other options too.

    Raises:
        FileExistsError, CheckpointError, DataError: as `check_folder`; FileExistsError while another training runs.
    """
    check_folder(out, resume)
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(out):
            check_folder(out, resume)  # again: another may have ended in between
            if not resume:
                _clear(out)
            try:
                yield
            except BaseException:
                if not resume and not any((out / CHECKPOINTS).glob("*.ckpt")):
                    _clear(out)
                    _remove_empty(out / CHECKPOINTS)
                raise
    finally:
        for path in made:
            _remove_empty(path)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    path = out / LOCK
    with path.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The training before may have removed the file after this one opened it.
            mine = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            mine = False
        except (OSError, ImportError) as error:  # of systems without fcntl
            reason = error.strerror if isinstance(error, OSError) else error
            warnings.warn(f"{out} cannot be locked ({reason}): start no second training in it", stacklevel=4)
            mine = True
        if not mine:
            raise FileExistsError(f"out must be a folder in which no training runs, but one does in {out}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_free(names: set[str]) -> bool:
    """Whether a folder with these files is empty, but for those of a training killed when it had just begun."""
    begun = {name for name in names if name in (LOCK, *BEGINNING) or fnmatch(name, UNFINISHED)}
    return not names or (LOCK in names and names == begun)


def _clear(out: Path) -> None:
    for path in (*(out / name for name in BEGINNING), *out.glob(UNFINISHED)):
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
