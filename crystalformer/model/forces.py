"""Forces and stresses: exact derivatives of an energy by positions and strain."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import CrystalBatch


class Forces(NamedTuple):
    """An energy with its derivatives, for a batch of C crystals with N atoms.

    Attributes:
        energy: (C), of the cells, eV.
        forces: (N,3), on the atoms, eV/Å.
        stress: (C,3,3), symmetric, dE/dstrain by the volume, eV/Å³: positive where the cell would shrink, as in ase.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor


@torch.enable_grad()
def differentiate(energy: Callable[[CrystalBatch], Tensor], batch: CrystalBatch, create_graph: bool = False) -> Forces:
    """An energy of crystals with its forces and stresses.

    Args:
        energy: gives the energies (C) of the cells of a batch, differentiably.
        batch: with a row for each atom, and with its lists, which bear the strain that is differentiated by: it is 0.
        create_graph: whether the derivatives are differentiated again, as in training; else all results are detached.

    Raises:
        ValueError: for a batch whose rows are orbits of equivalent atoms.
    """
    if batch.orbit_atoms is not None:
        raise ValueError("batch must have a row for each atom to be differentiated: build it with symmetry_tol=0")
    size = batch.ptr.diff()
    positions = batch.positions.detach().clone().requires_grad_()
    strain = torch.zeros_like(batch.lattice, requires_grad=True)
    deformation = torch.eye(3).to(strain) + (strain + strain.mT) / 2
    of_atoms = deformation.repeat_interleave(size, 0, output_size=batch.num_atoms)
    placed = (positions[:, None] @ of_atoms)[:, 0]
    cells = energy(replace(batch, positions=placed, lattice=batch.lattice @ deformation))
    slope, pull = torch.autograd.grad(cells.sum(), (positions, strain), create_graph=create_graph)
    stress = pull / batch.lattice.detach().det().abs()[:, None, None]
    return Forces(cells if create_graph else cells.detach(), -slope, stress)
