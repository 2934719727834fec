"""Files of structures alone, as rows, and such files as a table names them."""

import re
from pathlib import Path

from .ase_tables import read_frames
from .files import STRUCTURE_FORMATS, STRUCTURE_KINDS, kind_of, read_text, stem_of, unpacked_name
from .json_tables import read_json
from .parsing import Source
from .rows import Row, Table
from .samples import DataError


def read_structures(path: Path, kind: str, text: str, id_column: str | None) -> Table:
    """The crystals of a file of structures."""
    if kind == "xyz":
        return read_frames(path, text, id_column)
    if kind == "json":
        return read_json(path, text, id_column)
    return Table([Row(stem_of(path), path.name, Source(kind, text), many=True)], [])


class StructureFiles:
    """The files of structures in a folder, by what a table may call them: their names, or the ids in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_id: dict[str, list[str]] = {}
        for path in sorted(folder.iterdir()):
            if kind_of(path) in STRUCTURE_KINDS:
                stem = stem_of(path)
                for id in {stem, unpacked_name(path.name), re.sub(r"^(POSCAR|CONTCAR)[-_.]", "", stem)}:
                    self.by_id.setdefault(id, []).append(path.name)

    def __contains__(self, id: str) -> bool:
        return id in self.by_id or self._is_file(id)

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except OSError:  # a cell may hold anything, such as a name that is too long
            return False

    def read(self, id: str) -> Source:
        """Raises DataError if there is no such file or more than one, and for all but one crystal in it."""
        path = self._find(id)
        kind = kind_of(path)
        if kind not in STRUCTURE_KINDS:
            raise DataError(f"unknown format: {path.name} must be {STRUCTURE_FORMATS}")
        rows = read_structures(path, kind, read_text(path), None).rows
        if len(rows) != 1:
            raise DataError(f"{path.name} must hold one crystal, not {len(rows)}")
        if rows[0].structure is None:
            raise DataError(f"{path.name}: {rows[0].reason}")
        return rows[0].structure

    def _find(self, id: str) -> Path:
        if id and self._is_file(id):
            return self.folder / id
        names = self.by_id.get(id, [])
        if len(names) == 1:
            return self.folder / names[0]
        if names:
            raise DataError(f"several files may be meant: {', '.join(names)}")
        raise DataError(f"no file of that structure, as {id}.cif or POSCAR-{id}.vasp, in {self.folder}")
