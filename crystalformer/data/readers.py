"""Crystals and their targets, from whatever file or folder they are in."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ..common import checks
from .bulk_parsing import parse_all
from .forces import FORCES, STRESS, read_forces
from .formats import read_table
from .rows import Row, Table, listed, missing
from .samples import DataError, Problem, Samples, first_repeated, writable

log = logging.getLogger("crystalformer.data")
# As tables of programs have them, pandas' floats beside values that are missing included.
CLASSES = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
CLASSES |= {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # no classes, but problems of their rows alone


def read_samples(
    path: str | Path,
    targets: Sequence[str] = (),
    *,
    id_column: str | None = None,
    forces: bool = False,
    stress: bool = False,
    primitive: bool = False,
    strict: bool = False,
    workers: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
    classes: bool = False,
) -> tuple[Samples, list[Problem]]:
    """Reads crystals with their ids and targets. Needs the extra [data].

    The format is recognised by what `path` is; every file may be packed as .gz, .bz2, .xz or a .zip of one file.

    - CSV (or .tsv) whose first line names the columns, one of them `cif` or `structure` with a CIF, or the JSON of a
      pymatgen Structure, in each cell: CDVAE and exports of many programs.
    - `id_prop.csv`, the folder it is in, or any other CSV without such a column: an id, then one or more numbers, and
      beside it the structures, of CGCNN and ALIGNN. The id is the name of a file or what the name has in its place:
      ID.cif, ID.vasp, ID.poscar, ID.xyz, ID.json, POSCAR-ID, POSCAR-ID.vasp. `targets` name the numbers in order; or a
      first line names the columns, and one of them may be `file`. atom_init.json is not needed.
    - JSON as pandas writes it, orient "split" (Matbench, matminer), "records" or "columns", or one record a line
      (.jsonl): the column `structure` (or `cif`, `atoms`) holds pymatgen dictionaries or CIFs. The MEGNet data sets
      (mp.2018.6.1.json) and lists or dictionaries of pymatgen Structures are such files.
    - JSON of JARVIS, as dft_3d: records with `jid`, `atoms` (lattice_mat, elements, coords, cartesian) and values, of
      which "na" is a missing one. "jarvis:dft_3d" gets the data set by jarvis-tools, if that is installed.
    - extxyz (.extxyz, .xyz): targets from the second line of each frame, `energy` and other results included.
    - ase databases (.db, .json): targets from key-value pairs, data and results.
    - For structures without targets also a CIF, POSCAR (POSCAR*, CONTCAR*, .vasp) or pymatgen JSON, and a folder of
      them. A CIF of several crystals gives them all.

    A target without a value, an empty cell or None, is NaN where another one of its row has a value.

    A row that cannot be used is not an error but a Problem, in the order of the rows: no id or one that was there
    before, no target with a value, one that is no finite number, a file that is missing, a structure that cannot be
    parsed, is not periodic, has no volume, an element beyond californium, or two atoms within 0.01 Å. Deuterium
    counts as hydrogen.
    Each line of a CSV is a row, whatever is in it. A CIF whose atoms are not those of its formula (often hydrogen is
    left out) is kept, and a warning of the logger "crystalformer.data" counts these.

    Args:
        path: a file, a folder, or "jarvis:NAME".
        targets: names of the columns to learn. Numbers are taken as they are: a target that is summed over the cell is
            one of the cell in the file, also with `primitive`.
        id_column: which column has the ids. Otherwise material_id, jid, id, cif_id, mp_id, mpid, entry_id or
            identifier, also uid or name of ase Atoms; else pandas' index; else the row's number from 0. Structures in
            files of their own go by the file's name without its ending, with :0, :1, ... where a file has several.
        forces: read the forces on the atoms, too: (n,3), eV/Å, of extxyz and ase databases, or a column `forces` of
            JSON. A row without them cannot be used. Not with `primitive`, which would lose their atoms.
        stress: with `forces`, read the stress, too: six numbers in ase's order or a matrix, eV/Å³, positive where the
            cell would shrink, as in ase; the sign of VASP is the other one.
        primitive: reduces each cell to a primitive one whose copies agree to 0.01 Å.
        strict: raises DataError at the first row that cannot be used.
        workers: processes that parse, as many as there are cores at most, which pays from some ten thousand crystals
            on; 0 parses in this one. A script that uses them needs `if __name__ == "__main__":`.
        cache: a folder that keeps parsed structures, found again by the text they were parsed from; that of
            `build_crystals` can serve both. Needs safetensors.
        progress: called with the number of rows done and of all, now and then.
        classes: the targets are classes, 0 or 1, true or false, yes or no; they become 0 and 1.

    Returns:
        The samples that can be used, in the order of the file, and a Problem for each row that cannot.

    Raises:
        DataError: for a missing file, an unknown format, a folder or table without structures, a missing column, a
            value that is no class.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be a sequence of names, not the string {targets!r}")
    names = tuple(targets)
    if first_repeated(names) is not None:
        raise ValueError(f"targets must differ, but {first_repeated(names)!r} is there twice")
    checks.check_workers("workers", workers)
    if stress and not forces:
        raise ValueError("forces must be True with stress")
    if primitive and forces:
        raise ValueError("primitive must be False with forces, which are those of the cell's own atoms")
    table = read_table(path, names, id_column)
    of_atoms = (FORCES, STRESS)[: forces + stress]
    _check_columns(path, table, (*names, *of_atoms))

    problems: list[Problem] = []

    def report(id: str, row: Row, reason: str) -> None:
        problem = Problem(*map(writable, (id, row.source, reason)))
        if strict:
            raise DataError(str(problem))
        problems.append(problem)

    values = [_values(row, names, classes) for row in table.rows]
    reasons = [row.reason or _fault(row.id, x) for row, x in zip(table.rows, values, strict=True)]
    known: list[Any] = [read_forces(row.structure, row.values, stress) if forces else () for row in table.rows]
    reasons = [reason or (x if isinstance(x, str) else "") for reason, x in zip(reasons, known, strict=True)]
    good = [row.structure for row, reason in zip(table.rows, reasons, strict=True) if row.structure and not reason]
    first: dict[str, Row] = {}
    structures, numbers, notes, found_forces = [], [], [], []
    with closing(parse_all(good, primitive, workers, cache, progress)) as results:
        for row, reason, row_values, row_forces in zip(table.rows, reasons, values, known, strict=True):
            if reason:
                report(row.id, row, reason)
                continue
            found = next(results)
            if len(found) > 1 and not row.many:
                report(row.id, row, f"the structure must be one crystal, not {len(found)}")
                continue
            for i, parsed in enumerate(found):
                id = row.id if len(found) == 1 else f"{row.id}:{i}"
                if parsed.structure is None:
                    report(id, row, parsed.reason)
                elif forces and len(row_forces[0]) != len(parsed.structure):
                    report(id, row, f"forces must be of {len(parsed.structure)} atoms, not of {len(row_forces[0])}")
                elif id in first:
                    report(id, row, f"the same id as {first[id].source}")
                else:
                    first[id] = row
                    structures.append(parsed.structure)
                    numbers.append(row_values)
                    found_forces.append(row_forces)
                    if parsed.note:
                        notes.append(f"{id}: {parsed.note}")
    if notes:
        log.warning("%s: %d of %d CIFs differ from their formulas, first %s", path, len(notes), len(first), notes[0])
    tensor = torch.tensor(numbers, dtype=torch.float64).reshape(len(first), len(names))
    return Samples(tuple(first), tuple(structures), tensor, names, *zip(*found_forces, strict=True)), problems


def _check_columns(path: str | Path, table: Table, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in table.columns]
    if unknown and not table.columns:
        raise DataError(f"{path}: has structures but no numbers, so no {', '.join(unknown)}")
    if unknown:
        raise DataError(f"{path}: has no column {', '.join(map(repr, unknown))}; it has {listed(table.columns)}")


def _fault(id: str, values: list[float] | str) -> str:
    """What is wrong with a row's id or targets, "" for nothing."""
    if writable(id) != id:
        return "the id must be text that UTF-8 can hold"
    return values if isinstance(values, str) else ""


def _values(row: Row, names: Sequence[str], classes: bool) -> list[float] | str:
    """The targets of a row, NaN where it has no value, or what is wrong with them."""
    values = []
    for name in names:
        value = row.values.get(name)
        if missing(value) and str(value).strip().lower() != "nan":  # which a program may have computed
            values.append(math.nan)
            continue
        number = CLASSES.get(str(value).strip().lower()) if classes else _number(value)
        if number is None:
            wanted = "0 or 1, true or false, yes or no" if classes else "a number"
            reason = f"{name} must be {wanted}, not {str(value)[:60]!r}"
            if classes:  # of another kind: no crystal of it may be left out
                raise DataError(str(Problem(writable(row.id), writable(row.source), writable(reason))))
            return reason
        if not math.isfinite(number):
            return f"{name} must be finite, not {value}"
        values.append(number)
    if names and all(map(math.isnan, values)):
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    return values


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) or not isinstance(value, str | Real) else float(value)
    except (ValueError, OverflowError):
        return None
