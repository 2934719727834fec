"""An image list as the edges of a graph, as message-passing networks have them."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..common.ragged import crystal_of_atom

if TYPE_CHECKING:
    from .image_list import ImageList


class Edges(NamedTuple):
    """From atom i to each image (j, n) that it sees: `positions[j] - positions[i] + shifts` is the vector of an edge.

    Attributes:
        edge_index: (2,M) int64, i and j.
        unit_shifts: (M,3) n, in the dtype of positions. MACE's `unit_shifts`, matgl's `pbc_offset`.
        shifts: (M,3) n·L, Å. MACE's `shifts`, matgl's `pbc_offshift`.
        distances: (M) Å.
    """

    edge_index: Tensor
    unit_shifts: Tensor
    shifts: Tensor
    distances: Tensor


def edges_of(images: "ImageList", positions: Tensor, lattice: Tensor, themselves: bool) -> Edges:
    """`ImageList.to_edges`."""
    if images.of_orbits:
        raise ValueError("images must be of all atoms, from build_images, not of orbits, to be edges")
    images.check_built_for(positions, lattice)
    i = crystal_of_atom(images.row_ptr, images.num_images)
    j, n = images.col.long(), images.shift
    if not themselves:
        others = (i != j) | (n != 0).any(1)
        i, j, n = i[others], j[others], n[others]
    unit_shifts = n.to(positions.dtype)
    shifts = torch.einsum("ma,mab->mb", unit_shifts, lattice[crystal_of_atom(images.ptr, images.num_atoms)[i]])
    squares = (positions[j] - positions[i] + shifts).square().sum(1)
    apart = squares > 0  # else the root has no derivatives
    distances = squares.where(apart, 1.0).sqrt().where(apart, 0.0)
    return Edges(torch.stack((i, j)), unit_shifts, shifts, distances)
