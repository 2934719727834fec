"""What is packed for the crystals of a batch, and moves and joins as one."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="TensorStruct")


class TensorStruct:
    """Base of a frozen dataclass of tensors and of the numbers that belong to them."""

    def _map(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}  # type: ignore[arg-type]
        mapped: dict[str, Any] = {}
        for name, x in values.items():
            if isinstance(x, Tensor):
                mapped[name] = function(x)
            elif isinstance(x, TensorStruct):
                mapped[name] = x._map(function)
        if all(x is values[name] for name, x in mapped.items()):
            return self
        return replace(self, **mapped)  # type: ignore[type-var]

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """The same in page-locked memory, for copies to a GPU that do not wait."""
        return self._map(lambda x: x.pin_memory())


def check_parts(parts: Sequence[Any], name: str, kind: type) -> None:
    """Checks what a `cat` is to join."""
    if not parts:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, not none")
    if len({x.device for x in parts}) > 1:
        raise ValueError(f"{name} must be on one device, not on {sorted({str(x.device) for x in parts})}")


def weakest(parts: Sequence[Any], name: str, choose: Callable[[list[float]], float]) -> float | None:
    """What the joined parts are certified for: the weakest, or None if one is not certified."""
    values = [getattr(x, name) for x in parts]
    return None if None in values else choose(values)
