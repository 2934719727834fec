"""CSV as rows: with a structure in each, or as id_prop.csv, with files of structures beside it."""

import csv
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .files import unpacked_name
from .parsing import Source
from .records import EXTRA, FILE_COLUMNS, STRUCTURE_COLUMNS, from_records
from .rows import ID_COLUMNS, Part, Table, in_parts, missing
from .samples import DataError
from .structure_files import StructureFiles


def read_csv(path: Path, text: str, targets: Sequence[str], id_column: str | None) -> Table:
    """The rows of a CSV file; `targets` name its columns where the first line does not."""
    header, records, read = _records(path, io.StringIO(text, newline=""), targets, id_column)
    return from_records(list(records), path.name, id_column, header, read)


def stream_csv(path: Path, lines: Iterable[str], id_column: str | None) -> Iterator[Part]:
    """The rows of a CSV file, some at once."""
    header, records, read = _records(path, lines, (), id_column)
    for first, part in in_parts(records):
        yield partial(list, from_records(part, path.name, id_column, header, read, first=first).rows)


def _records(
    path: Path, lines: Iterable[str], targets: Sequence[str], id_column: str | None
) -> tuple[list[str], Iterator[dict[str, Any]], Callable[[str], Source] | None]:
    """Header and records of a table, and what reads the files that it names, if it does."""
    cells = _cells(path, lines)
    first = next(cells, None)
    if first is None:
        raise DataError(f"{path}: empty")
    header, read = first, None
    if not any(name in first for name in STRUCTURE_COLUMNS):
        files = StructureFiles(path.parent)
        read = files.read
        if not _has_names(first, files, id_column):
            header, cells = _names(path, first, targets, id_column), itertools.chain([first], cells)
    header = [name.strip() for name in header]
    for name in targets:
        if header.count(name) > 1:
            raise DataError(f"{path}: has {header.count(name)} columns named {name!r}")
    records = (dict(zip(header, row, strict=False)) | {EXTRA: len(row) - len(header)} for row in cells)
    return header, records, read


def _cells(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    """Of each line that is not empty."""
    delimiter = "\t" if unpacked_name(path.name).lower().endswith(".tsv") else ","
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        try:
            with _long_fields():
                row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: not a CSV table: {error}") from error
        if row is None:
            return
        if row:
            yield row


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


def _names(path: Path, first: list[str], targets: Sequence[str], id_column: str | None) -> list[str]:
    """The columns of id_prop.csv: the id, then one for each target, in their order."""
    if id_column is not None:
        raise DataError(f"{path}: has no column {id_column!r}: its first line does not name the columns")
    number = len(first) - 1
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
