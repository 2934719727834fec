"""What ase reads, as rows: its databases, and the frames of (ext)xyz files."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common.words import one_line
from .files import stem_of
from .parsing import Source, read_xyz, reason_of, require
from .quick_parsing import names_in, value_in
from .rows import ID_COLUMNS, ROWS_AT_ONCE, Part, Row, Table, find_id_column, in_parts, missing
from .samples import DataError

ATOMS_ID_COLUMNS = (*(x for x in ID_COLUMNS if x != "id"), "uid", "name", "id")


def read_database(path: Path, id_column: str | None) -> Table:
    """The rows of an ase database, with results, data and key-value pairs as values."""
    found = _selected(path)
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
    atoms: list[Any] = []
    for frame in _frames(re.split(r"\r\n?|\n", text.rstrip())):
        if isinstance(frame, str):
            atoms.append(frame)
            break
        try:
            atoms.append(read_xyz("\n".join(frame) + "\n"))
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


def _frames(lines: Iterable[str]) -> Iterator[list[str] | str]:
    """The lines of each frame. Where none is, the last item says so: what follows cannot be told apart."""
    numbered = enumerate((line.rstrip("\r\n") for line in lines), 1)
    for place, line in numbered:
        if not line.strip():
            continue
        number = int(line) if re.fullmatch(r"\s*[0-9]{1,9}\s*", line) else None
        frame = [line]
        if number is not None:
            frame += (x for _, x in itertools.islice(numbered, number + 1))
        if number is None or len(frame) < number + 2:
            what = f"{len(frame) - 2} atoms of {number}" if number is not None else one_line(line)[:40]
            yield f"cannot be read from line {place} on: {what!r} where a frame should be"
            return
        yield frame


# As streams -----------------------------------------------------------------------------------------------------------


def stream_frames(path: Path, lines: Iterable[str], id_column: str | None) -> Iterator[Part]:
    """The rows of an (ext)xyz file, some at once; the first of them say which columns there are."""
    key, alone, first = None, False, -1
    for first, part in in_parts(_frames(lines)):
        if first == 0:
            frames = [frame for frame in part if not isinstance(frame, str)]
            columns = dict.fromkeys(name for x in frames for name in _of_comment(names_in, x, otherwise=()))
            key = find_id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
            alone = len(part) == 1
        yield partial(_rows_of_frames, path, part, first, key, alone)
    if first < 0:
        raise DataError(f"{path}: empty")


def _rows_of_frames(
    path: Path, frames: Sequence[list[str] | str], first: int, key: str | None, alone: bool
) -> list[Row]:
    rows = []
    for i, frame in enumerate(frames, first):
        stem = stem_of(path) if alone else f"{stem_of(path)}:{i}"
        if isinstance(frame, str):
            rows.append(_row(path, i, stem, None, reason=frame))
        else:
            id = stem if key is None else _of_comment(value_in, frame, key, stem, otherwise=stem)
            rows.append(_row(path, i, id, Source("frame", frame)))
    return rows


def _of_comment(function: Callable[..., Any], *arguments: Any, otherwise: Any) -> Any:
    """What a function finds in a comment; something else if it cannot be read: then the frame cannot be either."""
    try:
        return function(*arguments)
    except ImportError:
        raise
    except Exception:  # ase's parser raises errors of any type
        return otherwise


def stream_database(path: Path, id_column: str | None) -> Iterator[Part]:
    """The rows of an ase database, some at once; the first of them say which columns there are."""
    number = _asked(path, lambda database: database.count())
    if not number:
        raise DataError(f"{path}: empty")
    columns = dict.fromkeys(name for row in _selected(path, limit=ROWS_AT_ONCE) for name in _values(row))
    key = find_id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
    for start in range(0, number, ROWS_AT_ONCE):
        yield partial(_rows_of_database, path, start, key)


def _rows_of_database(path: Path, start: int, key: str | None) -> list[Row]:
    found = _selected(path, limit=ROWS_AT_ONCE, offset=start)
    return [_row(path, i, _values(x).get(str(key)), Source("row", x)) for i, x in enumerate(found, start)]


def _values(row: Any) -> dict[str, Any]:
    """What may be the id of a row of a database."""
    return {"id": row.id} | dict(row.data) | row.key_value_pairs


def _selected(path: Path, **limits: int) -> list[Any]:
    return _asked(path, lambda database: list(database.select(**limits)))


def _asked(path: Path, question: Callable[[Any], Any]) -> Any:
    """What a database answers."""
    connect = require("ase.db").connect
    try:
        with connect(path) as database:  # else ase opens the file for each row
            return question(database)
    except Exception as error:
        raise DataError(f"{path}: not an ase database: {reason_of(error)}") from error


def _results(atoms: Any) -> dict[str, Any]:
    """What a calculator left with the atoms: energy and the like."""
    return {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}


def _of_atoms(
    path: Path, atoms: Sequence[Any], values: Sequence[Mapping[str, Any]], columns: list[str], ids: Sequence[Any]
) -> Table:
    """Rows of ase Atoms. A string in their place says why they cannot be read."""
    rows = []
    for i, (x, record, id) in enumerate(zip(atoms, values, ids, strict=True)):
        source, reason = (None, x) if isinstance(x, str) else (Source("ase", x), "")
        rows.append(_row(path, i, id, source, record, reason))
    return Table(rows, columns)


def _row(
    path: Path, number: int, id: Any, source: Source | None, values: Mapping[str, Any] | None = None, reason: str = ""
) -> Row:
    """A row, bad if it has a reason or no id."""
    if missing(id) and not reason:
        source, reason = None, "no id"
    name = f"#{number + 1}" if missing(id) else str(id)
    return Row(name, f"{path.name}, row {number + 1}", source, values or {}, reason=reason)
