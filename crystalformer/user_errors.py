"""Errors that are the user's to mend: one line on stderr, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROG = "crystalformer"


class Stop(Exception):
    """The end of the program, with one line for stderr and an exit code."""

    def __init__(self, message: object, code: int = 2) -> None:
        super().__init__(" ".join(str(message).split()))
        self.code = code


@contextmanager
def user_errors() -> Iterator[None]:
    """For what depends on arguments and files alone: an error is theirs, and its line is enough."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Stop(f"{error.name} is missing: pip install 'crystalformer[data,train]'; see {PROG} doctor") from error
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise Stop(error) from error


@contextmanager
def training_errors(out: Path) -> Iterator[None]:
    """In a training, only what is known to be no fault of this program."""
    import torch
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from .data.samples import DataError
    from .run_folder import CONFIG
    from .training.checkpoints import CheckpointError

    def again() -> str:
        if not (out / CONFIG).is_file():
            return "nothing was kept: no epoch was done"
        return f"go on with: {PROG} train --out {out} --resume"

    try:
        yield
    except (DataError, CheckpointError, MisconfigurationException, FileExistsError) as error:
        raise Stop(error) from error
    except FloatingPointError as error:
        raise Stop(error, 1) from error
    except torch.OutOfMemoryError as error:
        raise Stop(f"out of GPU memory: train anew with a smaller --max_images_per_batch ({error})", 1) from error
    except OSError as error:
        raise Stop(f"{error}; {again()}", 1) from error
    except SystemExit as error:  # how lightning ends for SIGTERM, and with code 1 for Ctrl-C
        raise Stop(f"stopped; {again()}", 130 if error.code == 1 else 143) from error
