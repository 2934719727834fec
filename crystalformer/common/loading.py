"""Which backends are there: each is loaded when it is first asked for. This file needs no torch to be imported."""

from collections.abc import Callable

BACKENDS = ("triton", "cpu", "reference")
# The backends that were asked for, each with True or, where it is missing, the reason and what to do about it.
AVAILABLE: dict[str, bool | str] = {"reference": True}
# What loads the others and says that of them; compiled.py fills it in.
LOADERS: dict[str, Callable[[], bool | str]] = {}


def load_backend(backend: str) -> bool | str:
    """True or, where it is missing, the reason and what to do about it."""
    if backend not in AVAILABLE:
        AVAILABLE[backend] = LOADERS[backend]()
    return AVAILABLE[backend]


def available_backends() -> dict[str, bool | str]:
    """The backends, each with True or, where it is missing, the reason and what to do about it."""
    return {backend: load_backend(backend) for backend in BACKENDS}
