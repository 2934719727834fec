"""Structures from the texts and dictionaries that hold them: checked, in many processes, kept in a cache."""

import importlib
import io
import json
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .. import __version__ as version
from .store import Item, Store, digest
from .structures import Crystal, read_structure

# Atoms nearer than this, in Å, are one atom that is there twice.
CLOSEST = 0.01
# How far apart, in Å, the sites of two copies of a primitive cell may be. pymatgen's 0.25 would average away
# distortions that energies depend on.
PRIMITIVE_TOLERANCE = 0.01
# Of the structures in the cache: one more whenever the same text gives another structure, or other tensors.
STRUCTURE_FORMAT = 1
CHUNK = 64


@dataclass(frozen=True)
class Source:
    """What a structure is read from: kind "cif" or "poscar" with a text, "dict" of pymatgen or JARVIS, "ase" Atoms."""

    kind: str
    content: Any


@dataclass(frozen=True)
class Parsed:
    """A structure, or None and the reason. `note` says what is doubtful about a structure."""

    structure: Any
    reason: str = ""
    note: str = ""


def one_line(error: BaseException | str) -> str:
    """The message of an error in one line of bounded length."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


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
    except Exception as error:  # parsers of other libraries raise anything on bad files
        return [Parsed(None, one_line(error))]


def parse_all(
    sources: Sequence[Source],
    primitive: bool,
    workers: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Generator[list[Parsed], None, None]:
    """`parse` of each source, in order, by so many processes (0: in this one), but what the cache holds."""
    store, keys = None, [b""] * len(sources)
    found: dict[bytes, Item] = {}
    if cache is not None:
        store, keys = _store(cache, primitive), [_key(source) for source in sources]
        found = store.get([key for key in keys if key])
    missing = [source for source, key in zip(sources, keys, strict=True) if key not in found]
    fresh: dict[bytes, Item] = {}
    results = _run(missing, primitive, workers)
    try:
        for i, key in enumerate(keys):
            if key in found:
                result = [_restored(found[key])]
            else:
                result = next(results)
                if key and (item := _item(result)) is not None:
                    fresh[key] = item
            if progress is not None and (i % CHUNK == CHUNK - 1 or i == len(keys) - 1):
                progress(i + 1, len(keys))
            yield result
    finally:
        results.close()
        # What was parsed is kept, even if the work ends early.
        if store is not None and fresh:
            store.put(list(fresh), list(fresh.values()))


def _run(sources: Sequence[Source], primitive: bool, workers: int) -> Generator[list[Parsed], None, None]:
    if not workers or len(sources) <= CHUNK:
        for source in sources:
            yield parse(source, primitive)
        return
    # Not forked: the threads of torch and BLAS do not survive it.
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from executor.map(parse, sources, repeat(primitive), chunksize=CHUNK)
    finally:
        executor.shutdown(cancel_futures=True)


# One structure --------------------------------------------------------------------------------------------------------


def _cif(text: str) -> list[Parsed]:
    CifParser = require("pymatgen.io.cif").CifParser
    if not text.strip():
        raise ValueError("the CIF is empty")
    # Block by block: pymatgen drops blocks that fail, and all but the last of those with one name.
    blocks = re.split(r"^\s*data_", text, flags=re.MULTILINE | re.IGNORECASE)[1:]
    if not blocks:
        raise ValueError("not a CIF: it has no data_ block")
    # Files of publications have blocks without a crystal.
    blocks = [x for x in blocks if re.search("^\\s*_atom_site_(fract|cartn)_x", x, re.MULTILINE | re.IGNORECASE)]
    if not blocks:
        raise ValueError("the CIF has no atoms: no block has _atom_site_fract_x")
    result = []
    for block in blocks:
        try:
            parser = CifParser.from_str(f"data_{block}", check_cif=False)
            (structure,) = parser.parse_structures(primitive=False, on_error="raise")
            result.append(Parsed(structure, note=one_line(parser.check(structure) or "")))
        except Exception as error:
            reason = one_line(error).removeprefix("No structure parsed for section 1 in CIF. ")
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
}


def read_xyz(frame: str) -> Any:
    """The ase Atoms of one frame of an (ext)xyz file."""
    return require("ase.io").read(io.StringIO(frame), format="extxyz")


def _checked(parsed: Parsed, primitive: bool) -> Parsed:
    """Refuses what the model would refuse, and atoms that are there twice."""
    try:
        crystal = read_structure(parsed.structure, "the structure")
        _check_distances(crystal)
        if not primitive:
            return parsed
        return Parsed(_primitive(parsed.structure, crystal), note=parsed.note)
    except Exception as error:
        return Parsed(None, one_line(error))


def _check_distances(crystal: Crystal) -> None:
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


# The cache ------------------------------------------------------------------------------------------------------------


def _store(folder: str | Path, primitive: bool) -> Store:
    from importlib.metadata import version as version_of

    settings = {"format": STRUCTURE_FORMAT, "crystalformer": version, "pymatgen": version_of("pymatgen")}
    return Store(folder, "structures", settings | {"primitive": primitive})


def _key(source: Source) -> bytes:
    """The key of what takes time to parse, b"" for the rest."""
    return b"" if source.kind == "ase" else digest(source.kind, json.dumps(source.content))


def _item(parsed: list[Parsed]) -> Item | None:
    """The tensors of one structure, if it comes back from them as it is."""
    if len(parsed) != 1 or parsed[0].structure is None or not hasattr(parsed[0].structure, "frac_coords"):
        return None
    structure = parsed[0].structure
    kinds: dict[str, int] = {}
    sites = [kinds.setdefault(json.dumps(site.species.as_dict()), len(kinds)) for site in structure]
    text = json.dumps([list(kinds), sites, structure.labels, parsed[0].note])
    item = {
        "coords": torch.from_numpy(np.array(structure.frac_coords, dtype=np.float64)),
        "lattice": torch.from_numpy(np.array(structure.lattice.matrix, dtype=np.float64)),
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }
    again = _restored(item).structure
    same = (
        np.array_equal(again.cart_coords, structure.cart_coords)
        and again.lattice == structure.lattice
        and again.site_properties == structure.site_properties
        and all(a.species == b.species for a, b in zip(again, structure, strict=True))
    )
    return item if same else None


def _restored(item: Item) -> Parsed:
    from pymatgen.core import Composition, Structure

    kinds, sites, labels, note = json.loads(item["text"].numpy().tobytes())
    species = [Composition(json.loads(kind)) for kind in kinds]
    coords, lattice = item["coords"].numpy().copy(), item["lattice"].numpy().copy()
    return Parsed(Structure(lattice, [species[i] for i in sites], coords, labels=labels), note=note)
