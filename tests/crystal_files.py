"""Two crystals in files of every format that read_samples takes."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crystals import import_or_skip

core = import_or_skip("pymatgen.core", reason="reads structures with pymatgen")
ase_io = import_or_skip("ase.io", reason="reads extxyz with ase")
ase_db = import_or_skip("ase.db", reason="reads ase databases")
adaptor = import_or_skip("pymatgen.io.ase", reason="writes ase Atoms").AseAtomsAdaptor

IDS, NUMBERS = ["mp-1", "mp-2"], [0.25, -1.5]


@functools.lru_cache
def pair() -> tuple[Any, Any]:
    """Salt, and a triclinic crystal of three elements off all special places."""
    salt = core.Structure.from_spacegroup("Fm-3m", core.Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    skewed = core.Structure(
        core.Lattice.from_parameters(3.1, 4.2, 5.3, 71, 83, 104),
        ["Fe", "O", "Cf"],
        [[0.01, 0.02, 0.03], [0.41, 0.52, 0.13], [0.77, 0.29, 0.61]],
    )
    return salt, skewed


def cif(structure: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return structure.to(fmt="cif")


def jarvis(structure: Any, cartesian: bool) -> dict[str, Any]:
    coords = structure.cart_coords if cartesian else structure.frac_coords
    return {
        "lattice_mat": structure.lattice.matrix.tolist(),
        "coords": coords.tolist(),
        "elements": [site.specie.symbol for site in structure],
        "cartesian": cartesian,
    }


def atoms(structure: Any) -> Any:
    return adaptor.get_atoms(structure, msonable=False)


def to_poscar(s: Any) -> str:
    return s.to(fmt="poscar")


def as_dict(s: Any) -> Any:
    return s.as_dict()


# Formats --------------------------------------------------------------------------------------------------------------

Writer = Callable[[Path], Path]


def write_csv(path: Path, rows: list[list[Any]], delimiter: str = ",") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path.write_text(text.getvalue())
    return path


def table(structure: Callable[[Any], Any] = cif) -> list[list[Any]]:
    """As CDVAE's: an index of pandas in front, other columns between."""
    head = ["", "material_id", "cif", "formula", "gap"]
    return [head, *([7, id, structure(s), s.formula, x] for id, s, x in zip(IDS, pair(), NUMBERS, strict=True))]


def records(id: str, place: str, structure: Callable[[Any], Any]) -> list[dict[str, Any]]:
    return [{id: i, place: structure(s), "gap": x, "other": None} for i, s, x in zip(IDS, pair(), NUMBERS, strict=True)]


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_jsonl(path: Path, content: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, content)))
    return path


def packed(path: Path, pack: Callable[[bytes], bytes], suffix: str) -> Path:
    target = path.with_name(path.name + suffix)
    target.write_bytes(pack(path.read_bytes()))
    path.unlink()
    return target


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.json", data)
    return file.getvalue()


def id_prop(folder: Path, name: str, write: Callable[[Any], str], listed: str = "{}", head: str = "") -> Path:
    folder.mkdir()
    for id, s in zip(IDS, pair(), strict=True):
        (folder / name.format(id)).write_text(write(s))
    lines = [f"{listed.format(id)},{x}\n" for id, x in zip(IDS, NUMBERS, strict=True)]
    (folder / "id_prop.csv").write_text(head + "".join(lines))
    (folder / "atom_init.json").write_text("{}")
    return folder


def xyz(structures: list[Any], **info: list[Any]) -> str:
    images = [atoms(s) for s in structures]
    for i, x in enumerate(images):
        x.info |= {name: values[i] for name, values in info.items()}
    text = io.StringIO()
    ase_io.write(text, images, format="extxyz")
    return text.getvalue()


def write_extxyz(path: Path) -> Path:
    path.write_text(xyz(list(pair()), gap=NUMBERS, material_id=IDS))
    return path


def write_db(path: Path, key: str = "name", data: bool = False) -> Path:
    with ase_db.connect(path) as db:
        for id, s, x in zip(IDS, pair(), NUMBERS, strict=True):
            values: dict[str, Any] = {"data": {"gap": x}} if data else {"gap": x}
            db.write(atoms(s), **{key: id}, **values)
    return path


def split_frame() -> dict[str, Any]:
    rows = [[s.as_dict(), x] for s, x in zip(pair(), NUMBERS, strict=True)]
    return {"index": IDS, "columns": ["structure", "gap"], "data": rows}


def column_frame() -> dict[str, Any]:
    rows = zip(IDS, pair(), NUMBERS, strict=True)
    columns: dict[str, dict[str, Any]] = {"structure": {}, "gap": {}, "material_id": {}}
    for i, (id, s, x) in enumerate(rows):
        columns["structure"][str(i)], columns["gap"][str(i)], columns["material_id"][str(i)] = s.as_dict(), x, id
    return columns


FORMATS: dict[str, Writer] = {
    "cdvae csv": lambda d: write_csv(d / "a.csv", table()),
    "cdvae csv.gz": lambda d: packed(write_csv(d / "a.csv", table()), gzip.compress, ".gz"),
    "csv.bz2": lambda d: packed(write_csv(d / "a.csv", table()), bz2.compress, ".bz2"),
    "csv.xz": lambda d: packed(write_csv(d / "a.csv", table()), lzma.compress, ".xz"),
    "tsv": lambda d: write_csv(d / "a.tsv", table(), "\t"),
    "csv of pymatgen JSON": lambda d: write_csv(d / "a.csv", table(lambda s: json.dumps(s.as_dict()))),
    "csv with a byte order mark": lambda d: packed(
        write_csv(d / "a.csv", [row[1:] for row in table()]), lambda x: b"\xef\xbb\xbf" + x, ".csv"
    ),
    "cgcnn": lambda d: id_prop(d / "f", "{}.cif", cif),
    "cgcnn, the file": lambda d: id_prop(d / "f", "{}.cif", cif) / "id_prop.csv",
    "alignn": lambda d: id_prop(d / "f", "{}.vasp", to_poscar, "{}.vasp"),
    "alignn poscar": lambda d: id_prop(d / "f", "POSCAR-{}.vasp", to_poscar),
    "contcar": lambda d: id_prop(d / "f", "CONTCAR-{}", to_poscar),
    "vasp": lambda d: id_prop(d / "f", "{}.vasp", to_poscar),
    "alignn xyz": lambda d: id_prop(d / "f", "{}.xyz", lambda s: xyz([s])),
    "json files": lambda d: id_prop(d / "f", "{}.json", lambda s: json.dumps(s.as_dict())),
    "a folder and a first line": lambda d: id_prop(d / "f", "{}.cif", cif, head="material_id,gap\n"),
    "matbench json.gz": lambda d: packed(write_json(d / "a.json", split_frame()), gzip.compress, ".gz"),
    "json.zip": lambda d: packed(write_json(d / "a.json", split_frame()), zipped, ".zip"),
    "records": lambda d: write_json(d / "a.json", records("material_id", "structure", as_dict)),
    "pandas columns": lambda d: write_json(d / "a.json", column_frame()),
    "jsonl": lambda d: write_jsonl(d / "a.jsonl", records("material_id", "structure", as_dict)),
    "records by id": lambda d: write_json(d / "a.json", {x["id"]: x for x in records("id", "structure", as_dict)}),
    "megnet": lambda d: write_json(d / "mp.2018.6.1.json", records("material_id", "structure", cif)),
    "jarvis": lambda d: write_json(d / "a.json", records("jid", "atoms", lambda s: jarvis(s, False))),
    "jarvis, cartesian": lambda d: write_json(d / "a.json", records("jid", "atoms", lambda s: jarvis(s, True))),
    "extxyz": lambda d: write_extxyz(d / "a.extxyz"),
    "extxyz.gz": lambda d: packed(write_extxyz(d / "a.xyz"), gzip.compress, ".gz"),
    "ase db": lambda d: write_db(d / "a.db"),
    "ase db, uid and data": lambda d: write_db(d / "a.db", "uid", data=True),
    "ase json": lambda d: write_db(d / "a.json"),
    "json without a suffix": lambda d: write_json(d / "data", split_frame()),
}
