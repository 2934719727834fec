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
    joined = torch.cat(list(ptrs))
    begins = torch.tensor([len(ptr) for ptr in ptrs[:-1]], dtype=torch.int64).cumsum(0)
    within = torch.ones(len(joined) - 1, dtype=torch.bool, device=joined.device)
    within[begins - 1] = False  # from the end of one part to the beginning of the next
    return offsets(joined.diff()[within])


def cat_numbers(parts: Sequence[Tensor], firsts: Sequence[int]) -> Tensor:
    """Numbers of atoms or of rows joined: each part counts them from 0 on, and its first one becomes `firsts` (S)."""
    joined = torch.cat(list(parts))
    count = torch.tensor([len(part) for part in parts], device=joined.device)
    first = torch.tensor(firsts, dtype=joined.dtype, device=joined.device)
    return joined + first.repeat_interleave(count, output_size=len(joined))


def crystal_of_atom(ptr: Tensor, num_atoms: int) -> Tensor:
    """(N) the crystal of each atom."""
    return torch.repeat_interleave(ptr.diff(), output_size=num_atoms)
