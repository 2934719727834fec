"""A structure from the text or dictionary that holds it, checked."""

import importlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..common.words import one_line
from ..model.structures import Crystal, read_structure

# Atoms nearer than this, in Å, are one atom that is there twice.
CLOSEST = 0.01
# Volume of an atom, in Å³, below which a structure is refused: hydrogen at the pressures of planets has more than 1.
# The number of images grows with the density.
DENSEST = 0.1
# How far apart, in Å, the sites of two copies of a primitive cell may be. pymatgen's 0.25 would average away
# distortions that energies depend on.
PRIMITIVE_TOLERANCE = 0.01
# The most characters that are said of one structure.
LONGEST = 300


@dataclass(frozen=True)
class Source:
    """What a structure is read from: kind "cif" or "poscar" with a text, "dict" of pymatgen or JARVIS, "ase" Atoms,
    "frame" with the lines of extxyz, "row" of an ase database."""

    kind: str
    content: Any


@dataclass(frozen=True)
class Parsed:
    """A structure, or None and the reason. `note` says what is doubtful about a structure."""

    structure: Any
    reason: str = ""
    note: str = ""


def reason_of(error: Exception) -> str:
    """What is wrong with a row or a file, by an error of any library."""
    return one_line(error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", LONGEST)


def require(module: str) -> ModuleType:
    """A module of pymatgen or ase; what to install, if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading structures needs {module}: pip install 'crystalformer[data]'") from error


def parse(source: Source, primitive: bool = False) -> list[Parsed]:
    """The structures of a source: one, or several blocks of a CIF; never an exception."""
    try:
        # pymatgen warns of each rounded 0.3333 and each missing symmetry; what is doubtful comes as a note.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _READERS[source.kind](source.content)
            return [x if x.structure is None else _checked(x, primitive) for x in found]
    except ImportError:
        raise
    except Exception as error:  # parsers of other libraries raise errors of any type on bad files
        return [Parsed(None, reason_of(error))]


def _cif(text: str) -> list[Parsed]:
    CifParser = require("pymatgen.io.cif").CifParser
    if not text.strip():
        raise ValueError("the CIF is empty")
    # Block by block: pymatgen drops blocks that fail, and all but the last of those with one name.
    blocks = re.split(r"^[ \t\r]*data_", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    if not blocks:
        raise ValueError("not a CIF: it has no data_ block")
    # Files of publications have blocks without a crystal.
    blocks = [x for x in blocks if re.search(r"^[ \t\r]*_atom_site_(fract|cartn)_x", x, re.MULTILINE | re.IGNORECASE)]
    if not blocks:
        raise ValueError("the CIF has no atoms: no block has _atom_site_fract_x")
    result = []
    for block in blocks:
        try:
            parser = CifParser.from_str(f"data_{block}", check_cif=False)
            (structure,) = parser.parse_structures(primitive=False, on_error="raise")
            result.append(Parsed(structure, note=one_line(parser.check(structure) or "", LONGEST)))
        except Exception as error:
            reason = reason_of(error).removeprefix("No structure parsed for section 1 in CIF. ")
            result.append(Parsed(None, f"the CIF cannot be parsed: {reason}"))
    return result


def _poscar(text: str) -> list[Parsed]:
    poscar = require("pymatgen.io.vasp").Poscar.from_str(text)
    if not poscar.true_names:
        raise ValueError("the POSCAR does not name its elements")
    return [Parsed(poscar.structure)]


def _dict(content: dict[str, Any]) -> list[Parsed]:
    Structure = require("pymatgen.core").Structure
    if "lattice_mat" in content:
        lattice, species, coords = (content[name] for name in ("lattice_mat", "elements", "coords"))
        return [Parsed(Structure(lattice, species, coords, coords_are_cartesian=bool(content.get("cartesian"))))]
    if {"lattice", "species", "frac_coords"} <= content.keys():
        return [Parsed(Structure(content["lattice"], content["species"], content["frac_coords"]))]
    if "sites" not in content:
        raise ValueError(f"neither a pymatgen Structure nor JARVIS atoms, but with the keys {', '.join(content)}")
    if "lattice" not in content:
        raise ValueError("not periodic: it has no lattice")
    return [Parsed(Structure.from_dict(content))]


_READERS: dict[str, Callable[[Any], list[Parsed]]] = {
    "cif": _cif,
    "poscar": _poscar,
    "dict": _dict,
    "ase": lambda atoms: [Parsed(atoms)],
    "frame": lambda lines: [Parsed(read_xyz("\n".join(lines) + "\n"))],
    "row": lambda row: [Parsed(row.toatoms())],
}


def read_xyz(frame: str) -> Any:
    """The ase Atoms of one frame of an (ext)xyz file."""
    return require("ase.io").read(io.StringIO(frame), format="extxyz")


def _checked(parsed: Parsed, primitive: bool) -> Parsed:
    """Refuses what the model would refuse, atoms that are there twice, and cells too small for what they hold."""
    try:
        crystal = read_structure(parsed.structure, "the structure")
        check_spacing(crystal)
        if not primitive:
            return parsed
        return Parsed(_primitive(parsed.structure, crystal), note=parsed.note)
    except Exception as error:
        return Parsed(None, reason_of(error))


def check_spacing(crystal: Crystal) -> None:
    """Refuses atoms that are there twice, and cells too small for what they hold."""
    volume = abs(float(np.linalg.det(crystal.lattice))) / len(crystal.positions)
    if volume < DENSEST:
        raise ValueError(f"the structure must have at least {DENSEST:g} Å³ an atom, not {volume:.3g}")
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    for first in range(0, len(fractional), 256):
        apart = fractional[first : first + 256, None] - fractional
        # The nearest image of an atom this close, if not of others.
        distance2 = np.square((apart - np.round(apart)) @ crystal.lattice).sum(-1)
        distance2[np.arange(len(apart)), first + np.arange(len(apart))] = np.inf
        i, j = np.unravel_index(distance2.argmin(), distance2.shape)
        if distance2[i, j] < CLOSEST**2:
            distance = float(np.sqrt(distance2[i, j]))
            raise ValueError(f"the structure has atoms {first + i} and {j} at one place, {distance:.4f} Å apart")


def _primitive(structure: Any, crystal: Crystal) -> Any:
    if not hasattr(structure, "get_primitive_structure"):
        from pymatgen.core import Element, Structure

        species = [{Element.from_Z(z): x for z, x in mixture.items()} for mixture in crystal.mixtures]
        structure = Structure(crystal.lattice, species, crystal.positions, coords_are_cartesian=True)
    return structure.get_primitive_structure(tolerance=PRIMITIVE_TOLERANCE)
