"""Files by their names and first bytes: which kind they are, and their text, unpacked."""

import bz2
import gzip
import io
import lzma
import re
import zipfile
from pathlib import Path

from .parsing import one_line
from .samples import DataError

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
STRUCTURE_FORMATS = "CIF, POSCAR, (ext)xyz or pymatgen JSON"


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
        errors = "replace" if kind_of(path) in ("cif", "poscar") else "strict"
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8: {one_line(error)}") from error
    except Exception as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def unpacked_name(name: str) -> str:
    """The name without .gz and the like."""
    return next((name[: -len(x)] for x in COMPRESSED if name.lower().endswith(x)), name)


def kind_of(path: Path) -> str | None:
    """What the name says that is in a file, None if it says nothing."""
    name = unpacked_name(path.name)
    if re.match(r"(POSCAR|CONTCAR)([-_.]|$)", name):
        return "poscar"
    return KINDS.get(Path(name).suffix.lower())


def stem_of(path: Path) -> str:
    """The id that a file's name gives: the name without its ending."""
    name = Path(unpacked_name(path.name))
    # The rest of POSCAR-mp-1.5 is no ending.
    return name.name if kind_of(name) == "poscar" and name.suffix.lower() not in KINDS else name.stem


def sniff(text: str) -> str | None:
    """What the text itself says that is in a file whose name says nothing."""
    if text.lstrip()[:1] in ("{", "["):
        return "json"
    return "cif" if re.search(r"^\s*data_", text, re.MULTILINE) and "_cell_length_a" in text else None
