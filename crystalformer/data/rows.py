"""Rows of a table: an id, what the structure is read from, and the values beside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

from .parsing import Source
from .samples import DataError

ID_COLUMNS = ("material_id", "jid", "id", "cif_id", "mp_id", "mpid", "entry_id", "identifier")
MISSING = ("", "na", "n/a", "nan", "none", "null")
# Of a file that is read as a stream.
ROWS_AT_ONCE = 256

Item = TypeVar("Item")


@dataclass
class Row:
    """One row of a table. `many`: its source may hold several crystals. `reason`: why the row is bad, if it is."""

    id: str
    source: str
    structure: Source | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    many: bool = False
    reason: str = ""


@dataclass
class Table:
    """Rows, and the names of the columns whose values may be targets."""

    rows: list[Row]
    columns: list[str]


# Some rows of a file, which another process can make: a function and what it is called with.
Part = Callable[[], list[Row]]


def missing(value: Any) -> bool:
    """Whether a table says that it has no value here."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, Real) and value != value)


def find_id_column(columns: Iterable[str], wanted: str | None, name: str, known: Sequence[str]) -> str | None:
    """The column of the ids: the one that is wanted, else the first of the known ones, if any is there."""
    columns = list(columns)
    if wanted is not None and wanted not in columns:
        raise DataError(f"{name}: has no column {wanted!r} for the ids; it has {listed(columns)}")
    return wanted if wanted is not None else next((x for x in known if x in columns), None)


def listed(columns: Iterable[str]) -> str:
    """Names of columns as an error shows them."""
    columns = [x for x in columns if x]
    return ", ".join(columns[:60]) + (", ..." if len(columns) > 60 else "") if columns else "none"


def in_parts(items: Iterable[Item], number: int = ROWS_AT_ONCE) -> Iterator[tuple[int, list[Item]]]:
    """Items, so many at once, each part with the place of its first; an error behind the items before it."""
    first, part = 0, list[Item]()
    try:
        for item in items:
            part.append(item)
            if len(part) == number:
                yield first, part
                first, part = first + number, []
    except Exception:
        if part:
            yield first, part
        raise
    if part:
        yield first, part
