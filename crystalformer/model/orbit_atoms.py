"""The atoms behind the rows of a batch whose rows are orbits of equivalent atoms."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.ragged import cat_numbers, cat_ptr
from ..common.tensor_struct import TensorStruct
from ..geometry.orbits import Orbits
from .structures import Crystal


@dataclass(frozen=True, eq=False)
class OrbitAtoms(TensorStruct):
    """The atoms that the rows of a batch stand for.

    Attributes:
        positions: (P,3) fp64, Å, the atoms of the primitive cells, crystal by crystal.
        lattice: (C,3,3) fp64, Å, the primitive cells.
        ptr: (C+1) int64, the first of these atoms of each crystal and, last, P.
        orbit: (P) int64, the row of each of them.
        first: (N) int64, which of them is the first of each row.
        row: (A) int64, the row of each atom of the crystals as they were given.
        row_ptr: (C+1) int64, the first atom of each crystal as it was given and, last, A.
        symmetry_tol: Å, what the symmetry holds within.
    """

    positions: Tensor
    lattice: Tensor
    ptr: Tensor
    orbit: Tensor
    first: Tensor
    row: Tensor
    row_ptr: Tensor
    symmetry_tol: float

    @property
    def multiplicity(self) -> Tensor:
        """(N) how many atoms of its primitive cell each row stands for."""
        return torch.zeros_like(self.first).index_add_(0, self.orbit, torch.ones_like(self.orbit))

    @staticmethod
    def cat(parts: Sequence["OrbitAtoms"]) -> "OrbitAtoms":
        """Joins those of batches, in order."""
        row = [0, *itertools.accumulate(len(x.first) for x in parts[:-1])]
        atom = [0, *itertools.accumulate(len(x.orbit) for x in parts[:-1])]
        return OrbitAtoms(
            positions=torch.cat([x.positions for x in parts]),
            lattice=torch.cat([x.lattice for x in parts]),
            ptr=cat_ptr([x.ptr for x in parts]),
            orbit=cat_numbers([x.orbit for x in parts], row),
            first=cat_numbers([x.first for x in parts], atom),
            row=cat_numbers([x.row for x in parts], row),
            row_ptr=cat_ptr([x.row_ptr for x in parts]),
            symmetry_tol=max(x.symmetry_tol for x in parts),
        )


def reduce_crystal(crystal: Crystal, found: Orbits) -> tuple[Crystal, OrbitAtoms]:
    """The first atom of each orbit in the primitive cell, and all atoms behind them."""
    orbit = found.orbit[found.atoms]
    first = np.unique(orbit, return_index=True)[1]
    atoms = found.atoms[first]
    rows = Crystal([crystal.mixtures[i] for i in atoms], crystal.positions[atoms], found.lattice)
    return rows, OrbitAtoms(
        positions=torch.from_numpy(crystal.positions[found.atoms]),
        lattice=torch.from_numpy(found.lattice)[None],
        ptr=torch.tensor([0, len(found.atoms)]),
        orbit=torch.from_numpy(orbit),
        first=torch.from_numpy(first),
        row=torch.from_numpy(found.orbit),
        row_ptr=torch.tensor([0, len(crystal.positions)]),
        symmetry_tol=found.symmetry_tol,
    )
