"""A folder that one process at a time works in."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Held by the training that runs; freed by the system when that ends, however it does. The file stays only after a kill.
LOCK = ".lock"


@contextlib.contextmanager
def folder_lock(folder: Path, name: str) -> Iterator[None]:
    """Keeps other trainings out of a folder that is there.

    Args:
        name: of the argument that the folder came as, for errors.

    Raises:
        FileExistsError: while another training runs in it.
    """
    path = folder / LOCK
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
            warnings.warn(f"{folder} cannot be locked ({reason}): start no second training in it", stacklevel=4)
            mine = True
        if not mine:
            raise FileExistsError(f"{name} must be a folder in which no training runs, but one does in {folder}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
