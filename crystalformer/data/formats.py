"""Files and folders as rows, whatever their format."""

from collections.abc import Sequence
from pathlib import Path

from ..common.user_files import check_regular
from .ase_tables import read_database
from .csv_tables import read_csv
from .files import STRUCTURE_FORMATS, STRUCTURE_KINDS, kind_of, read_text, sniff, stem_of, unpacked_name
from .json_tables import read_jarvis
from .parsing import reason_of
from .rows import Row, Table
from .samples import DataError
from .structure_files import read_structures

FORMATS = "CSV, JSON, CIF, POSCAR, (ext)xyz, an ase database, or a folder of structures"
ID_PROP = "id_prop.csv"


def read_table(path: str | Path, targets: Sequence[str], id_column: str | None) -> Table:
    """The rows of whatever `path` is; `targets` name the columns of a table without a first line of names.

    Raises:
        DataError: for what cannot be read at all.
    """
    if str(path).startswith("jarvis:"):
        return read_jarvis(str(path), id_column)
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path, targets, id_column)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return _file(path, targets, id_column)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason_of(error)}") from error


def _file(path: Path, targets: Sequence[str], id_column: str | None) -> Table:
    kind = kind_of(path)
    if kind == "db":
        check_regular(path)
        return read_database(path, id_column)
    text = read_text(path)
    if kind is None:
        kind = sniff(text)
    if kind == "csv":
        return read_csv(path, text, targets, id_column)
    if kind in STRUCTURE_KINDS:
        return read_structures(path, kind, text, id_column)
    raise DataError(f"{path}: unknown format: it must be {FORMATS}")


def _folder(folder: Path, targets: Sequence[str], id_column: str | None) -> Table:
    table, files = listed_in(folder, targets)
    if table is not None:
        return read_csv(table, read_text(table), targets, id_column)
    tables = [read_file_of(folder, name) for name in files]
    columns = dict.fromkeys(name for x in tables for name in x.columns)
    return Table([row for x in tables for row in x.rows], list(columns))


def listed_in(folder: Path, targets: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The table of a folder of structures, if it has one, and the names of the files of structures.

    Raises:
        DataError: if there is neither, or several tables may be meant.
    """
    names = sorted(x.name for x in folder.iterdir() if x.is_file())
    tables = [x for x in names if kind_of(Path(x)) == "csv"]
    listed = [x for x in tables if unpacked_name(x) == ID_PROP] or (tables if targets else [])
    if len(listed) > 1:
        raise DataError(f"{folder}: has the tables {', '.join(listed)}: give the one that is meant")
    files = [x for x in names if kind_of(Path(x)) in STRUCTURE_KINDS and x != "atom_init.json"]
    if not listed and not files:
        raise DataError(f"{folder}: has no files of structures: they must be {STRUCTURE_FORMATS}")
    return folder / listed[0] if listed else None, files


def read_file_of(folder: Path, name: str) -> Table:
    """The crystals of one of many files; a bad row, if it cannot be read."""
    path = folder / name
    try:
        return read_structures(path, str(kind_of(path)), read_text(path), None)
    except DataError as error:
        return Table([Row(stem_of(path), name, reason=reason_of(error))], [])
