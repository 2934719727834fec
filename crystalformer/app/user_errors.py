"""Errors that the user can correct: one line on stderr, and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.process import INTERRUPTED, PROG, TERMINATED
from ..common.words import one_line


class Stop(Exception):
    """The end of the program, with one line for stderr and an exit code."""

    def __init__(self, message: object, code: int = 2) -> None:
        super().__init__(one_line(message))
        self.code = code


def say(message: object) -> None:
    """A line on stderr."""
    print(f"{PROG}: {one_line(message)}", file=sys.stderr)


@contextmanager
def user_errors() -> Iterator[None]:
    """For work that depends on arguments and files alone: any error is one of theirs, and one line is enough."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name if error.name in ("torch", "numpy") else "'crystalformer[data,train]'"
        raise Stop(f"{error.name} is missing: pip install {package}; see {PROG} doctor") from error
    except BrokenPipeError:
        raise
    except FloatingPointError as error:
        raise Stop(error, 1) from error
    except (ValueError, TypeError, OSError) as error:
        raise Stop(error) from error
    except RecursionError as error:
        raise Stop("an argument or a file is nested too deeply") from error
    except (MemoryError, RuntimeError) as error:
        _stop_out_of_memory(error)
        raise


def _stop_out_of_memory(error: Exception) -> None:
    """Raises Stop if that is what is wrong; torch has an error of its own for a GPU's memory only."""
    words = ("out of memory", "allocate memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or any(x in str(error) for x in words):
        raise Stop(f"out of memory: {error}" if str(error) else "out of memory", 1) from error


@contextmanager
def training_errors(out: Path, command: str = "train") -> Iterator[None]:
    """In a training, only what is known to be no fault of this program."""
    import torch
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ..data.samples import DataError
    from ..training.checkpoints import CheckpointError

    try:
        yield
    except (DataError, CheckpointError, MisconfigurationException, FileExistsError, ModuleNotFoundError) as error:
        raise Stop(error) from error
    except FloatingPointError as error:
        raise Stop(error, 1) from error
    except torch.OutOfMemoryError as error:
        raise Stop(f"out of GPU memory: train anew with a smaller --max_images_per_batch ({error})", 1) from error
    except OSError as error:
        raise Stop(f"{error}{_again(out, command)}", 1) from error
    except (MemoryError, RuntimeError) as error:
        _stop_out_of_memory(error)
        raise
    except KeyboardInterrupt as error:
        raise Stop(f"stopped{_again(out, command)}", INTERRUPTED) from error
    except SystemExit as error:  # how lightning ends for SIGTERM, and with code 1 for Ctrl-C
        raise Stop(f"stopped{_again(out, command)}", INTERRUPTED if error.code == 1 else TERMINATED) from error


def _again(out: Path, command: str) -> str:
    """How to go on with the training in this folder, if there is something to go on with."""
    from .run_folder import CONFIG

    try:
        begun = (out / CONFIG).is_file()
    except OSError:
        begun = False
    return f"; go on with: {PROG} {command} --out {out} --resume" if begun else "; nothing was kept: no epoch was done"
