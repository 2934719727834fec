"""Structures of the usual forms as plain arrays, without the objects of pymatgen and ase, which take three to five
times as long.

What is not of a usual form is None, and left to those libraries.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..common.elements import SYMBOLS
from ..model.structures import Crystal, check_arrays
from .parsing import Source, check_spacing, require

# Of the second line of a frame of extxyz: name=text or name="any text".
ITEM = r'([A-Za-z_][\w-]*)=(?:([^\s"\'\\{}\[\]=,]+)|"([^"\\,]+)")(?:\s+|$)'
TRUE = {"T", "True", "true", "TRUE", "1"}
NUMBERS = {symbol: z for z, symbol in enumerate(SYMBOLS, 1)}


def quick_crystal(source: Source) -> Crystal | None:
    """The crystal that `parse` would read from a source, if it is of a usual form and has nothing wrong."""
    try:
        read = _READERS.get(source.kind)
        return None if read is None else read(source.content)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def names_in(frame: Sequence[str]) -> Iterable[str]:
    """The names of the values in the second line of a frame of extxyz."""
    usual = _texts(frame)
    return _ase_values(frame[1].strip()) if usual is None else usual


def value_in(frame: Sequence[str], name: str, default: Any) -> Any:
    """A value in that line as ase understands it: a number, if it is one."""
    usual = _texts(frame)
    if usual is None:
        return _ase_values(frame[1].strip()).get(name, default)
    return _ase_values(f'{name}="{usual[name]}"')[name] if name in usual else default


def _texts(frame: Sequence[str]) -> dict[str, str] | None:
    """The values in that line as text, if all are of the usual form."""
    line = frame[1].strip()
    if re.fullmatch(f"({ITEM})*", line) is None:
        return None
    return {name: quoted or text for name, text, quoted in re.findall(ITEM, line)}


def _ase_values(line: str) -> dict[str, Any]:
    return require("ase.io.extxyz").key_val_str_to_dict(line)


def _crystal(numbers: Sequence[int], positions: Any, lattice: Any) -> Crystal:
    """Checked, of whole atoms."""
    shape = (len(numbers), 3)
    positions, lattice = (np.array(x, dtype=np.float64) for x in (positions, lattice))
    if positions.shape != shape or lattice.shape != (3, 3):
        raise ValueError("positions or lattice are not of three directions")
    check_arrays(positions, lattice, "the structure")
    crystal = Crystal([{z: 1.0} for z in numbers], positions, lattice)
    check_spacing(crystal)
    return crystal


def _frame(frame: Sequence[str]) -> Crystal | None:
    comment = _texts(frame)
    if comment is None:
        return None
    columns = comment["Properties"].split(":")
    # Other columns may say something else of the species: their numbers, or what occupies their sites.
    if columns[:6] != ["species", "S", "1", "pos", "R", "3"] or {"Z", "numbers", "spacegroup_kinds"} & {*columns}:
        return None
    if not {*comment.get("pbc", "T").split()} <= TRUE:
        return None
    atoms = [line.split() for line in frame[2:]]
    if min(map(len, atoms)) < sum(map(int, columns[2::3])):
        return None
    lattice = [float(x) for x in comment["Lattice"].split()]
    positions = [[float(x), float(y), float(z)] for _, x, y, z, *_ in atoms]
    return _crystal([NUMBERS[atom[0]] for atom in atoms], positions, np.reshape(lattice, (3, 3)))


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
