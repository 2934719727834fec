"""One crystal of another library as plain arrays, checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.elements import NUM_ELEMENTS
from ..geometry.lattice import FLATTEST

# Shares of a site add up to 1 up to the digits of a file.
MOST_OCCUPIED = 1.001
# Å: fp32 has the coordinates of atoms within it to 0.001 Å.
FARTHEST = 1e4


@dataclass(frozen=True)
class Crystal:
    """Attributes: mixtures, for each site {atomic number: occupancy}; positions (n,3) and lattice (3,3), fp64, Å."""

    mixtures: list[dict[int, float]]
    positions: np.ndarray
    lattice: np.ndarray

    @property
    def numbers(self) -> np.ndarray | None:
        """(n,) atomic numbers, or None if any site is not one whole atom."""
        if any(list(mixture.values()) != [1.0] for mixture in self.mixtures):
            return None
        return np.array([z for mixture in self.mixtures for z in mixture], dtype=np.int64)

    @property
    def species(self) -> np.ndarray:
        """`numbers`, or `occupancies` if there is a mixture."""
        numbers = self.numbers
        return self.occupancies() if numbers is None else numbers

    def occupancies(self) -> np.ndarray:
        """(n,98) the share of each element in each site."""
        result = np.zeros((len(self.mixtures), NUM_ELEMENTS))
        for row, mixture in zip(result, self.mixtures, strict=True):
            for z, occupancy in mixture.items():
                row[z - 1] += occupancy
        return result


def read_structure(structure: Any, name: str) -> Crystal:
    """The crystal that a pymatgen Structure or an ase Atoms holds; `name` names it in errors. A Crystal is itself.

    Raises:
        TypeError: for anything else.
        ValueError: if it is not a crystal, or fp32 cannot hold it: see `CrystalBatch.from_structures`.
    """
    if isinstance(structure, Crystal):
        return structure
    if hasattr(structure, "get_pbc") and hasattr(structure, "get_atomic_numbers"):
        mixtures, positions = _ase_mixtures(structure, name), structure.get_positions()
        lattice, periodic = structure.cell.array, structure.get_pbc()
    elif hasattr(structure, "lattice") and hasattr(structure, "cart_coords"):
        mixtures, positions = _pymatgen_mixtures(structure, name), structure.cart_coords
        lattice, periodic = structure.lattice.matrix, structure.lattice.pbc
    elif hasattr(structure, "cart_coords"):
        raise ValueError(f"{name} must be periodic, not a {type(structure).__name__}")
    else:
        raise TypeError(f"{name} must be a pymatgen Structure or an ase Atoms, not {type(structure).__name__}")
    if not all(periodic):
        raise ValueError(f"{name} must be periodic in all three directions, not pbc={[bool(p) for p in periodic]}")
    positions, lattice = np.array(positions, dtype=np.float64), np.array(lattice, dtype=np.float64)
    check_arrays(positions, lattice, name)
    for site, mixture in enumerate(mixtures):
        if not (all(x >= 0 for x in mixture.values()) and 0 < sum(mixture.values()) <= MOST_OCCUPIED):
            shares = list(mixture.values())
            raise ValueError(f"{name} must have shares from 0 that add up to at most 1, not {shares} in site {site}")
    return Crystal(mixtures, positions, lattice)


def check_arrays(positions: np.ndarray, lattice: np.ndarray, name: str) -> None:
    """Refuses what is no crystal, or what fp32 cannot hold."""
    if not len(positions):
        raise ValueError(f"{name} must have at least one atom, not none")
    for what, x in (("positions", positions), ("lattice", lattice)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must have finite {what}, not {x[~np.isfinite(x)][0]}")
        if np.abs(x).max() > FARTHEST:
            raise ValueError(f"{name} must have {what} within {FARTHEST:g} Å, not {np.abs(x).max():g}")
    edges = np.linalg.norm(lattice, axis=1)
    if not abs(np.linalg.det(lattice)) > FLATTEST * edges.prod():
        raise ValueError(f"{name} must have a volume, but its lattice is {lattice.tolist()}")


def _pymatgen_mixtures(structure: Any, name: str) -> list[dict[int, float]]:
    from pymatgen.core import DummySpecies

    mixtures = []
    for site in structure:
        mixture: dict[int, float] = {}
        for specie, occupancy in site.species.items():
            z = 0 if isinstance(specie, DummySpecies) else specie.Z
            _check_element(z, str(specie), name)
            mixture[z] = mixture.get(z, 0.0) + float(occupancy)
        mixtures.append(mixture)
    return mixtures


def _ase_mixtures(atoms: Any, name: str) -> list[dict[int, float]]:
    from ase.data import atomic_numbers, chemical_symbols

    # ase's CIF reader keeps the occupancies of disordered sites by kind.
    occupancy, kinds = atoms.info.get("occupancy"), atoms.arrays.get("spacegroup_kinds")
    if occupancy is None or kinds is None:
        mixtures = [{int(z): 1.0} for z in atoms.get_atomic_numbers()]
    else:
        by_kind = {str(kind): mixture for kind, mixture in occupancy.items()}
        mixtures = []
        for i, (symbol, kind) in enumerate(zip(atoms.get_chemical_symbols(), kinds, strict=True)):
            mixture = by_kind.get(str(kind), {})
            # Atoms that were replaced or added since the file was read.
            if symbol not in mixture:
                raise ValueError(
                    f"{name} must have each atom's element in its site of info['occupancy'], but atom {i} is {symbol} "
                    f"and its site is {mixture}"
                )
            mixtures.append({atomic_numbers[s]: float(x) for s, x in mixture.items()})
    for mixture in mixtures:
        for z in mixture:
            _check_element(z, chemical_symbols[z] if 0 <= z < len(chemical_symbols) else str(z), name)
    return mixtures


def _check_element(z: int, symbol: str, name: str) -> None:
    if not 1 <= z <= NUM_ELEMENTS:
        raise ValueError(f"{name} must be of the elements 1 (H) to {NUM_ELEMENTS} (Cf), not {symbol}")
