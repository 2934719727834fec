"""Crystals of any number of files as a stream, in order: a part at a time, which other processes parse."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from ..common import checks
from ..common.process import cores, uninterrupted
from ..common.user_files import check_regular, read_lines
from ..model.structures import Crystal, read_structure
from .ase_tables import stream_database, stream_frames
from .csv_tables import stream_csv
from .files import kind_of, unpacked_name
from .formats import listed_in, read_file_of, read_table
from .json_tables import stream_json_lines
from .parsing import Parsed, Source, parse, reason_of
from .quick_parsing import quick_crystal
from .rows import Part, Row, in_parts
from .samples import DataError, writable

# Files of a folder that are one part.
FILES_AT_ONCE = 32
# What processes take to start, about.
SECONDS_ALONE = 1.0


class Read(NamedTuple):
    """A crystal of a row, or the reason why there is none. `note` says what is doubtful about the crystal."""

    id: str
    source: str
    crystal: Crystal | None
    reason: str = ""
    note: str = ""


def read_stream(
    paths: Sequence[str | Path], id_column: str | None = None, workers: int = 0
) -> Iterator[tuple[int, list[Read]]]:
    """The crystals of files and folders as `read_samples` reads them, without targets: some at once, in order.

    Memory holds a few parts of a file. (Ext)xyz, JSON lines, CSV and ase databases are read part by part, and the first
    256 rows say which columns they have; folders are read file by file, other files as a whole. An id may come again.

    Args:
        paths, id_column: as for `read_samples`.
        workers: processes that read and parse, as many as there are cores at most; 0, and for the first second, this
            one does.

    Yields:
        The place of the file in `paths`, and the crystals of some of its rows.

    Raises:
        DataError: as `read_samples`, behind the rows that come before what is wrong.
    """
    return _in_order(_read_part, paths, id_column, workers)


def read_ids(
    paths: Sequence[str | Path], id_column: str | None = None, workers: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """`read_stream` of the ids alone, without parsing: of a row with several crystals what their ids begin with."""
    return _in_order(_ids_of_part, paths, id_column, workers)


# Parts ----------------------------------------------------------------------------------------------------------------


def _parts(path: str | Path, id_column: str | None) -> Iterator[Part]:
    """Behind the good parts one that raises what is wrong, so that the good ones are read first."""
    try:
        yield from _of_folder(Path(path), id_column) if Path(path).is_dir() else _of_file(path, id_column)
    except DataError as error:
        yield partial(_refuse, str(error))
    except (OSError, ValueError) as error:
        yield partial(_refuse, f"{path}: {reason_of(error)}")


def _refuse(message: str) -> list[Row]:
    raise DataError(message)


def _of_file(path: str | Path, id_column: str | None) -> Iterator[Part]:
    file = Path(path)
    stream = None if str(path).startswith("jarvis:") or not file.exists() else _STREAMS.get(_kind(file))
    if stream is not None:
        check_regular(file)
        yield from stream(file, id_column)
    else:
        for _, rows in in_parts(read_table(path, (), id_column).rows):
            yield partial(list, rows)


def _kind(path: Path) -> str:
    lines = unpacked_name(path.name).lower().endswith(".jsonl")
    return "jsonl" if lines else str(kind_of(path))


_STREAMS: dict[str, Callable[[Path, str | None], Iterator[Part]]] = {
    "db": stream_database,
    "xyz": lambda path, id_column: stream_frames(path, read_lines(path), id_column),
    "csv": lambda path, id_column: stream_csv(path, read_lines(path), id_column),
    "jsonl": lambda path, id_column: stream_json_lines(path, read_lines(path), id_column),
}


def _of_folder(folder: Path, id_column: str | None) -> Iterator[Part]:
    table, files = listed_in(folder, ())
    if table is not None:
        yield from _of_file(table, id_column)
    else:
        for _, names in in_parts(files, FILES_AT_ONCE):
            yield partial(_rows_of_files, folder, names)


def _rows_of_files(folder: Path, names: Sequence[str]) -> list[Row]:
    return [row for name in names for row in read_file_of(folder, name).rows]


# What is made of them -------------------------------------------------------------------------------------------------


def _read_part(part: Part) -> list[Read]:
    return [read for row in part() for read in _read(row)]


def _read(row: Row) -> Iterator[Read]:
    found = [Parsed(None, row.reason)] if row.reason else _crystals(row.structure)
    if len(found) > 1 and not row.many:
        found = [Parsed(None, f"the structure must be one crystal, not {len(found)}")]
    for i, parsed in enumerate(found):
        id = row.id if len(found) == 1 else f"{row.id}:{i}"
        if writable(id) != id:
            parsed = Parsed(None, "the id must be text that UTF-8 can hold")
        yield Read(writable(id), writable(row.source), parsed.structure, writable(parsed.reason), parsed.note)


def _crystals(source: Source | None) -> list[Parsed]:
    """`parse`, to Crystals."""
    assert source is not None
    if (crystal := quick_crystal(source)) is not None:
        return [Parsed(crystal)]
    return [x if x.structure is None else _as_crystal(x) for x in parse(source)]


def _as_crystal(parsed: Parsed) -> Parsed:
    return Parsed(read_structure(parsed.structure, "the structure"), note=parsed.note)


def _ids_of_part(part: Part) -> list[str]:
    return [writable(row.id) for row in part()]


class _Work(Dataset[Any]):
    """What each process does with a part, by the number of its file."""

    def __init__(self, work: Callable[[Part], list[Any]]) -> None:
        self.work = work

    def __getitem__(self, numbered: tuple[int, Part]) -> tuple[int, list[Any] | DataError]:
        number, part = numbered
        try:
            return number, self.work(part)
        except DataError as error:
            return number, error


def _in_order(
    work: Callable[[Part], list[Any]], paths: Sequence[str | Path], id_column: str | None, workers: int
) -> Iterator[tuple[int, Any]]:
    """What the work makes of each part, with the number of its file; a few parts at a time are under way."""
    checks.check_workers("workers", workers)
    parts = ((number, part) for number, path in enumerate(paths) for part in _parts(path, id_column))
    results = _here_first(_Work(work), parts, min(workers, cores()))
    for number, result in results:
        if isinstance(result, DataError):
            raise result
        yield number, result


def _here_first(work: _Work, parts: Iterator[tuple[int, Part]], workers: int) -> Iterator[Any]:
    """In this process, and in others when that has taken longer than these need to start."""
    seconds = 0.0
    for part in parts:
        if workers and seconds > SECONDS_ALONE:
            loader = DataLoader(
                work,
                batch_size=None,
                sampler=itertools.chain([part], parts),
                collate_fn=_as_it_is,
                num_workers=workers,
                multiprocessing_context="spawn",  # not forked: the threads of torch and BLAS do not survive it
            )
            with uninterrupted():
                results = iter(loader)
            yield from results
            return
        start = time.perf_counter()
        result = work[part]
        seconds += time.perf_counter() - start
        yield result


def _as_it_is(result: Any) -> Any:
    return result
