"""Batches of PyTorch Geometric, and of what looks like them, as MACE's: read without that library, written with it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.checks import check_dense
from ..common.ptr import INTEGERS, ptr_from_batch, ptr_from_sizes
from ..common.ragged import crystal_of_atom

if TYPE_CHECKING:
    from .batch import CrystalBatch

POSITIONS, LATTICE, SPECIES = ("pos", "positions"), ("cell", "lattice"), ("z", "atomic_numbers")


def read_pyg(data: Any, species: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """species, positions, lattice and ptr of `CrystalBatch.from_pyg`."""
    positions = _one_of(data, POSITIONS)
    lattice, numbers = _one_of(data, LATTICE), _one_of(data, SPECIES if species is None else (species,))
    if lattice.dim() == 2 and lattice.shape[1] == 3 and lattice.shape[0] % 3 == 0:  # of Data, joined along its rows
        lattice = lattice.reshape(-1, 3, 3)
    if (pbc := getattr(data, "pbc", None)) is not None and not bool(torch.as_tensor(pbc).all()):
        raise ValueError(f"data must be periodic in all three directions, not pbc={torch.as_tensor(pbc).tolist()}")
    ptr, batch = getattr(data, "ptr", None), getattr(data, "batch", None)
    if ptr is None:
        ptr = ptr_from_sizes([len(positions)], positions.device) if batch is None else ptr_from_batch(batch)
    numbers, ptr = (x.long() if x.dtype in INTEGERS else x for x in (numbers, ptr))  # others are refused as they are
    return numbers, positions, lattice.to(positions.dtype), ptr


def _one_of(data: Any, names: tuple[str, ...]) -> Tensor:
    for name in names:
        if (x := getattr(data, name, None)) is not None:
            check_dense(f"data.{name}", x)
            return x
    raise TypeError(f"data must have {' or '.join(names)}, but this {type(data).__name__} has none")


def write_pyg(batch: "CrystalBatch") -> Any:
    """`CrystalBatch.to_pyg`."""
    if batch.orbit_atoms is not None:
        raise ValueError("the batch must be of atoms, not of orbits: build it without symmetry_tol")
    from torch_geometric.data import Batch, Data

    sizes = batch.ptr.diff().tolist()
    name = "x" if batch.species.is_floating_point() else "z"
    atoms = {name: batch.species.split(sizes), "pos": batch.positions.split(sizes), "cell": batch.lattice.split(1)}
    parts = [Data(**dict(zip(atoms, values, strict=True))) for values in zip(*atoms.values(), strict=True)]
    if batch.images is not None:
        edges = batch.images.to_edges(batch.positions, batch.lattice)
        crystal = crystal_of_atom(batch.ptr, batch.num_atoms)[edges.edge_index[0]]
        numbers = torch.bincount(crystal, minlength=len(parts)).tolist()
        for field, x in edges._asdict().items():
            if field == "edge_index":
                x = x - batch.ptr[crystal]
            for part, own in zip(parts, x.split(numbers, dim=-1 if field == "edge_index" else 0), strict=True):
                part[field] = own
    return Batch.from_data_list(parts)
