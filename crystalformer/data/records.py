"""Records as rows: each is a dictionary with a structure, or with the name of its file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..common.user_files import parse_json
from .parsing import Source, reason_of
from .rows import ID_COLUMNS, Row, Table, find_id_column, listed, missing
from .samples import DataError

STRUCTURE_COLUMNS = ("cif", "structure", "atoms")
FILE_COLUMNS = ("file", "filename", "file_name", "path")
# A key that no column has: cells beyond the first line's.
EXTRA = "\0extra"


def from_records(
    records: Sequence[Mapping[str, Any]],
    name: str,
    id_column: str | None,
    columns: Iterable[str] | None = None,
    read: Callable[[str], Source] | None = None,
    index: Sequence[Any] | None = None,
    first: int = 0,
) -> Table:
    """The rows of records with a structure each, or with the name of a file each that `read` reads.

    Args:
        first: number of the first record, where they are not all of the table.
    """
    if columns is None:
        columns = dict.fromkeys(key for record in records for key in record)
    columns = list(columns)
    key = find_id_column(columns, id_column, name, ID_COLUMNS)
    if key is None and index is None and read is None and columns[:1] == [""]:
        key = ""  # pandas writes its index so
    if key is None and read is not None:
        key = columns[0]
    if read is None:
        place = next((x for x in STRUCTURE_COLUMNS if x in columns), None)
        if place is None:
            raise DataError(f"{name}: has no column {' or '.join(STRUCTURE_COLUMNS)}; it has {listed(columns)}")
    else:
        place = next((x for x in FILE_COLUMNS if x in columns), str(key))
    rows = []
    for i, record in enumerate(records, first):
        value = record.get(key) if key is not None else index[i - first] if index is not None else i
        row = Row(f"#{i + 1}" if missing(value) else str(value).strip(), f"{name}, row {i + 1}", values=record)
        rows.append(row)
        try:
            if missing(value):
                raise DataError("no id")
            if record.get(EXTRA, 0) > 0:
                raise DataError(f"{len(columns) + record[EXTRA]} cells for {len(columns)} columns")
            row.structure = _source(record.get(place), read)
        except DataError as error:
            row.reason = reason_of(error)
    return Table(rows, [x for x in columns if x not in (place, "")])


def _source(value: Any, read: Callable[[str], Source] | None) -> Source:
    """What the cell of a structure holds: a CIF, a dictionary, one as JSON, or the name of a file for `read`."""
    if missing(value):
        raise DataError("no structure")
    if read is not None:
        return read(str(value).strip())
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(f"the structure is not JSON: {error}") from error
    if isinstance(value, dict):
        return Source("dict", value)
    if isinstance(value, str):
        return Source("cif", value)
    raise DataError(f"the structure must be a CIF or a dictionary, not {type(value).__name__}")
