"""Which atoms of crystals are equivalent: of one for the user, of many for the model, kept in a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import checks
from ..geometry.orbits import SYMMETRY_TOL, Orbits, find_orbits, load_spglib
from ..model.structures import Crystal, read_structure
from .store import Item, Store, digest

# Of the orbits in the cache: one more whenever the same settings give others.
ORBITS_FORMAT = 1
# Crystals whose orbits are found, and written, at once: some ten seconds.
CRYSTALS_AT_ONCE = 1 << 12
ARRAYS = ("lattice", "atoms", "orbit")


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
    return _find(read_structure(structure, "structure"), symmetry_tol)


def orbits_of_all(crystals: Sequence[Crystal], symmetry_tol: float, cache: str | Path | None = None) -> list[Orbits]:
    """The orbits of each crystal, found again in the folder `cache` by positions, lattice and species."""
    if cache is None:
        return [_find(x, symmetry_tol) for x in crystals]
    about = {"format": ORBITS_FORMAT, "symmetry_tol": symmetry_tol, "spglib": load_spglib().__version__}
    store = Store(cache, "orbits", about)
    keys = [digest(*(part.tobytes() for part in (x.species, x.positions, x.lattice))) for x in crystals]
    items = store.get(keys)
    missing = {key: x for key, x in zip(keys, crystals, strict=True) if key not in items}
    for start in range(0, len(missing), CRYSTALS_AT_ONCE):
        chunk = list(missing)[start : start + CRYSTALS_AT_ONCE]
        made = [_item(_find(missing[key], symmetry_tol)) for key in chunk]
        store.put(chunk, made)
        items |= zip(chunk, made, strict=True)
    arrays = ({name: items[key][name].numpy() for name in ARRAYS} for key in keys)
    return [Orbits(**found, symmetry_tol=symmetry_tol) for found in arrays]


def _find(crystal: Crystal, symmetry_tol: float) -> Orbits:
    return find_orbits(crystal.lattice, crystal.positions, crystal.species, symmetry_tol)


def _item(found: Orbits) -> Item:
    return {name: torch.from_numpy(getattr(found, name)) for name in ARRAYS}
