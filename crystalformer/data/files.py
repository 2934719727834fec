"""Files by their names and first bytes: which kind they are, and their text, unpacked."""

import re
from pathlib import Path

from ..common import user_files
from .parsing import reason_of
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
    """The text of a file, unpacked if it is packed, as `user_files.read_text` reads it.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        # Structures may have an author's name in some old encoding.
        return user_files.read_text(path, "replace" if kind_of(path) in ("cif", "poscar") else "strict")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or reason_of(error)}") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error)}") from error


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
    # The rest of a name as POSCAR-mp-1.5 is not an ending.
    return name.name if kind_of(name) == "poscar" and name.suffix.lower() not in KINDS else name.stem


def sniff(text: str) -> str | None:
    """What the text itself says that is in a file whose name says nothing."""
    if text.lstrip()[:1] in ("{", "["):
        return "json"
    return "cif" if re.search(r"^[ \t\r]*data_", text, re.MULTILINE) and "_cell_length_a" in text else None
