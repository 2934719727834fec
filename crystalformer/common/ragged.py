"""Segments packed in a row: the atoms of crystals, the images of atoms, the wave vectors of crystals."""

from collections.abc import Sequence

import torch
from torch import Tensor


def offsets(count: Tensor) -> Tensor:
    """(S+1) where each of S segments of `count` (S) entries begins and, last, where they end."""
    return torch.nn.functional.pad(count.cumsum(0), (1, 0))


def ordinals(count: Tensor, segment: Tensor) -> Tensor:
    """(M) which entry of its segment each one is, from 0. `count` (S): entries of each; `segment` (M): rising."""
    return torch.arange(len(segment), device=segment.device) - (count.cumsum(0) - count)[segment]


def cat_ptr(ptrs: Sequence[Tensor]) -> Tensor:
    """Offsets of parts, each from 0 on, as offsets into the parts joined."""
    return offsets(torch.cat([ptr.diff() for ptr in ptrs]))


def crystal_of_atom(ptr: Tensor, num_atoms: int) -> Tensor:
    """(N) the crystal of each atom."""
    return torch.repeat_interleave(ptr.diff(), output_size=num_atoms)
