"""What ase reads, as rows: its databases, and the frames of (ext)xyz files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.words import one_line
from .files import stem_of
from .parsing import Source, read_xyz, reason_of, require
from .rows import ID_COLUMNS, Row, Table, find_id_column, missing
from .samples import DataError

ATOMS_ID_COLUMNS = (*(x for x in ID_COLUMNS if x != "id"), "uid", "name", "id")


def read_database(path: Path, id_column: str | None) -> Table:
    """The rows of an ase database, with results, data and key-value pairs as values."""
    ase_db = require("ase.db")
    try:
        found = list(ase_db.connect(path).select())
    except Exception as error:
        raise DataError(f"{path}: not an ase database: {reason_of(error)}") from error
    if not found:
        raise DataError(f"{path}: empty")
    atoms = [row.toatoms() for row in found]
    values = [
        {"id": row.id} | _results(x) | dict(row.data) | row.key_value_pairs for row, x in zip(found, atoms, strict=True)
    ]
    columns = list(dict.fromkeys(name for x in values for name in x))
    key = find_id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
    return _of_atoms(path, atoms, values, columns, [x.get(str(key)) for x in values])


def read_frames(path: Path, text: str, id_column: str | None) -> Table:
    """The frames of an (ext)xyz file, one by one: a bad one does not hide the others."""
    lines = re.split(r"\r\n?|\n", text.rstrip())
    atoms: list[Any] = []
    start = 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        number = int(lines[start]) if re.fullmatch(r"\s*[0-9]{1,9}\s*", lines[start]) else None
        if number is None or start + 2 + number > len(lines):
            what = f"{len(lines) - start - 2} atoms of {number}" if number is not None else one_line(lines[start])[:40]
            atoms.append(f"cannot be read from line {start + 1} on: {what!r} where a frame should be")
            break
        frame = "\n".join(lines[start : start + 2 + number]) + "\n"
        start += 2 + number
        try:
            atoms.append(read_xyz(frame))
        except ImportError:
            raise
        except Exception as error:
            atoms.append(reason_of(error))
    if not atoms:
        raise DataError(f"{path}: empty")
    values = [{} if isinstance(x, str) else _results(x) | dict(x.info) for x in atoms]
    columns = list(dict.fromkeys(name for x in values for name in x))
    key = find_id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
    stems = [stem_of(path)] if len(atoms) == 1 else [f"{stem_of(path)}:{i}" for i in range(len(atoms))]
    ids = stems if key is None else [x.get(key, s) for x, s in zip(values, stems, strict=True)]
    return _of_atoms(path, atoms, values, columns, ids)


def _results(atoms: Any) -> dict[str, Any]:
    """What a calculator left with the atoms: energy and the like."""
    return {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}


def _of_atoms(
    path: Path, atoms: Sequence[Any], values: Sequence[Mapping[str, Any]], columns: list[str], ids: Sequence[Any]
) -> Table:
    """Rows of ase Atoms. A string in their place says why they cannot be read."""
    rows = []
    for i, (x, record, id) in enumerate(zip(atoms, values, ids, strict=True)):
        row = Row(f"#{i + 1}" if missing(id) else str(id), f"{path.name}, row {i + 1}", values=record)
        rows.append(row)
        if isinstance(x, str):
            row.reason = x
        elif missing(id):
            row.reason = "no id"
        else:
            row.structure = Source("ase", x)
    return Table(rows, columns)
