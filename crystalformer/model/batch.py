"""A batch of crystals of any sizes, packed without padding."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common import checks
from ..common.ragged import cat_ptr
from ..geometry.image_list import ImageList
from ..geometry.limits import MAX_VECTORS
from ..geometry.orbits import Orbits, find_orbits
from ..geometry.wave_vectors import WaveVectors, build_wave_vectors
from .orbit_atoms import OrbitAtoms, reduce_crystal
from .pyg import read_pyg, write_pyg
from .structures import MOST_OCCUPIED, NUM_ELEMENTS, Crystal, read_structure


@dataclass(eq=False)
class CrystalBatch:
    """`N` atoms of `C` crystals in a row.

    Attributes:
        species: (N,) int64 atomic numbers 1 to 98, or (N,98) floating-point occupancies: a disordered site is a
            mixture of elements, whose shares are not negative and add up to at most 1.
        positions: (N,3), Cartesian, Å.
        lattice: (C,3,3), rows are the lattice vectors, Å.
        ptr: (C+1) int64, the first atom of each crystal and, last, N.
        images: the image list of these crystals, or None until one is built (`Crystalformer.prepare`).
        wave_vectors: the wave vectors of these crystals, likewise.
        orbit_atoms: where the rows are not atoms but orbits of equivalent atoms (`from_structures` with symmetry_tol),
            the atoms behind them. species and positions are then those of the first atom of each orbit, lattice is the
            primitive cells, and N counts orbits.
    """

    species: Tensor
    positions: Tensor
    lattice: Tensor
    ptr: Tensor
    images: ImageList | None = None
    wave_vectors: WaveVectors | None = None
    orbit_atoms: OrbitAtoms | None = None

    def __post_init__(self) -> None:
        known: dict[str, int] = {}
        checks.check_tensor("positions", self.positions, "N 3", known)
        checks.check_dtype("positions", self.positions, torch.float32, torch.float64)
        checks.check_ptr("ptr", self.ptr, known["N"])
        known["C"] = len(self.ptr) - 1
        checks.check_tensor("lattice", self.lattice, "C 3 3", known, like=self.positions)
        if isinstance(self.species, Tensor) and self.species.is_floating_point():
            checks.check_tensor("species", self.species, f"N {NUM_ELEMENTS}", known, like=self.positions)
            _check_occupancies(self.species)
        else:
            checks.check_tensor("species", self.species, "N", known)
            checks.check_dtype("species", self.species, torch.int64)
            if checks.values_visible(self.species) and known["N"]:
                low, high = int(self.species.min()), int(self.species.max())
                if low < 1 or high > NUM_ELEMENTS:
                    raise ValueError(f"species must be atomic numbers from 1 to {NUM_ELEMENTS}, not {low} to {high}")

    @property
    def num_atoms(self) -> int:
        return len(self.positions)

    @property
    def num_crystals(self) -> int:
        return len(self.ptr) - 1

    def __len__(self) -> int:
        return self.num_crystals

    @property
    def multiplicity(self) -> Tensor | None:
        """(N) how many atoms of its primitive cell each row stands for; None where rows are atoms."""
        return None if self.orbit_atoms is None else self.orbit_atoms.multiplicity

    @classmethod
    def from_structures(
        cls, structures: Sequence[Any], dtype: torch.dtype | None = None, symmetry_tol: float = 0.0
    ) -> "CrystalBatch":
        """Packs pymatgen Structures and ase Atoms, of any sizes and mixed as you like.

        Args:
            structures: periodic structures in all three directions, with elements up to californium (98). Sites with
                fractional occupancies are kept as mixtures.
            dtype: fp32 or fp64; torch's default dtype if None.
            symmetry_tol: Å; above 0, one row for each orbit of atoms that the symmetry makes equivalent within it, by
                spglib, and no gradients of positions and lattice: the same results from fewer rows, exact up to
                rounding for symmetric crystals. 1e-5 serves files with six digits or more.

        Raises:
            TypeError: for anything but pymatgen Structures and ase Atoms.
            ValueError: for no structures, or one that is not periodic, has no atoms, no volume, an unknown element, a
                coordinate that is not finite or beyond 10,000 Å, or a site whose occupancies are negative or do not
                add up to something from 0 to 1. The message says which.
        """
        if hasattr(structures, "cart_coords") or hasattr(structures, "get_pbc"):
            raise TypeError("structures must be a list of structures, not a single one: put it into a list")
        if not isinstance(structures, Iterable):
            raise TypeError(f"structures must be a list of structures, not {type(structures).__name__}")
        crystals = [read_structure(s, f"structures[{i}]") for i, s in enumerate(structures)]
        if not crystals:
            raise ValueError("structures must hold at least one structure, not none")
        symmetry_tol = checks.check_number("symmetry_tol", symmetry_tol, closed=True)
        orbits = None
        if symmetry_tol > 0:
            orbits = [find_orbits(x.lattice, x.positions, x.species, symmetry_tol) for x in crystals]
        return cls.pack(crystals, dtype, orbits)

    @classmethod
    def pack(
        cls, crystals: Sequence[Crystal], dtype: torch.dtype | None = None, orbits: Sequence[Orbits] | None = None
    ) -> "CrystalBatch":
        """`from_structures` of what `read_structure` made of them; with their orbits, a row for each orbit."""
        if orbits is not None:
            crystals, behind = zip(*map(reduce_crystal, crystals, orbits), strict=True)
            return replace(cls.pack(crystals, dtype), orbit_atoms=OrbitAtoms.cat(behind))
        dtype = dtype or torch.get_default_dtype()
        numbers = [x.numbers for x in crystals]
        ordered = [x for x in numbers if x is not None]
        if len(ordered) == len(numbers):
            species = torch.from_numpy(np.concatenate(ordered))
        else:
            species = torch.from_numpy(np.concatenate([x.occupancies() for x in crystals])).to(dtype)
        return cls(
            species=species,
            positions=torch.from_numpy(np.concatenate([x.positions for x in crystals])).to(dtype),
            lattice=torch.from_numpy(np.stack([x.lattice for x in crystals])).to(dtype),
            ptr=torch.tensor([0] + [len(x.positions) for x in crystals]).cumsum(0),
        )

    @classmethod
    def from_pyg(cls, data: Any, species: str | None = None) -> "CrystalBatch":
        """The crystals of a Data or Batch of PyTorch Geometric, or of MACE's. PyG itself is not needed.

        Args:
            data: has `pos` or `positions` (N,3), Cartesian, Å; `cell` or `lattice` (C,3,3) or (3C,3), rows are the
                lattice vectors, Å, taken in the dtype of positions; atomic numbers; and `ptr` or `batch` where it is
                of more than one crystal.
            species: the name of its atomic numbers (N) or occupancies (N,98); `z` or `atomic_numbers` if None.

        Raises:
            TypeError, ValueError: for what data lacks, or what is no crystal.
        """
        return cls(*read_pyg(data, species))

    def to_pyg(self) -> Any:
        """A Batch of PyTorch Geometric: pos, cell (C,3,3), and z, or x for occupancies; with images their `Edges`, too.

        Raises:
            ModuleNotFoundError: where PyG is not installed.
            ValueError: for a batch of orbits.
        """
        return write_pyg(self)

    @staticmethod
    def cat(batches: "Sequence[CrystalBatch]") -> "CrystalBatch":
        """Joins batches in order, with their images and wave vectors if every one has them.

        Raises:
            ValueError: for no batches.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("batches must hold at least one CrystalBatch, not none")
        species = [x.species for x in batches]
        if len({x.is_floating_point() for x in species}) > 1:
            species = [x.occupancies() for x in batches]
        images = [x.images for x in batches if x.images is not None]
        waves = [x.wave_vectors for x in batches if x.wave_vectors is not None]
        orbits = [x.orbit_atoms for x in batches if x.orbit_atoms is not None]
        if orbits and len(orbits) < len(batches):
            raise ValueError("batches must be all of orbits or all of atoms")
        return CrystalBatch(
            species=torch.cat(species),
            positions=torch.cat([x.positions for x in batches]),
            lattice=torch.cat([x.lattice for x in batches]),
            ptr=cat_ptr([x.ptr for x in batches]),
            images=ImageList.cat(images) if len(images) == len(batches) else None,
            wave_vectors=WaveVectors.cat(waves) if len(waves) == len(batches) else None,
            orbit_atoms=OrbitAtoms.cat(orbits) if orbits else None,
        )

    def build_wave_vectors(self, decay_min: float, tol: float) -> WaveVectors:
        """`build_wave_vectors` of these crystals; with `orbit_atoms` a list of orbits."""
        x = self.orbit_atoms
        atoms = (None, None) if x is None else (x.positions, x.orbit)
        return build_wave_vectors(self.lattice, self.ptr, decay_min, tol, MAX_VECTORS, *atoms)

    def occupancies(self) -> Tensor:
        """(N,98) the share of each element in each site."""
        if self.species.is_floating_point():
            return self.species
        one_hot = torch.nn.functional.one_hot(self.species - 1, NUM_ELEMENTS)
        return one_hot.to(self.positions.dtype)

    def to(self, target: torch.device | str | torch.dtype) -> "CrystalBatch":
        """The batch on another device, or with its floating-point tensors in another dtype."""
        if isinstance(target, torch.dtype):
            return self._map(lambda x: x.to(target) if x.is_floating_point() else x, lambda packed: packed)
        return self._map(lambda x: x.to(target), lambda packed: packed.to(target))

    def pin_memory(self) -> "CrystalBatch":
        """The batch in page-locked memory, for copies to a GPU that do not wait."""
        return self._map(lambda x: x.pin_memory(), lambda packed: packed.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor], lists: Callable[[Any], Any]) -> "CrystalBatch":
        return replace(
            self,
            species=function(self.species),
            positions=function(self.positions),
            lattice=function(self.lattice),
            ptr=function(self.ptr),
            images=self.images and lists(self.images),
            wave_vectors=self.wave_vectors and lists(self.wave_vectors),
            orbit_atoms=self.orbit_atoms and lists(self.orbit_atoms),
        )


def _check_occupancies(species: Tensor) -> None:
    if not checks.values_visible(species) or not len(species):
        return
    checks.check_finite("species", species)
    total, least = species.detach().sum(1), species.detach().amin(1)
    bad = ((least < 0) | (total <= 0) | (total > MOST_OCCUPIED)).nonzero()
    if len(bad):
        i = int(bad[0])
        what = f"species[{i}] has {least[i]:g} as the least and adds up to {total[i]:g}"
        raise ValueError(f"species must be occupancies from 0 that add up to at most 1, not to 0, but {what}")
