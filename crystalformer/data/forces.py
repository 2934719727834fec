"""Forces and stresses that come with structures: from rows of files, and in batches beside their crystals."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common import checks
from ..model.batch import CrystalBatch
from .dataset import CrystalDataset, Shard
from .parsing import Source
from .rows import missing
from .samples import Samples

if TYPE_CHECKING:
    from ..model.model import Crystalformer

FORCES, STRESS = "forces", "stress"
# Where Voigt's six components, in ase's order, stand in a matrix.
VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


def read_forces(source: Source | None, values: Mapping[str, Any], stress: bool) -> tuple[Tensor, ...] | str:
    """The forces (n,3) of a row, eV/Å, and the stress (3,3), eV/Å³, if it is wanted, fp64; or what is wrong with them.

    Args:
        source: of the row's structure. A CIF does not say in which order its atoms come.
        values: of the row, with `forces` and `stress`: a matrix, or six numbers in ase's order xx, yy, zz, yz, xz, xy.
    """
    if source is not None and source.kind == "cif":
        return "forces must come with extxyz, an ase database or JSON, which keep the order of atoms, not with a CIF"
    found = []
    for name, wanted in ((FORCES, "(n,3) numbers"), (STRESS, "(3,3) or 6 numbers"))[: 1 + stress]:
        value = values.get(name)
        if missing(value):
            return f"{name} is missing"
        try:
            x = np.array(value, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            return f"{name} must be {wanted}, not {str(value)[:60]!r}"
        if name == STRESS and x.shape == (6,):
            x = x[VOIGT]
        if x.ndim != 2 or x.shape[1] != 3 or (name == STRESS and len(x) != 3):
            return f"{name} must be {wanted}, not an array of shape {x.shape}"
        if not np.isfinite(x).all():
            return f"{name} must be finite, not {x[~np.isfinite(x)][0]}"
        found.append(torch.from_numpy(x))
    return tuple(found)


def per_atom(samples: Samples) -> Samples:
    """The samples with targets of an atom, where the files had those of the cell."""
    size = torch.tensor([len(x) for x in samples.structures], dtype=torch.float64)
    return replace(samples, targets=samples.targets / size[:, None])


class ForceExample(NamedTuple):
    """An `Example` with the forces (N,3) and the stresses (C,3,3) of its crystals, fp64; these may be none, (0,3,3)."""

    crystals: CrystalBatch
    targets: Tensor
    weight: Tensor
    forces: Tensor
    stress: Tensor


class ForceDataset(CrystalDataset):
    """Crystals with their energies, forces and, if they are known, stresses.

    Args:
        crystals: as for `CrystalDataset`; with a row for each atom, in the order of the forces.
        targets: (C,1), energies of an atom, eV.
        model: as for `CrystalDataset`.
        forces: (n,3) of each crystal, eV/Å.
        stress: (3,3) of each crystal, eV/Å³, positive where the cell would shrink, as in ase; or none.

    Raises:
        ValueError: for forces or stresses that are not those of these crystals, or not finite.
    """

    def __init__(
        self,
        crystals: Sequence[Any],
        targets: Tensor,
        model: "Crystalformer",
        forces: Sequence[Tensor],
        stress: Sequence[Tensor] = (),
    ) -> None:
        super().__init__(crystals, targets, model)
        self.forces, self.stress = [x.double() for x in forces], [x.double() for x in stress]
        shapes = [(x.num_atoms, 3) for x in self.crystals]
        for name, tensors, expected in (
            (FORCES, self.forces, shapes),
            (STRESS, self.stress, [(3, 3)] * len(shapes) if stress else []),
        ):
            found = [tuple(x.shape) for x in tensors]
            if found != expected:
                bad = next((pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), None)
                what = f"{len(expected)}, as crystals, not {len(found)}" if bad is None else f"{bad[0]}, not {bad[1]}"
                raise ValueError(f"{name} must be {what}")
            for x in tensors:
                checks.check_finite(name, x)
        if any(x.orbit_atoms is not None for x in self.crystals):
            raise ValueError("crystals must have a row for each atom with forces: build them with symmetry_tol=0")

    def __getitem__(self, shard: Shard) -> ForceExample:  # type: ignore[override]  # with more than an Example has
        example = super().__getitem__(shard)
        stress = torch.stack([self.stress[i] for i in shard.indices]) if self.stress else torch.zeros(0, 3, 3).double()
        return ForceExample(*example, torch.cat([self.forces[i] for i in shard.indices]), stress)
