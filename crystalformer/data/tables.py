"""Files and folders as rows: an id, what the structure is read from, and the values beside it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from .parsing import Source, one_line, read_xyz, require
from .samples import DataError

STRUCTURE_COLUMNS = ("cif", "structure", "atoms")
ID_COLUMNS = ("material_id", "jid", "id", "cif_id", "mp_id", "mpid", "entry_id", "identifier")
ATOMS_ID_COLUMNS = (*(x for x in ID_COLUMNS if x != "id"), "uid", "name", "id")
FILE_COLUMNS = ("file", "filename", "file_name", "path")
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
KINDS = {
    ".cif": "cif",
    ".mcif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".xyz": "xyz",
    ".extxyz": "xyz",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".db": "db",
}
STRUCTURE_KINDS = ("cif", "poscar", "xyz", "json")
FORMATS = "CSV, JSON, CIF, POSCAR, (ext)xyz, an ase database, or a folder of structures"
ID_PROP = "id_prop.csv"
MISSING = ("", "na", "n/a", "nan", "none", "null")


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


def read_table(path: str | Path, targets: Sequence[str], id_column: str | None) -> Table:
    """The rows of whatever `path` is; `targets` name the columns of a table without a first line of names.

    Raises:
        DataError: for what cannot be read at all.
    """
    if str(path).startswith("jarvis:"):
        return _records(_download(str(path)), str(path), id_column)
    path = Path(path)
    if path.is_dir():
        return _folder(path, targets, id_column)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    kind = _kind(path)
    if kind == "db":
        return _database(path, id_column)
    text = read_text(path)
    if kind is None:
        kind = _sniff(text)
    if kind == "csv":
        return _csv(path, text, targets, id_column)
    if kind == "json":
        return _json(path, text, id_column)
    if kind in STRUCTURE_KINDS:
        return _structures(path, kind, text, id_column)
    raise DataError(f"{path}: unknown format: it must be {FORMATS}")


def missing(value: Any) -> bool:
    """Whether a table says that it has no value here."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, Real) and value != value)


# Files ----------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it is gzip, bzip2, xz or a zip of one file, whatever its name.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(b"BZh"):
            data = bz2.decompress(data)
        elif data.startswith(b"\xfd7zXZ\x00"):
            data = lzma.decompress(data)
        elif data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                (name,) = (x for x in file.namelist() if not x.endswith("/"))
                data = file.read(name)
        # Structures may have an author's name in some old encoding.
        errors = "replace" if _kind(path) in ("cif", "poscar") else "strict"
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8: {one_line(error)}") from error
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def _bare(name: str) -> str:
    """The name without .gz and the like."""
    return next((name[: -len(x)] for x in COMPRESSED if name.lower().endswith(x)), name)


def _kind(path: Path) -> str | None:
    name = _bare(path.name)
    if re.match(r"(POSCAR|CONTCAR)([-_.]|$)", name):
        return "poscar"
    return KINDS.get(Path(name).suffix.lower())


def _stem(path: Path) -> str:
    name = Path(_bare(path.name))
    # The rest of POSCAR-mp-1.5 is no ending.
    return name.name if _kind(name) == "poscar" and name.suffix.lower() not in KINDS else name.stem


def _sniff(text: str) -> str | None:
    if text.lstrip()[:1] in ("{", "["):
        return "json"
    return "cif" if re.search(r"^\s*data_", text, re.MULTILINE) and "_cell_length_a" in text else None


def _structures(path: Path, kind: str, text: str, id_column: str | None) -> Table:
    """The crystals of a file of structures."""
    if kind == "xyz":
        return _frames(path, text, id_column)
    if kind == "json":
        return _json(path, text, id_column)
    return Table([Row(_stem(path), path.name, Source(kind, text), many=True)], [])


# Folders --------------------------------------------------------------------------------------------------------------


def _folder(folder: Path, targets: Sequence[str], id_column: str | None) -> Table:
    names = sorted(x.name for x in folder.iterdir() if x.is_file())
    tables = [x for x in names if _kind(Path(x)) == "csv"]
    listed = [x for x in tables if _bare(x) == ID_PROP] or (tables if targets else [])
    if len(listed) > 1:
        raise DataError(f"{folder}: has the tables {', '.join(listed)}: give the one that is meant")
    if listed:
        return _csv(folder / listed[0], read_text(folder / listed[0]), targets, id_column)
    files = [x for x in names if _kind(Path(x)) in STRUCTURE_KINDS and x != "atom_init.json"]
    if not files:
        raise DataError(f"{folder}: has no files of structures: they must be CIF, POSCAR, (ext)xyz or pymatgen JSON")
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for name in files:
        path = folder / name
        try:
            table = _structures(path, str(_kind(path)), read_text(path), None)
            rows += table.rows
            columns |= dict.fromkeys(table.columns)
        except DataError as error:
            rows.append(Row(_stem(path), name, reason=one_line(error)))
    return Table(rows, list(columns))


class _Files:
    """The files of structures in a folder, by what a table may call them: their names, or the ids in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_id: dict[str, list[str]] = {}
        for path in sorted(folder.iterdir()):
            if _kind(path) in STRUCTURE_KINDS:
                stem = _stem(path)
                for id in {stem, _bare(path.name), re.sub(r"^(POSCAR|CONTCAR)[-_.]", "", stem)}:
                    self.by_id.setdefault(id, []).append(path.name)

    def __contains__(self, id: str) -> bool:
        return id in self.by_id or (self.folder / id).is_file()

    def read(self, id: str) -> Source:
        """Raises DataError if there is no such file or more than one, and for all but one crystal in it."""
        path = self._find(id)
        kind = _kind(path)
        if kind not in STRUCTURE_KINDS:
            raise DataError(f"unknown format: {path.name} must be CIF, POSCAR, (ext)xyz or pymatgen JSON")
        rows = _structures(path, kind, read_text(path), None).rows
        if len(rows) != 1:
            raise DataError(f"{path.name} must hold one crystal, not {len(rows)}")
        if rows[0].structure is None:
            raise DataError(f"{path.name}: {rows[0].reason}")
        return rows[0].structure

    def _find(self, id: str) -> Path:
        if id and (self.folder / id).is_file():
            return self.folder / id
        names = self.by_id.get(id, [])
        if len(names) == 1:
            return self.folder / names[0]
        if names:
            raise DataError(f"several files may be meant: {', '.join(names)}")
        raise DataError(f"no file of that structure, as {id}.cif or POSCAR-{id}.vasp, in {self.folder}")


# CSV ------------------------------------------------------------------------------------------------------------------


def _csv(path: Path, text: str, targets: Sequence[str], id_column: str | None) -> Table:
    delimiter = "\t" if _bare(path.name).lower().endswith(".tsv") else ","
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
        files = _Files(path.parent)
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
        record[_EXTRA] = len(row) - len(header)
        records.append(record)
    return _records(records, path.name, id_column, header, read)


# A key that no column has: cells beyond the first line's.
_EXTRA = "\0extra"


@contextmanager
def _long_fields() -> Iterator[None]:
    """Cells of any length: a CIF of a large cell is longer than csv's limit."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _has_names(first: list[str], files: _Files, id_column: str | None) -> bool:
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


# Records --------------------------------------------------------------------------------------------------------------


def _records(
    records: Sequence[Mapping[str, Any]],
    name: str,
    id_column: str | None,
    columns: Iterable[str] | None = None,
    read: Callable[[str], Source] | None = None,
    index: Sequence[Any] | None = None,
) -> Table:
    """The rows of records with a structure each, or with the name of a file each that `read` reads."""
    if columns is None:
        columns = dict.fromkeys(key for record in records for key in record)
    columns = list(columns)
    key = _id_column(columns, id_column, name, ID_COLUMNS)
    if key is None and index is None and read is None and columns[:1] == [""]:
        key = ""  # pandas writes its index so
    if key is None and read is not None:
        key = columns[0]
    if read is None:
        place = next((x for x in STRUCTURE_COLUMNS if x in columns), None)
        if place is None:
            raise DataError(f"{name}: has no column {' or '.join(STRUCTURE_COLUMNS)}; it has {_listed(columns)}")
    else:
        place = next((x for x in FILE_COLUMNS if x in columns), str(key))
    rows = []
    for i, record in enumerate(records):
        value = record.get(key) if key is not None else index[i] if index is not None else i
        row = Row(f"#{i + 1}" if missing(value) else str(value).strip(), f"{name}, row {i + 1}", values=record)
        rows.append(row)
        try:
            if missing(value):
                raise DataError("no id")
            if record.get(_EXTRA, 0) > 0:
                raise DataError(f"{len(columns) + record[_EXTRA]} cells for {len(columns)} columns")
            row.structure = _source(record.get(place), read)
        except DataError as error:
            row.reason = one_line(error)
    return Table(rows, [x for x in columns if x not in (place, "")])


def _source(value: Any, read: Callable[[str], Source] | None) -> Source:
    """What the cell of a structure holds: a CIF, a dictionary, one as JSON, or the name of a file for `read`."""
    if missing(value):
        raise DataError("no structure")
    if read is not None:
        return read(str(value).strip())
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"the structure is not JSON: {error}") from error
    if isinstance(value, dict):
        return Source("dict", value)
    if isinstance(value, str):
        return Source("cif", value)
    raise DataError(f"the structure must be a CIF or a dictionary, not {type(value).__name__}")


def _id_column(columns: Iterable[str], wanted: str | None, name: str, known: Sequence[str]) -> str | None:
    columns = list(columns)
    if wanted is not None and wanted not in columns:
        raise DataError(f"{name}: has no column {wanted!r} for the ids; it has {_listed(columns)}")
    return wanted if wanted is not None else next((x for x in known if x in columns), None)


def _listed(columns: Iterable[str]) -> str:
    columns = [x for x in columns if x]
    return ", ".join(columns[:60]) + (", ..." if len(columns) > 60 else "") if columns else "none"


# JSON -----------------------------------------------------------------------------------------------------------------


def _json(path: Path, text: str, id_column: str | None) -> Table:
    try:
        if _bare(path.name).lower().endswith(".jsonl"):
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file: {one_line(error)}") from error
    if isinstance(found, dict):
        if "sites" in found or "lattice_mat" in found:
            return Table([Row(_stem(path), path.name, Source("dict", found))], [])
        if {"columns", "data"} <= set(found):
            return _split_frame(path, found, id_column)
        if {"ids", "nextid"} <= set(found):
            return _database(path, id_column)
        if any(name in found for name in STRUCTURE_COLUMNS):
            return _column_frame(path, found, id_column)
        if found and all(isinstance(x, dict) for x in found.values()):
            found, index = list(found.values()), list(found)
            return _entries(path, found, id_column, index)
        raise DataError(f"{path}: must be JSON of structures or records with structures; it has {_listed(found)}")
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise DataError(f"{path}: must be JSON of structures or records with structures, not {type(found).__name__}")
    if not found:
        raise DataError(f"{path}: empty")
    return _entries(path, found, id_column)


def _entries(path: Path, found: list[Any], id_column: str | None, index: list[str] | None = None) -> Table:
    """Records, or bare structures, which are records of nothing else."""
    if any("sites" in x or "lattice_mat" in x for x in found):
        index = index or [f"{_stem(path)}:{i}" for i in range(len(found))]
        found = [{"structure": x} for x in found]
    return _records(found, path.name, id_column, index=index)


def _split_frame(path: Path, found: Mapping[str, Any], id_column: str | None) -> Table:
    """pandas' orient "split", Matbench and matminer."""
    columns, data = list(map(str, found["columns"])), found["data"]
    if not isinstance(data, list) or any(not isinstance(row, list) or len(row) != len(columns) for row in data):
        raise DataError(f"{path}: data must be rows of {len(columns)} values, as columns")
    index = found.get("index")
    if index is not None and len(index) != len(data):
        raise DataError(f"{path}: index must be {len(data)} ids, as data, not {len(index)}")
    records = [dict(zip(columns, row, strict=True)) for row in data]
    return _records(records, path.name, id_column, columns, index=index)


def _column_frame(path: Path, found: Mapping[str, Any], id_column: str | None) -> Table:
    """pandas' orient "columns", the default of to_json; or one record."""
    place = next(name for name in STRUCTURE_COLUMNS if name in found)
    if not isinstance(found[place], dict) or "sites" in found[place] or "lattice_mat" in found[place]:
        return _records([found], path.name, id_column, index=[_stem(path)])
    if not all(isinstance(column, dict) for column in found.values()):
        raise DataError(f"{path}: must be columns with a value for each index, as pandas writes them")
    index = list(found[place])
    records = [{name: column.get(i) for name, column in found.items()} for i in index]
    return _records(records, path.name, id_column, list(found), index=index)


def _download(path: str) -> list[dict[str, Any]]:
    """A data set of JARVIS, by jarvis-tools."""
    try:
        from jarvis.db.figshare import data
    except ImportError as error:
        raise DataError(
            f"{path}: needs jarvis-tools (pip install jarvis-tools); or download the data set and give its JSON file"
        ) from error
    try:
        return list(data(path.removeprefix("jarvis:")))
    except Exception as error:
        raise DataError(f"{path}: jarvis-tools cannot get it: {one_line(error)}") from error


# ase ------------------------------------------------------------------------------------------------------------------


def _database(path: Path, id_column: str | None) -> Table:
    ase_db = require("ase.db")
    try:
        found = list(ase_db.connect(path).select())
    except Exception as error:
        raise DataError(f"{path}: not an ase database: {one_line(error)}") from error
    if not found:
        raise DataError(f"{path}: empty")
    atoms = [row.toatoms() for row in found]
    values = [
        {"id": row.id} | _results(x) | dict(row.data) | row.key_value_pairs for row, x in zip(found, atoms, strict=True)
    ]
    columns = list(dict.fromkeys(name for x in values for name in x))
    key = _id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
    return _of_atoms(path, atoms, values, columns, [x.get(str(key)) for x in values])


def _frames(path: Path, text: str, id_column: str | None) -> Table:
    """The frames of an (ext)xyz file, one by one: a bad one does not hide the others."""
    lines = text.splitlines()
    atoms: list[Any] = []
    start = 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        number = int(lines[start]) if lines[start].strip().isdecimal() else None
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
            atoms.append(one_line(error))
    if not atoms:
        raise DataError(f"{path}: empty")
    values = [{} if isinstance(x, str) else _results(x) | dict(x.info) for x in atoms]
    columns = list(dict.fromkeys(name for x in values for name in x))
    key = _id_column(columns, id_column, path.name, ATOMS_ID_COLUMNS)
    stems = [_stem(path)] if len(atoms) == 1 else [f"{_stem(path)}:{i}" for i in range(len(atoms))]
    ids = stems if key is None else [x.get(key, s) for x, s in zip(values, stems, strict=True)]
    return _of_atoms(path, atoms, values, columns, ids)


def _results(atoms: Any) -> dict[str, Any]:
    """What a calculator left with the atoms: energy and the like."""
    return {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}


def _of_atoms(
    path: Path, atoms: Sequence[Any], values: Sequence[Mapping[str, Any]], columns: list[str], ids: Sequence[Any]
) -> Table:
    """Rows of ase Atoms; a string in their place says why there are none."""
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
