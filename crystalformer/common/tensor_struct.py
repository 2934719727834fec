"""What is packed for the crystals of a batch, and moves and joins as one."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

Self = TypeVar("Self", bound="TensorStruct")


class TensorStruct:
    """Base of a frozen dataclass of tensors and of the numbers that belong to them.

    Attributes:
        PACKED: names of the tensors that an operator reads, where they are there, those of 64 bits first. It takes them
            as one: torch.library takes a time that grows with the number of arguments.
    """

    PACKED: ClassVar[tuple[str, ...]] = ()

    def packed(self) -> Tensor:
        """(words) int32: the tensors named in PACKED, one after the other. Made once, and again after a write."""
        if torch.compiler.is_compiling():
            return self._words()
        versions = self.versions()
        before, words = self.__dict__.get("_packed", (None, None))
        if before != versions:
            with torch.inference_mode(False):  # it outlives this call, and may be saved for a backward
                words = self._words()
            self.__dict__["_packed"] = (versions, words)
        return words

    def versions(self) -> list[int]:
        """How often each tensor of PACKED was written. PyTorch does not count it for those made in inference mode."""
        return [0 if x.is_inference() else x._version for x in self._parts()]

    def _parts(self) -> list[Tensor]:
        return [x for name in self.PACKED if (x := getattr(self, name)) is not None]

    def _words(self) -> Tensor:
        return join_words(self._parts())

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name != "_packed"}

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


def join_words(parts: Sequence[Tensor]) -> Tensor:
    """(words) int32 of numbers of 64 bits, and of 32 in the last parts. Each part begins at a multiple of 16 bytes,
    which loads are faster from."""
    words = [x.contiguous().view(torch.int32).flatten() for x in parts]
    return torch.cat([*(pad(x, (0, _aligned(len(x)) - len(x))) for x in words[:-1]), words[-1]])


def split_words(words: Tensor, *sizes: int) -> list[Tensor]:
    """Views of what `join_words` joined: integers of 64 bits, so many in each part, and last the words behind them.

    Raises:
        ValueError: for what `join_words` cannot have made of such sizes.
    """
    spaces = [_aligned(2 * size) for size in sizes]
    if words.dtype != torch.int32 or words.dim() != 1 or len(words) < sum(spaces):
        what = f"not {words.dtype} of shape {tuple(words.shape)}"
        raise ValueError(f"a packed list must be int32 words, {sum(spaces)} of them for the offsets, {what}")
    *parts, rest = words.split([*spaces, len(words) - sum(spaces)])
    return [*(x[: 2 * size].view(torch.int64) for x, size in zip(parts, sizes, strict=True)), rest]


def _aligned(words: int) -> int:
    return -(-words // 4) * 4


def check_parts(parts: Sequence[Any], name: str, kind: type) -> None:
    """Checks what a `cat` is to join."""
    if not parts:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, not none")
    if len({x.device for x in parts}) > 1:
        raise ValueError(f"{name} must be on one device, not on {sorted({str(x.device) for x in parts})}")


def cat_known(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Those that are there joined, or None if none is."""
    known = [x for x in parts if x is not None]
    return torch.cat(known) if known else None


def weakest(parts: Sequence[Any], name: str, choose: Callable[[list[float]], float]) -> float | None:
    """What the joined parts are certified for: the weakest, or None if one is not certified."""
    values = [getattr(x, name) for x in parts]
    return None if None in values else choose(values)
