"""JSON as rows: structures, records, and the data frames of pandas, Matbench, MEGNet and JARVIS."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common.user_files import parse_json
from .ase_tables import read_database
from .files import stem_of, unpacked_name
from .parsing import Source, reason_of
from .records import STRUCTURE_COLUMNS, from_records
from .rows import Part, Row, Table, find_id_column, in_parts, listed
from .samples import DataError


def read_json(path: Path, text: str, id_column: str | None) -> Table:
    """The rows of a JSON file, whichever of these it is."""
    try:
        if unpacked_name(path.name).lower().endswith(".jsonl"):
            found = [parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            found = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file: {reason_of(error)}") from error
    if isinstance(found, dict):
        if "sites" in found or "lattice_mat" in found:
            return Table([Row(stem_of(path), path.name, Source("dict", found))], [])
        if {"columns", "data"} <= set(found):
            return _split_frame(path, found, id_column)
        if {"ids", "nextid"} <= set(found):
            return read_database(path, id_column)
        if any(name in found for name in STRUCTURE_COLUMNS):
            return _column_frame(path, found, id_column)
        if found and all(isinstance(x, dict) for x in found.values()):
            found, index = list(found.values()), list(found)
            return _entries(path, found, id_column, index)
        raise DataError(f"{path}: must be JSON of structures or records with structures; it has {listed(found)}")
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise DataError(f"{path}: must be JSON of structures or records with structures, not {type(found).__name__}")
    if not found:
        raise DataError(f"{path}: empty")
    return _entries(path, found, id_column)


def stream_json_lines(path: Path, lines: Iterable[str], id_column: str | None) -> Iterator[Part]:
    """The rows of a file with a record or a structure in each line, some at once.

    The first of these parts say which columns there are. A line that cannot be read is a bad row.
    """
    columns = None
    for first, part in in_parts(line for line in lines if line.strip()):
        if columns is None:
            records, _ = _parsed(part)
            bare = _bare(records)
            columns = ["structure"] if bare else list(dict.fromkeys(key for record in records for key in record))
            find_id_column(columns, id_column, path.name, ())
        yield partial(_rows_of_lines, path, part, first, columns, bare, id_column)
    if columns is None:
        raise DataError(f"{path}: empty")


def _rows_of_lines(
    path: Path, lines: Sequence[str], first: int, columns: Sequence[str], bare: bool, id_column: str | None
) -> list[Row]:
    records, reasons = _parsed(lines)
    index = None
    if bare:
        index = [f"{stem_of(path)}:{first + i}" for i in range(len(records))]
        records = [{"structure": record} for record in records]
    rows = from_records(records, path.name, id_column, columns, index=index, first=first).rows
    for i, reason in reasons.items():
        rows[i].structure, rows[i].reason = None, reason
    return rows


def _parsed(lines: Sequence[str]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The record of each line, an empty one where it cannot be read, and why that is."""
    records, reasons = list[dict[str, Any]](), dict[int, str]()
    for i, line in enumerate(lines):
        record: Any = {}
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(f"must be a dictionary, not {type(record).__name__}")
        except ValueError as error:
            record, reasons[i] = {}, f"the line is no record in JSON: {reason_of(error)}"
        records.append(record)
    return records, reasons


def _bare(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are structures, not records with a structure in each."""
    return any("sites" in x or "lattice_mat" in x for x in records)


def _entries(path: Path, found: list[Any], id_column: str | None, index: list[str] | None = None) -> Table:
    """Records, or bare structures, which are records of nothing else."""
    if _bare(found):
        index = index or [f"{stem_of(path)}:{i}" for i in range(len(found))]
        found = [{"structure": x} for x in found]
    return from_records(found, path.name, id_column, index=index)


def _split_frame(path: Path, found: Mapping[str, Any], id_column: str | None) -> Table:
    """pandas' orient "split", Matbench and matminer."""
    columns, data = list(map(str, found["columns"])), found["data"]
    if not isinstance(data, list) or any(not isinstance(row, list) or len(row) != len(columns) for row in data):
        raise DataError(f"{path}: data must be rows of {len(columns)} values, as columns")
    index = found.get("index")
    if index is not None and len(index) != len(data):
        raise DataError(f"{path}: index must be {len(data)} ids, as data, not {len(index)}")
    records = [dict(zip(columns, row, strict=True)) for row in data]
    return from_records(records, path.name, id_column, columns, index=index)


def _column_frame(path: Path, found: Mapping[str, Any], id_column: str | None) -> Table:
    """pandas' orient "columns", the default of to_json; or one record."""
    place = next(name for name in STRUCTURE_COLUMNS if name in found)
    if not isinstance(found[place], dict) or "sites" in found[place] or "lattice_mat" in found[place]:
        return from_records([found], path.name, id_column, index=[stem_of(path)])
    if not all(isinstance(column, dict) for column in found.values()):
        raise DataError(f"{path}: must be columns with a value for each index, as pandas writes them")
    index = list(found[place])
    records = [{name: column.get(i) for name, column in found.items()} for i in index]
    return from_records(records, path.name, id_column, list(found), index=index)


def read_jarvis(path: str, id_column: str | None) -> Table:
    """A data set of JARVIS, by jarvis-tools; its records are those of the JSON file."""
    try:
        from jarvis.db.figshare import data
    except ImportError as error:
        raise DataError(
            f"{path}: needs jarvis-tools (pip install jarvis-tools); or download the data set and give its JSON file"
        ) from error
    try:
        found = list(data(path.removeprefix("jarvis:")))
    except Exception as error:
        raise DataError(f"{path}: jarvis-tools cannot get it: {reason_of(error)}") from error
    return from_records(found, path, id_column)
