"""Orbits: which atoms of a crystal its symmetry makes equivalent, by spglib.

Equivalent atoms see the same images at the same distances, so every layer gives them the same features, and one row for
each orbit is enough. A supercell has the orbits of its primitive cell, whatever cell that is written in.
"""

import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

SYMMETRY_TOL = 1e-5


@dataclass(frozen=True)
class Orbits:
    """The orbits of a crystal of n atoms, and its primitive cell of p atoms.

    Attributes:
        lattice: (3,3) fp64, Å, rows are the vectors of the primitive cell.
        atoms: (p) int64, which atoms of the crystal stand in the primitive cell.
        orbit: (n) int64, the orbit of each atom of the crystal, numbered in the order of their first atoms.
        symmetry_tol: Å, what the symmetry holds within.
    """

    lattice: np.ndarray
    atoms: np.ndarray
    orbit: np.ndarray
    symmetry_tol: float

    @property
    def number(self) -> int:
        return int(self.orbit.max()) + 1

    @property
    def multiplicity(self) -> np.ndarray:
        """(orbits) how many atoms of the primitive cell are in each orbit."""
        return np.bincount(self.orbit[self.atoms], minlength=self.number)


def find_orbits(
    lattice: np.ndarray, positions: np.ndarray, species: np.ndarray, symmetry_tol: float = SYMMETRY_TOL
) -> Orbits:
    """The orbits of a crystal under the symmetry that holds within `symmetry_tol`.

    Args:
        lattice: (3,3), Å, rows are the lattice vectors.
        positions: (n,3), Cartesian, Å.
        species: (n) atomic numbers, or (n,k) occupancies: atoms of one orbit have the same.
        symmetry_tol: Å, how far an atom may be from where the symmetry puts it: spglib's `symprec`. 0: every atom is
            an orbit of its own.

    Where spglib finds no symmetry, as with atoms nearer to each other than `symmetry_tol`, every atom is an orbit of
    its own.
    """
    alone = np.arange(len(positions))
    found = _dataset(lattice, positions, species, symmetry_tol) if symmetry_tol > 0 else None
    if found is None:
        return Orbits(lattice, alone, alone, symmetry_tol)
    atoms = np.unique(found.mapping_to_primitive, return_index=True)[1].astype(np.int64)
    orbit = np.unique(_by_first(found.crystallographic_orbits), return_inverse=True)[1].astype(np.int64)
    primitive = _primitive(lattice, found.primitive_lattice, len(positions) // len(atoms))
    return Orbits(primitive, atoms, orbit, symmetry_tol)


def load_spglib() -> ModuleType:
    """spglib, which only crystals with a `symmetry_tol` need."""
    # Else it writes to stderr about tolerances that it tries on the way to its answer.
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    try:
        import spglib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("spglib is missing: install it, or take symmetry_tol=0", name="spglib") from error
    return spglib


def _dataset(lattice: np.ndarray, positions: np.ndarray, species: np.ndarray, symmetry_tol: float) -> Any:
    spglib = load_spglib()
    kinds = np.unique(species, axis=0, return_inverse=True)[1].reshape(len(positions))
    cell: Any = (lattice, np.linalg.solve(lattice.T, positions.T).T, kinds + 1)
    with warnings.catch_warnings():  # of how errors will be told: today None, an exception later
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return spglib.get_symmetry_dataset(cell, symprec=symmetry_tol)
        except spglib.SpglibError:
            return None


def _by_first(labels: np.ndarray) -> np.ndarray:
    """Each label as the place where it stands first."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def _primitive(lattice: np.ndarray, primitive: np.ndarray, cells: int) -> np.ndarray:
    """The primitive lattice, rounded to what it has to be: its vectors are whole `cells`-ths of the crystal's."""
    return np.round(np.linalg.solve(lattice.T, primitive.T).T * cells) / cells @ lattice
