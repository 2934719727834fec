"""Crystals and their targets, from whatever file or folder they are in."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ..common import checks
from .bulk_parsing import parse_all
from .formats import read_table
from .rows import Row, Table, listed, missing
from .samples import DataError, Problem, Samples, first_repeated, writable

log = logging.getLogger("crystalformer.data")


def read_samples(
    path: str | Path,
    targets: Sequence[str] = (),
    *,
    id_column: str | None = None,
    primitive: bool = False,
    strict: bool = False,
    workers: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
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

    A row that cannot be used is not an error but a Problem, in the order of the rows: no id or one that was there
    before, a target that is missing or not a finite number, a file that is missing, a structure that cannot be parsed,
    is not periodic, has no volume, an element beyond californium, or two atoms within 0.01 Å. Deuterium counts as
    hydrogen.
    Each line of a CSV is a row, whatever is in it. A CIF whose atoms are not those of its formula (often hydrogen is
    left out) is kept, and a warning of the logger "crystalformer.data" counts these.

    Args:
        path: a file, a folder, or "jarvis:NAME".
        targets: names of the columns to learn. Numbers are taken as they are: a target that is summed over the cell is
            one of the cell in the file, also with `primitive`.
        id_column: which column has the ids. Otherwise material_id, jid, id, cif_id, mp_id, mpid, entry_id or
            identifier, also uid or name of ase Atoms; else pandas' index; else the row's number from 0. Structures in
            files of their own go by the file's name without its ending, with :0, :1, ... where a file has several.
        primitive: reduces each cell to a primitive one whose copies agree to 0.01 Å.
        strict: raises DataError at the first row that cannot be used.
        workers: processes that parse, as many as there are cores at most, which pays from some ten thousand crystals
            on; 0 parses in this one. A script that uses them needs `if __name__ == "__main__":`.
        cache: a folder that keeps parsed structures, found again by the text they were parsed from; that of
            `build_crystals` can serve both. Needs safetensors.
        progress: called with the number of rows done and of all, now and then.

    Returns:
        The samples that can be used, in the order of the file, and a Problem for each row that cannot.

    Raises:
        DataError: for a missing file, an unknown format, a folder or table without structures, a missing column.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets must be a sequence of names, not the string {targets!r}")
    names = tuple(targets)
    if first_repeated(names) is not None:
        raise ValueError(f"targets must differ, but {first_repeated(names)!r} is there twice")
    checks.check_workers("workers", workers)
    table = read_table(path, names, id_column)
    _check_columns(path, table, names)

    problems: list[Problem] = []

    def report(id: str, row: Row, reason: str) -> None:
        problem = Problem(*map(writable, (id, row.source, reason)))
        if strict:
            raise DataError(str(problem))
        problems.append(problem)

    values = [_values(row.values, names) for row in table.rows]
    reasons = [row.reason or _fault(row.id, x) for row, x in zip(table.rows, values, strict=True)]
    good = [row.structure for row, reason in zip(table.rows, reasons, strict=True) if row.structure and not reason]
    first: dict[str, Row] = {}
    structures, numbers, notes = [], [], []
    with closing(parse_all(good, primitive, workers, cache, progress)) as results:
        for row, reason, row_values in zip(table.rows, reasons, values, strict=True):
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
                elif id in first:
                    report(id, row, f"the same id as {first[id].source}")
                else:
                    first[id] = row
                    structures.append(parsed.structure)
                    numbers.append(row_values)
                    if parsed.note:
                        notes.append(f"{id}: {parsed.note}")
    if notes:
        log.warning("%s: %d of %d CIFs differ from their formulas, first %s", path, len(notes), len(first), notes[0])
    tensor = torch.tensor(numbers, dtype=torch.float64).reshape(len(first), len(names))
    return Samples(tuple(first), tuple(structures), tensor, names), problems


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


def _values(record: Mapping[str, Any], names: Sequence[str]) -> list[float] | str:
    """The targets of a row, or what is wrong with them."""
    values = []
    for name in names:
        value = record.get(name)
        if missing(value):
            return f"{name} is missing"
        try:
            if isinstance(value, bool) or not isinstance(value, str | Real):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            return f"{name} must be a number, not {str(value)[:60]!r}"
        if number in (float("inf"), -float("inf")):
            return f"{name} must be finite, not {value}"
        values.append(number)
    return values
