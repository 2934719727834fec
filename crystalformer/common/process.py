"""The program `crystalformer` as a process: Ctrl-C, and streams that are closed or full."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

PROG = "crystalformer"
INTERRUPTED = 130


def leave(*_: Any) -> None:
    """Ends the process at once, for a Ctrl-C after which nothing has to be cleaned up."""
    with contextlib.suppress(OSError):
        os.write(2, f"{PROG}: stopped\n".encode())
    os._exit(INTERRUPTED)


def _is_program(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether this is the console script or `python -m crystalformer`, of `sys.argv` and `sys.orig_argv`."""
    name = argv[0] if argv else ""
    if name != "-m":
        return os.path.basename(name).removesuffix(".exe") == PROG
    # While Python looks for the module: it stands before the arguments, by itself or as in -um.
    word = orig_argv[-len(argv)]
    return (word.partition("m")[2] if word.startswith("-") else word) == PROG


def _leave_while_importing() -> None:
    """Lets Ctrl-C end this program at once while it imports torch, which takes seconds.

    Other programs, which only import the library, keep their own Ctrl-C.
    """
    # The parent takes care of processes that multiprocessing has started.
    parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", lambda: None)()
    if _is_program(getattr(sys, "argv", []), sys.orig_argv) and parent is None and _by_default():
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, leave)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt; the second does not wait for what that has begun to clean up."""

    def first(*_: Any) -> None:
        signal.signal(signal.SIGINT, leave)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        if not (_by_default() or before is leave):
            raise ValueError("the caller has other plans")
        signal.signal(signal.SIGINT, first)
    except ValueError:  # also of threads but the main one, which gets the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _by_default() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C, which a terminal sends to all: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_streams() -> None:
    """Streams that the caller has closed lead to the null device: else a file opened later would take their number."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, as long as the process
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: no id may stop the work


def finish_output() -> None:
    """Writes what stdout still holds.

    Raises:
        OSError: if that is impossible; it is not tried again then.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python would flush once more when it ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise


_leave_while_importing()
