"""The program `crystalformer` as a process: Ctrl-C and SIGTERM, and streams that are closed or full."""

import contextlib
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

PROG = "crystalformer"
INTERRUPTED, TERMINATED = 130, 143
# What each signal does in a Python that nobody has told otherwise.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Terminated(SystemExit):
    """SIGTERM has come: from `timeout`, a batch system or a container that is stopped."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def leave(number: int, *_: Any) -> None:
    """Ends the process at once, for a signal after which nothing has to be cleaned up."""
    with contextlib.suppress(OSError):  # nobody reads stderr, or it is closed
        os.write(2, f"{PROG}: stopped\n".encode())
    os._exit(128 + number)


def ignore_signals() -> None:
    """For the end of the process, when all is written: Python would be killed by a signal that comes now."""
    for number in DEFAULTS:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, signal.SIG_IGN)


def _is_program(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether this is the console script or `python -m crystalformer`, of `sys.argv` and `sys.orig_argv`."""
    name = argv[0] if argv else ""
    if name != "-m":
        return os.path.basename(name).removesuffix(".exe") == PROG
    # While Python looks for the module: it stands before the arguments, by itself or as in -um.
    word = orig_argv[-len(argv)]
    return (word.partition("m")[2] if word.startswith("-") else word) == PROG


def is_program() -> bool:
    """Whether this process is the console script or `python -m crystalformer`, and not one that imports the library."""
    return _is_program(getattr(sys, "argv", []), sys.orig_argv)


def is_command_line() -> bool:
    """Whether it surely is that: `python -m crystalformer`, or the script where pip puts it, not another so named."""
    name = sys.argv[0] if getattr(sys, "argv", []) else ""
    return is_program() and (name == "-m" or os.path.dirname(os.path.abspath(name)) == sysconfig.get_path("scripts"))


def _leave_while_importing() -> None:
    """Lets Ctrl-C and SIGTERM end this program at once until `main` takes care of them.

    Other programs, which only import the library, keep their own handlers.
    """
    # The parent takes care of processes that multiprocessing has started.
    parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", lambda: None)()
    if not is_program() or parent is not None:
        return
    for number, default in DEFAULTS.items():
        if signal.getsignal(number) is default:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, leave)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt, the first SIGTERM `Terminated`.

    A Ctrl-C behind either does not wait for what has begun to clean up. A second SIGTERM changes nothing: `timeout`
    sends two.
    """

    def first(number: int, _: Any) -> None:
        for x in ours:
            signal.signal(x, leave if x == signal.SIGINT else signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {number: signal.getsignal(number) for number in DEFAULTS}
    ours = [number for number, x in before.items() if x is DEFAULTS[number] or x is leave]  # else the caller has plans
    try:
        for number in ours:
            signal.signal(number, first)
    except ValueError:  # of threads but the main one, which gets the signals
        yield
        return
    try:
        yield
    finally:
        for number in before:
            if before[number] is not None:  # a handler that C has set, which Python cannot
                signal.signal(number, before[number])


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Bytes that this machine has; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


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
