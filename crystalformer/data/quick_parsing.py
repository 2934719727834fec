"""Structures of the usual forms as plain arrays, without the objects of pymatgen and ase, which take ten times as long.

What is not of a usual form is None, and left to those libraries.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..common.elements import SYMBOLS
from ..model.structures import Crystal, check_crystal
from .parsing import Source, check_spacing, require

NUMBERS = {symbol: z for z, symbol in enumerate(SYMBOLS, 1)}


def quick_crystal(source: Source) -> Crystal | None:
    """The crystal that `parse` would read from a source, if it is of a usual form and has nothing wrong."""
    try:
        read = _READERS.get(source.kind)
        return None if read is None else read(source.content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def comment_of(frame: Sequence[str]) -> dict[str, Any]:
    """The values in the second line of a frame of extxyz, as ase understands them."""
    return require("ase.io.extxyz").key_val_str_to_dict(frame[1].strip())


def _crystal(numbers: Sequence[int], positions: Any, lattice: Any) -> Crystal:
    """Checked, of whole atoms."""
    shape = (len(numbers), 3)
    positions, lattice = (np.array(x, dtype=np.float64) for x in (positions, lattice))
    if positions.shape != shape or lattice.shape != (3, 3):
        raise ValueError("positions or lattice are not of three directions")
    crystal = Crystal([{z: 1.0} for z in numbers], positions, lattice)
    check_crystal(crystal, "the structure")
    check_spacing(crystal)
    return crystal


def _frame(frame: Sequence[str]) -> Crystal | None:
    comment = comment_of(frame)
    columns = comment["Properties"].split(":")
    # Other columns may say something else of the species: their numbers, or what occupies their sites.
    if columns[:6] != ["species", "S", "1", "pos", "R", "3"] or {"Z", "numbers", "spacegroup_kinds"} & {*columns}:
        return None
    if not np.all(comment.get("pbc", True)):
        return None
    atoms = [line.split() for line in frame[2:]]
    if min(map(len, atoms)) < sum(map(int, columns[2::3])):
        return None
    positions = [[float(x), float(y), float(z)] for _, x, y, z, *_ in atoms]
    return _crystal([NUMBERS[atom[0]] for atom in atoms], positions, comment["Lattice"].T)


def _dict(content: dict[str, Any]) -> Crystal | None:
    if "lattice_mat" in content:
        symbols, coords, lattice = content["elements"], content["coords"], content["lattice_mat"]
        fractional = not content.get("cartesian")
    elif "frac_coords" in content:
        symbols, coords, lattice, fractional = content["species"], content["frac_coords"], content["lattice"], True
    else:
        if not all(content["lattice"].get("pbc", (True,))):
            return None
        sites, lattice, fractional = content["sites"], content["lattice"]["matrix"], True
        coords, symbols = [site["abc"] for site in sites], [_symbol(site["species"]) for site in sites]
    coords = np.array(coords, dtype=np.float64)
    return _crystal([NUMBERS[x] for x in symbols], coords @ np.array(lattice) if fractional else coords, lattice)


def _symbol(species: Sequence[dict[str, Any]]) -> str:
    (specie,) = species
    if specie["occu"] != 1:
        raise ValueError("a mixture")
    return str(specie["element"])


def _row(row: Any) -> Crystal | None:
    if not all(row.pbc) or row.numbers.min() < 1 or row.numbers.max() > len(SYMBOLS):
        return None
    return _crystal(row.numbers.tolist(), row.positions, row.cell)


_READERS: dict[str, Callable[[Any], Crystal | None]] = {"frame": _frame, "dict": _dict, "row": _row}
