"""Where the crystals of a batch begin, from what other libraries say of it."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .checks import check_dense, values_visible
from .ragged import offsets

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def ptr_from_sizes(sizes: Tensor | Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The `ptr` of crystals of these sizes.

    Args:
        sizes: (C) integers, the number of atoms of each crystal, at least 1.
        device: of the result; that of sizes, if they are a tensor, and else torch's default.

    Returns:
        (C+1) int64: 0, ..., N.

    Raises:
        TypeError, ValueError: for sizes that are no integers of at least 1.
    """
    if not isinstance(sizes, Tensor):
        sizes = list(sizes)
        if not all(isinstance(x, Integral) and not isinstance(x, bool) for x in sizes):
            raise TypeError(f"sizes must be integers, the atoms of each crystal, not {sizes!r}")
        sizes = torch.tensor(sizes, dtype=torch.int64)
    _check_integers("sizes", sizes, "C")
    if values_visible(sizes) and len(sizes) and int(sizes.min()) < 1:
        raise ValueError(f"sizes must be at least 1, the atoms of each crystal, but the smallest is {int(sizes.min())}")
    return offsets(sizes.to(device or sizes.device, torch.int64))


def ptr_from_batch(batch: Tensor, num_crystals: int | None = None) -> Tensor:
    """The `ptr` of a batch index, as PyG has it.

    Args:
        batch: (N) integers, the crystal of each atom: rising from 0, no crystal left out.
        num_crystals: C, which spares a GPU the wait for the last value of batch.

    Returns:
        (C+1) int64: 0, ..., N, on the device of batch.

    Raises:
        TypeError, ValueError: for a batch that does not rise, or leaves a crystal out, or has another number of them.
    """
    _check_integers("batch", batch, "N")
    if num_crystals is None:
        num_crystals = int(batch[-1]) + 1 if len(batch) else 0
    if values_visible(batch):
        step = batch.long().diff(prepend=batch.new_full((1,), -1, dtype=torch.int64))
        bad = ((step < 0) | (step > 1) | (batch < 0)).nonzero() if len(batch) else step.new_empty(0)
        if len(bad):
            i = int(bad[0])
            what = f"batch[{i}] is {int(batch[i])}" + (f" behind {int(batch[i - 1])}" if i else "")
            raise ValueError(f"batch must rise from 0, atoms of a crystal together and no crystal left out, but {what}")
        if len(batch) and int(batch[-1]) + 1 != num_crystals:
            raise ValueError(f"batch must be of num_crystals={num_crystals} crystals, not of {int(batch[-1]) + 1}")
    crystals = torch.arange(num_crystals + 1, device=batch.device)
    return torch.searchsorted(batch.long().contiguous(), crystals)


def _check_integers(name: str, x: Tensor, dim: str) -> None:
    check_dense(name, x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, not {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name} must have shape ({dim}), not {tuple(x.shape)}")
