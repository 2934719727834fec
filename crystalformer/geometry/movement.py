"""Where the atoms were when a list was built, and how far they have moved since."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import checks
from ..common.ragged import crystal_of_atom
from ..common.tensor_struct import TensorStruct


def strain(before: Tensor, after: Tensor) -> Tensor:
    """(C) by which fraction of itself the length of any lattice vector, or combination of some, has changed at most.

    Of lattices (C,3,3) in fp64. Turning or mirroring a lattice is no strain.
    """
    inverse = torch.linalg.inv_ex(before).inverse
    # Squared lengths are r·M·r of the r before.
    metric = inverse @ after @ after.mT @ inverse.mT
    return (torch.linalg.eigvalsh(metric).clamp(min=0).sqrt() - 1).abs().amax(1)


@dataclass(frozen=True, eq=False)
class Geometry(TensorStruct):
    """The geometry that a list was built for.

    Attributes:
        positions: (N,3) fp64, Å.
        lattice: (C,3,3) fp64, Å.
    """

    positions: Tensor
    lattice: Tensor

    def __post_init__(self) -> None:
        checks.check_tensor("geometry.positions", self.positions, "N 3", {})
        checks.check_dtype("geometry.positions", self.positions, torch.float64)
        checks.check_tensor("geometry.lattice", self.lattice, "C 3 3", {}, like=self.positions)

    @staticmethod
    def of(positions: Tensor, lattice: Tensor) -> "Geometry":
        """Keeps copies: the caller may change the tensors later, and the list has to notice that."""
        return Geometry(*(x.detach().to(torch.float64, copy=True) for x in (positions, lattice)))

    def rounding(self) -> float:
        """Å: what coordinates lose in fp32, with room for its way through `movement`."""
        return 2**-20 * sum(float(x.abs().max()) for x in (self.positions, self.lattice) if x.numel())

    def same(self, positions: Tensor, lattice: Tensor) -> bool:
        return torch.equal(self.positions, positions.double()) and torch.equal(self.lattice, lattice.double())

    def movement(self, positions: Tensor, lattice: Tensor, ptr: Tensor, reach: Tensor) -> Tensor:
        """(C), Å: a bound on how much the distance of any image within `reach` (C) of an atom has changed since.

        Turning, mirroring or shifting a crystal as a whole changes none.
        """
        after = lattice.detach().double()
        crystal = crystal_of_atom(ptr, len(positions))
        fractions = [
            (p[:, None] @ torch.linalg.inv_ex(cell).inverse[crystal])[:, 0]
            for p, cell in ((positions.detach().double(), after), (self.positions, self.lattice))
        ]
        moved = fractions[0] - fractions[1]
        mean = torch.zeros_like(after[:, 0]).index_add_(0, crystal, moved) / ptr.diff()[:, None]
        moved = ((moved - mean[crystal])[:, None] @ after[crystal])[:, 0].norm(dim=1)
        furthest = torch.zeros_like(reach).scatter_reduce_(0, crystal, moved, "amax")
        if torch.equal(self.lattice, after):
            return 2 * furthest
        return strain(self.lattice, after) * reach + 2 * furthest
