"""Argument checks: every error names the argument, what it must be and what it was."""

import math
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

_check_values_on_gpu = ContextVar("check_values_on_gpu", default=False)
MOST_WORKERS = 1024


class NotFinite(ValueError):
    """A tensor holds NaN or infinity."""


class debug_checks:
    """Checks values (NaN, signs, singular cells) of CUDA tensors too, at the price of a GPU synchronisation a check.

    Values of CPU tensors are always checked. `with debug_checks(True):` switches the checks on for a block,
    `debug_checks(True)` from there on: for this thread, or this task of asyncio and those that it starts, and no other.
    """

    def __init__(self, enabled: bool) -> None:
        self._before = _check_values_on_gpu.get()
        _check_values_on_gpu.set(bool(enabled))

    def __enter__(self) -> "debug_checks":
        return self

    def __exit__(self, *exc: object) -> None:
        _check_values_on_gpu.set(self._before)


def values_visible(x: Tensor) -> bool:
    """Whether the values of x may be looked at: not while compiling, not on a GPU unless asked for."""
    return not torch.compiler.is_compiling() and (x.is_cpu or _check_values_on_gpu.get())


@cache
def _names(dims: str) -> tuple[str | int, ...]:
    """The dimensions that a string names: numbers where it has numbers."""
    return tuple(int(d) if d.isdigit() else d for d in dims.split())


def check_tensor(name: str, x: Any, dims: str, known: dict[str, int], like: Tensor | None = None) -> None:
    """Checks that x is a tensor of the shape that `dims` names, with the dtype and device of `like`.

    Args:
        dims: names or numbers of the dimensions, "N H D" or "C 3 3".
        known: sizes of the names seen so far; names met here for the first time are added.
    """
    check_dense(name, x)
    names, shape = _names(dims), x.shape
    sizes = [known.get(d) if type(d) is str else d for d in names]
    if len(shape) != len(names) or any(s is not None and s != n for s, n in zip(sizes, shape, strict=True)):
        wanted = ", ".join(str(d) if s is None or d == s else f"{d}={s}" for d, s in zip(names, sizes, strict=True))
        raise ValueError(f"{name} must have shape ({wanted}), not {tuple(shape)}")
    for d, n in zip(names, shape, strict=True):
        if type(d) is str:
            known[d] = n
    if like is None:
        return
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, as the other arguments, not {x.dtype}")
    check_device(name, x, like)


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the other arguments, not on {x.device}")


def check_dense(name: str, x: Any) -> None:
    """Checks that x is a tensor with a number in memory for each of its places."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, not {kind}")
    if type(x) is Tensor or torch.compiler.is_compiling():
        return
    # The module that defines such a tensor has been imported where there is one.
    for module, kind in (("torch.masked", "MaskedTensor"), ("torch.distributed.tensor", "DTensor")):
        if isinstance(x, getattr(sys.modules.get(module), kind, ())):
            raise TypeError(f"{name} must be a dense tensor, not a {kind}")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(map(str, allowed))}, not {x.dtype}")


def _extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value, in one pass over the data; NaN and NaN if one value is NaN."""
    low, high = torch.aminmax(x.detach())
    return low.item(), high.item()


def check_finite(name: str, x: Tensor) -> None:
    check_has_values(name, x)
    # The sum is finite only if every value is; it costs a quarter of a look at each.
    if not values_visible(x) or math.isfinite(x.detach().sum().item()):
        return
    bad = (~torch.isfinite(x)).nonzero()
    if len(bad):
        where = bad[0].tolist()
        raise NotFinite(f"{name} must be finite, but {name}{where} is {x[tuple(where)].item()}")


def check_has_values(name: str, x: Tensor) -> None:
    if x.is_meta and not torch.compiler.is_compiling():
        raise ValueError(f"{name} must have values, not be on the device meta")


def check_decay(name: str, x: Tensor) -> None:
    check_has_values(name, x)
    if not values_visible(x) or not x.numel():
        return
    low, high = _extremes(x)
    if not 0 < low <= high < math.inf:
        check_finite(name, x)
        sign = (
            ": the weight is exp(-decay d²), so that what falls with the distance has a decay above 0"
            if low < 0
            else ""
        )
        raise ValueError(f"{name} must be positive, but its smallest value is {low:g}{sign}")


def check_number(name: str, x: Any, low: float = 0.0, high: float = float("inf"), closed: bool = False) -> float:
    """x as a float with low < x < high; `closed` admits x = low."""
    _check_real(name, x)
    if not (low < x < high or (closed and x == low)) or abs(x) > sys.float_info.max:
        upper = f"smaller than {high:g}" if high < float("inf") else "finite"
        raise ValueError(
            f"{name} must be {'at least' if closed else 'larger than'} {low:g} and {upper}, not {_shown(x)}"
        )
    return float(x)


def check_between(name: str, x: Any, low: float, high: float) -> None:
    """Checks low <= x <= high."""
    _check_real(name, x)
    if not low <= x <= high:
        raise ValueError(f"{name} must be at least {low:g} and at most {high:g}, not {_shown(x)}")


def check_integer(name: str, x: Any, low: int, high: int | None = None) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < low or (high is not None and x > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be an integer, at least {low}{upper}, not {_shown(x)}")


def check_choice(name: str, x: Any, choices: Iterable[str]) -> str:
    if x not in (names := list(choices)):
        raise ValueError(f"{name} must be one of {', '.join(names)}, not {_shown(x)}")
    return str(x)


def _check_real(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(x).__name__}")


def _shown(x: Any) -> str:
    """x as an error shows it: a very long integer only by its number of digits."""
    return f"an integer of {x.bit_length()} bits" if isinstance(x, int) and x.bit_length() > 128 else repr(x)


def check_workers(name: str, x: Any) -> None:
    """Processes or threads: each takes memory, or a place in the tables of the system, before it does anything."""
    check_integer(name, x, 0, MOST_WORKERS)


def check_ptr(name: str, ptr: Any, num_atoms: int | None = None) -> None:
    """Offsets of the crystals in the packed rows: 0, ..., N, each crystal with at least one atom; N if it is known."""
    check_segments(name, ptr, num_atoms, "atoms", "C", 1, "rise by at least one atom a crystal")


def check_segments(
    name: str,
    ptr: Any,
    number: int | None,
    entries: str,
    segments: str = "N",
    least: int = 0,
    rule: str = "never fall",
) -> None:
    """Offsets of segments in a row of entries: 0, ..., their number, each segment with at least `least` of them."""
    if not isinstance(ptr, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(ptr).__name__}")
    check_dtype(name, ptr, torch.int64)
    if ptr.dim() != 1 or len(ptr) < 1:
        raise ValueError(f"{name} must have shape ({segments}+1), not {tuple(ptr.shape)}")
    if values_visible(ptr):
        first, last = int(ptr[0]), int(ptr[-1])
        number = last if number is None else number
        if first != 0 or last != number:
            raise ValueError(f"{name} must run from 0 to the number of {entries} {number}, not from {first} to {last}")
        if len(ptr) > 1 and int(ptr.diff().min()) < least:
            raise ValueError(f"{name} must {rule}, but it is {ptr.tolist()}")
