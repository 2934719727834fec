"""CSV as rows: with a structure in each, or as id_prop.csv, with files of structures beside it."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import unpacked_name
from .records import EXTRA, FILE_COLUMNS, STRUCTURE_COLUMNS, from_records
from .rows import ID_COLUMNS, Table, missing
from .samples import DataError
from .structure_files import StructureFiles


def read_csv(path: Path, text: str, targets: Sequence[str], id_column: str | None) -> Table:
    """The rows of a CSV file; `targets` name its columns where the first line does not."""
    delimiter = "\t" if unpacked_name(path.name).lower().endswith(".tsv") else ","
    try:
        with _long_fields():
            cells = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV table: {error}") from error
    if not cells:
        raise DataError(f"{path}: empty")
    if any(name in cells[0] for name in STRUCTURE_COLUMNS):
        header, body, read = cells[0], cells[1:], None
    else:
        files = StructureFiles(path.parent)
        read = files.read
        named = _has_names(cells[0], files, id_column)
        header, body = (cells[0], cells[1:]) if named else (_names(path, cells, targets, id_column), cells)
    header = [name.strip() for name in header]
    for name in targets:
        if header.count(name) > 1:
            raise DataError(f"{path}: has {header.count(name)} columns named {name!r}")
    records = []
    for row in body:
        record: dict[str, Any] = dict(zip(header, row, strict=False))
        record[EXTRA] = len(row) - len(header)
        records.append(record)
    return from_records(records, path.name, id_column, header, read)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Cells of any length: a CIF of a large cell is longer than csv's limit."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _has_names(first: list[str], files: StructureFiles, id_column: str | None) -> bool:
    """Whether the first line names the columns, as that of id_prop.csv does not."""
    if first[0] in files:
        return False
    if any(name in (id_column, *ID_COLUMNS, *FILE_COLUMNS) for name in first):
        return True
    return len(first) > 1 and not any(missing(x) or _is_number(x) for x in first[1:])


def _names(path: Path, cells: list[list[str]], targets: Sequence[str], id_column: str | None) -> list[str]:
    """The columns of id_prop.csv: the id, then one for each target, in their order."""
    if id_column is not None:
        raise DataError(f"{path}: has no column {id_column!r}: its first line does not name the columns")
    number = len(cells[0]) - 1
    if targets and number != len(targets):
        raise DataError(
            f"{path}: has {number} columns of numbers without names: targets must name each of them in order, or a "
            f"first line must name them; targets are {', '.join(targets)}"
        )
    return ["id", *(targets or map(str, range(1, number + 1)))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
