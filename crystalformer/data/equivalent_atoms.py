"""Which atoms of a structure are equivalent, for users."""

from typing import Any

from ..common import checks
from ..geometry.orbits import SYMMETRY_TOL, Orbits, find_orbits
from ..model.structures import read_structure


def equivalent_atoms(structure: Any, symmetry_tol: float = SYMMETRY_TOL) -> Orbits:
    """The orbits of a crystal's atoms under its space group: atoms of one orbit have the same features in every block.

    Args:
        structure: a pymatgen Structure or an ase Atoms. Sites of one orbit have the same species and occupancies.
        symmetry_tol: Å, how far an atom may be from where the symmetry puts it: spglib's `symprec`. 0: every atom is
            an orbit of its own.

    Returns:
        Orbits: `orbit` (n), of each atom of the structure, and the primitive cell.

    Raises:
        TypeError, ValueError: as `CrystalBatch.from_structures`.
        ModuleNotFoundError: without spglib, unless symmetry_tol is 0.
    """
    symmetry_tol = checks.check_number("symmetry_tol", symmetry_tol, closed=True)
    crystal = read_structure(structure, "structure")
    return find_orbits(crystal.lattice, crystal.positions, crystal.species, symmetry_tol)
