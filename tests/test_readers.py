"""read_samples: every format gives the same crystals, and every bad row is reported with its id."""

import bz2
import csv
import functools
import gzip
import io
import json
import logging
import lzma
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crystals import aflow_prototypes, import_or_skip

import crystalformer as cf
from crystalformer.data import DataError, Samples, read_samples
from crystalformer.data import parsing as parsing_module

core = import_or_skip("pymatgen.core", reason="reads structures with pymatgen")
ase = import_or_skip("ase", reason="reads extxyz and databases with ase")
adaptor = import_or_skip("pymatgen.io.ase", reason="writes ase Atoms").AseAtomsAdaptor
ase_io = import_or_skip("ase.io", reason="reads extxyz with ase")
ase_db = import_or_skip("ase.db", reason="reads ase databases")

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


def as_dict(s: Any) -> Any:
    return s.as_dict()


def to_poscar(s: Any) -> str:
    return s.to(fmt="poscar")


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


def assert_pair(samples: Samples, tolerance: float = 1e-6) -> None:
    """The pair, up to the digits that a file has and the order of sites."""
    assert len(samples) == 2
    for structure, expected in zip(samples.structures, pair(), strict=True):
        if not hasattr(structure, "lattice"):
            structure = adaptor.get_structure(structure)
        assert len(structure) == len(expected)
        assert np.allclose(structure.lattice.abc, expected.lattice.abc, atol=tolerance)
        assert np.allclose(structure.lattice.angles, expected.lattice.angles, atol=1e-4)
        assert structure.composition == expected.composition
        for site in structure:
            near = [x for x in expected if x.specie == site.specie]
            apart = np.array([x.frac_coords for x in near]) - site.frac_coords
            assert np.abs(apart - np.round(apart)).max(1).min() < tolerance


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path)
    samples, problems = read_samples(path, ["gap"])
    assert problems == []
    assert samples.ids == (tuple(IDS) if name != "alignn" else ("mp-1.vasp", "mp-2.vasp"))
    assert samples.names == ("gap",)
    assert samples.targets.tolist() == [[x] for x in NUMBERS]
    assert_pair(samples)
    without, problems = read_samples(str(path))
    assert (without.ids, without.names, without.targets.shape, problems) == (samples.ids, (), (2, 0), [])


def test_the_library_without_its_readers_needs_neither_pymatgen_nor_ase() -> None:
    code = "import crystalformer.data, sys; assert not {'pymatgen', 'ase', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_energies_of_calculators(tmp_path: Path) -> None:
    calculator = import_or_skip("ase.calculators.singlepoint", reason="makes energies").SinglePointCalculator
    images = [atoms(s) for s in pair()]
    for x, energy in zip(images, NUMBERS, strict=True):
        x.calc = calculator(x, energy=energy)
    ase_io.write(tmp_path / "a.extxyz", images)
    with ase_db.connect(tmp_path / "a.db") as db:
        for x in images:
            db.write(x)
    for name, ids in (("a.extxyz", ("a:0", "a:1")), ("a.db", ("1", "2"))):
        samples, problems = read_samples(tmp_path / name, ["energy"])
        assert (samples.ids, problems) == (ids, [])
        assert samples.targets[:, 0].tolist() == NUMBERS


def test_a_result_that_is_no_number(tmp_path: Path) -> None:
    calculator = import_or_skip("ase.calculators.singlepoint", reason="makes stresses").SinglePointCalculator
    image = atoms(pair()[0])
    image.calc = calculator(image, stress=np.zeros(6))
    ase_io.write(tmp_path / "a.extxyz", image)
    _, (problem,) = read_samples(tmp_path / "a.extxyz", ["stress"])
    assert (problem.id, problem.reason[:30]) == ("a", "stress must be a number, not '")


def test_several_targets_by_name_and_by_place(tmp_path: Path) -> None:
    rows = [["cif", "a", "b", "id"], *([cif(s), i, 10.5 - i, IDS[i]] for i, s in enumerate(pair()))]
    write_csv(tmp_path / "t.csv", rows)
    samples, _ = read_samples(tmp_path / "t.csv", ["b", "a"])
    assert samples.targets.tolist() == [[10.5, 0], [9.5, 1]]
    assert samples.names == ("b", "a")
    folder = id_prop(tmp_path / "f", "{}.cif", cif)
    (folder / "id_prop.csv").write_text("mp-1,1,2\nmp-2,3,4\n")
    samples, _ = read_samples(folder, ["e", "gap"])
    assert samples.targets.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match=r"id_prop.csv: has 2 columns of numbers without names: .* targets are gap$"):
        read_samples(folder, ["gap"])


def test_ids(tmp_path: Path) -> None:
    rows = [["label", "cif"], *([f"x{i}", cif(s)] for i, s in enumerate(pair()))]
    path = write_csv(tmp_path / "t.csv", rows)
    assert read_samples(path)[0].ids == ("0", "1")
    assert read_samples(path, id_column="label")[0].ids == ("x0", "x1")
    with pytest.raises(DataError, match=r"t.csv: has no column 'jid' for the ids; it has label, cif$"):
        read_samples(path, id_column="jid")
    write_csv(tmp_path / "u.csv", [["", "cif"], [70, rows[1][1]], [71, rows[2][1]]])
    assert read_samples(tmp_path / "u.csv")[0].ids == ("70", "71")


def test_a_column_of_files(tmp_path: Path) -> None:
    folder = id_prop(tmp_path / "f", "{}.cif", cif)
    (folder / "deep").mkdir()
    (folder / "mp-2.cif").rename(folder / "deep" / "b.cif")
    (folder / "id_prop.csv").unlink()
    (folder / "mine.csv").write_text("id,file,gap\none,mp-1.cif,0.25\ntwo,deep/b.cif,-1.5\n")
    samples, problems = read_samples(folder, ["gap"])
    assert (samples.ids, problems) == (("one", "two"), [])
    assert_pair(samples)
    (folder / "other.csv").write_text("id,gap\n")
    with pytest.raises(DataError, match=r"has the tables mine.csv, other.csv: give the one that is meant$"):
        read_samples(folder, ["gap"])


# Structures alone -----------------------------------------------------------------------------------------------------


def test_single_files(tmp_path: Path) -> None:
    salt = pair()[0]
    files = {
        "a.cif": cif(salt),
        "b.vasp": to_poscar(salt),
        "POSCAR-c": to_poscar(salt),
        "d.xyz": xyz([salt]),
        "e.json": json.dumps(salt.as_dict()),
        "f.txt": cif(salt),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        samples, problems = read_samples(tmp_path / name)
        assert problems == []
        assert samples.ids == ({"POSCAR-c": "POSCAR-c"}.get(name, name[0]),)
        assert len(samples.structures[0]) == 8
    (tmp_path / "f.txt").unlink()
    samples, problems = read_samples(tmp_path)
    assert (samples.ids, problems) == (("POSCAR-c", "a", "b", "d", "e"), [])


def test_many_crystals_in_a_file(tmp_path: Path) -> None:
    one, two = pair()
    # pymatgen alone would give the second of two blocks of one name, and drop the third with a warning.
    text = "data_global\n_journal_name 'none'\n" + cif(one) + cif(one * (2, 1, 1))
    (tmp_path / "a.cif").write_text(text + cif(two).replace("Cf2", "Qq2").replace(" Cf ", " Qq "))
    (tmp_path / "b.xyz").write_text(xyz([one, two]))
    samples, problems = read_samples(tmp_path)
    assert samples.ids == ("a:0", "a:1", "b:0", "b:1")
    assert [len(x) for x in samples.structures] == [8, 16, 8, 3]
    assert [(x.id, x.source) for x in problems] == [("a:2", "a.cif")]
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "two.cif").write_text(cif(one) + cif(two))
    (folder / "all.xyz").write_text(xyz([one, two]))
    (folder / "id_prop.csv").write_text("two,1\nall,2\n")
    samples, problems = read_samples(folder, ["gap"])
    assert len(samples) == 0
    assert [(x.id, x.reason) for x in problems] == [
        ("two", "the structure must be one crystal, not 2"),
        ("all", "all.xyz must hold one crystal, not 2"),
    ]


# Bad rows -------------------------------------------------------------------------------------------------------------


def bad_structures() -> dict[str, tuple[str, str]]:
    """By id: a CIF, and how the reason begins."""
    salt, text = pair()[0], cif(pair()[0])
    einsteinium = core.Structure(core.Lattice.cubic(4), ["Es"], [[0, 0, 0]])
    twice = core.Structure(core.Lattice.cubic(4), ["H", "O"], [[0.999, 0, 0], [0.0005, 0, 0]])
    return {
        "empty": ("", "no structure"),
        "prose": ("not a CIF at all", "not a CIF: it has no data_ block"),
        "no-atoms": (text[: text.index("loop_")], "the CIF has no atoms"),
        "torn": (text[:-30], "the CIF cannot be parsed: "),
        "Es": (cif(einsteinium), "the structure must be of the elements 1 (H) to 98 (Cf), not Es"),
        "nonsense": (
            text.replace(" Na ", " Xx ").replace("Na1", "Xx1"),
            "the structure must be of the elements 1 (H) to 98 (Cf), not Xx",
        ),
        "flat": (text.replace("5.64000000", "0.00000000"), "the CIF cannot be parsed: "),
        "twice": (cif(twice), "the structure has atoms 0 and 1 at one place, 0.0060 Å apart"),
        "two": (text + cif(salt * (2, 1, 1)), "the structure must be one crystal, not 2"),
        "broken-json": ('{"sites": ', "the structure is not JSON"),
        "molecule": ('{"sites": []}', "not periodic: it has no lattice"),
        "other-json": ('{"a": 1}', "neither a pymatgen Structure nor JARVIS atoms, but with the keys a"),
    }


def test_bad_structures_are_reported_in_order(tmp_path: Path) -> None:
    good = cif(pair()[0])
    rows: list[list[Any]] = [["material_id", "cif", "gap"], ["first", good, 1]]
    for id, (text, _) in bad_structures().items():
        rows.append([id, text, 1])
    path = write_csv(tmp_path / "t.csv", [*rows, ["last", good, 2]])
    for options in ({}, {"primitive": True}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        samples, problems = read_samples(path, ["gap"], **options)
        assert samples.ids == ("first", "last")
        assert samples.targets[:, 0].tolist() == [1, 2]
        assert [x.id for x in problems] == list(bad_structures())
        for i, (problem, (_, reason)) in enumerate(zip(problems, bad_structures().values(), strict=True)):
            assert problem.source == f"t.csv, row {i + 2}"
            assert problem.reason.startswith(reason)
            assert "\n" not in problem.reason


BAD_NUMBERS = {
    "": "gap is missing",
    "na": "gap is missing",
    "NaN": "gap is missing",
    "None": "gap is missing",
    "inf": "gap must be finite, not inf",
    "-1e999": "gap must be finite, not -1e999",
    "1.5 eV": "gap must be a number, not '1.5 eV'",
    "True": "gap must be a number, not 'True'",
}


def test_bad_numbers_are_reported(tmp_path: Path) -> None:
    good = cif(pair()[0])
    rows = [["id", "cif", "gap"], *([f"x{i}", good, x] for i, x in enumerate(BAD_NUMBERS)), ["y", good, " 1e-3 "]]
    samples, problems = read_samples(write_csv(tmp_path / "t.csv", rows), ["gap"])
    assert (samples.ids, samples.targets.tolist()) == (("y",), [[1e-3]])
    assert [(x.id, x.reason) for x in problems] == [(f"x{i}", x) for i, x in enumerate(BAD_NUMBERS.values())]
    values = [None, "na", True, [1], {"a": 1}, float("nan")]
    salt = jarvis(pair()[0], True)
    path = write_json(tmp_path / "t.json", [{"jid": i, "atoms": salt, "gap": x} for i, x in enumerate(values)])
    samples, problems = read_samples(path, ["gap"])
    assert len(samples) == 0
    assert [(x.id, x.reason.split(",")[0]) for x in problems] == [
        ("0", "gap is missing"),
        ("1", "gap is missing"),
        ("2", "gap must be a number"),
        ("3", "gap must be a number"),
        ("4", "gap must be a number"),
        ("5", "gap is missing"),
    ]
    assert len(read_samples(path)[0]) == 6  # without targets nothing is wrong with them


def test_bad_ids_and_lines(tmp_path: Path) -> None:
    one, two = map(cif, pair())
    rows = [["id", "cif", "gap"], ["a", one, 1], ["a", two, 2], ["", one, 3], [], ["b"], ["c", one, 1, 2], [""] * 3]
    rows.append(["d", two, 4])
    samples, problems = read_samples(write_csv(tmp_path / "t.csv", rows), ["gap"])
    assert samples.ids == ("a", "d")
    assert len(samples.structures[0]) == 8
    assert [str(x) for x in problems] == [
        "t.csv, row 2: a: the same id as t.csv, row 1",
        "t.csv, row 3: #3: no id",
        "t.csv, row 4: b: no structure",
        "t.csv, row 5: c: 4 cells for 3 columns",
        "t.csv, row 6: #6: no id",
    ]


def test_bad_files_of_a_folder(tmp_path: Path) -> None:
    folder = id_prop(tmp_path / "f", "{}.cif", cif)
    (folder / "mp-1.vasp").write_text(to_poscar(pair()[0]))
    (folder / "old.vasp").write_text("\n".join(to_poscar(pair()[0]).replace("Na Cl\n", "").splitlines()[:-8]))
    (folder / "cut.cif.gz").write_bytes(gzip.compress(cif(pair()[0]).encode())[:-20])
    (folder / "slab.xyz").write_text("1\nno lattice\nC 0 0 0\n")
    listing = "mp-1,1\nmp-2,2\nmp-3,3\nold,4\ncut,5\nslab,6\nmp-2,\n"
    (folder / "id_prop.csv").write_text(listing)
    samples, problems = read_samples(folder, ["gap"])
    assert samples.ids == ("mp-2",)
    reasons = {x.id: x.reason for x in problems[:-1]}
    assert list(reasons) == ["mp-1", "mp-3", "old", "cut", "slab"]
    assert reasons["mp-1"] == "several files may be meant: mp-1.cif, mp-1.vasp"
    assert reasons["mp-3"].startswith("no file of that structure, as mp-3.cif or POSCAR-mp-3.vasp, in ")
    assert "cannot be read: EOFError" in reasons["cut"]
    assert reasons["slab"] == "the structure must be periodic in all three directions, not pbc=[False, False, False]"
    assert reasons["old"]
    assert problems[-1].reason == "gap is missing"
    (folder / "id_prop.csv").unlink()
    samples, problems = read_samples(folder)
    assert samples.ids == ("mp-1", "mp-2")
    assert {x.id for x in problems} == {"cut", "mp-1", "old", "slab"}


def test_a_poscar_that_does_not_name_its_elements(tmp_path: Path) -> None:
    lines = to_poscar(pair()[0]).splitlines()
    plain = [" ".join(line.split()[:3]) if i > 6 else line for i, line in enumerate(lines) if i != 5]
    (tmp_path / "a.vasp").write_text("\n".join(["unnamed", *plain[1:]]) + "\n")
    samples, (problem,) = read_samples(tmp_path / "a.vasp")
    assert len(samples) == 0
    assert problem.reason == "the POSCAR does not name its elements"


def test_bad_frames(tmp_path: Path) -> None:
    one, two = pair()
    text = xyz([one], gap=[1.0]) + '1\nLattice="3 0 0 0 3 0 0 0 3" gap=2\nQq 0 0 0\n\n' + xyz([two], gap=[3.0])
    text += xyz([one], gap=[np.nan]) + "\n".join(xyz([one], gap=[5.0]).splitlines()[:-2])
    (tmp_path / "a.xyz").write_text(text)
    samples, problems = read_samples(tmp_path / "a.xyz", ["gap"])
    assert samples.ids == ("a:0", "a:2")
    assert [x.id for x in problems] == ["a:1", "a:3", "a:4"]
    assert problems[1].reason == "gap is missing"
    assert problems[2].reason == "cannot be read from line 30 on: '6 atoms of 8' where a frame should be"


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    good = cif(pair()[0])
    rows = [["id", "cif", "gap"], ["a", good, 1], ["b", "prose", 1], ["c", good, "na"]]
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"^t.csv, row 2: b: not a CIF: it has no data_ block$"):
        read_samples(path, ["gap"], strict=True)
    with pytest.raises(DataError, match=r"^t.csv, row 2: b: "):
        read_samples(path, ["gap"], strict=True, cache=tmp_path / "cache")
    assert len(read_samples(write_csv(path, rows[:2]), ["gap"], strict=True)[0]) == 1


def test_a_cif_without_the_hydrogen_of_its_formula(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = cif(pair()[0])
    formula = "_chemical_formula_sum   'Na4 Cl4'"
    assert formula in text
    (tmp_path / "a.cif").write_text(text.replace(formula, "_chemical_formula_sum   'Na4 Cl4 H8'"))
    (tmp_path / "b.cif").write_text(text)
    for _ in range(3):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
            samples, problems = read_samples(tmp_path, cache=tmp_path / "cache")
        assert (samples.ids, problems) == (("a", "b"), [])
        (message,) = caplog.messages
        assert message == (
            f"{tmp_path}: 1 of 2 CIFs differ from their formulas, first a: "
            "Missing elements H from PMG structure composition"
        )


def test_deuterium_is_hydrogen(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text(cif(core.Structure(core.Lattice.cubic(3), ["D"], [[0, 0, 0]])))
    samples, _ = read_samples(tmp_path / "a.cif")
    assert cf.CrystalBatch.from_structures(samples.structures).species.tolist() == [1]


# What is no data at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "{}: no such file or folder"),
        ("a.csv", "", "{}: empty"),
        ("a.json", "[]", "{}: empty"),
        ("a.json", "{", "{}: not a JSON file: "),
        ("a.json", "3", "{}: must be JSON of structures or records with structures, not int"),
        ("a.json", '{"x": 1}', "{}: must be JSON of structures or records with structures; it has x"),
        ("a.json", '[{"x": 1}]', "a.json: has no column cif or structure or atoms; it has x"),
        ("a.json", '{"columns": ["a"], "data": [[1, 2]]}', "{}: data must be rows of 1 values, as columns"),
        ("a.xyz", "", "{}: empty"),
        ("a.db", "no database", "{}: not an ase database: "),
        ("a.pdf", "%PDF", "{}: unknown format: it must be CSV, JSON, CIF, POSCAR, (ext)xyz, an ase database, or a "),
        ("a.csv", "id,cif\n1,x\n", "{}: has no column 'gap'; it has id"),
        ("a.csv", "id,cif,gap,gap\n1,x,2,3\n", "{}: has 2 columns named 'gap'"),
        ("a.cif", "data_x", "{}: has structures but no numbers, so no gap"),
        ("folder", "folder", "{}: has no files of structures: they must be CIF, POSCAR, (ext)xyz or pymatgen JSON"),
    ],
)
def test_what_cannot_be_read(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_samples(path, ["gap"])
    assert str(error.value).startswith(message.format(path))
    assert "\n" not in str(error.value)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^targets must be a sequence of names, not the string 'gap'"):
        read_samples(tmp_path, "gap")
    with pytest.raises(ValueError, match=r"^targets must differ, but 'gap' is there twice"):
        read_samples(tmp_path, ["gap", "gap"])
    with pytest.raises(ValueError, match=r"^workers must be at least 0, not -1"):
        read_samples(tmp_path, workers=-1)


# JARVIS ---------------------------------------------------------------------------------------------------------------


def test_jarvis_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: jarvis-tools itself is not among what the tests install."""
    asked = []

    def data(name: str) -> list[dict[str, Any]]:
        asked.append(name)
        return records("jid", "atoms", lambda s: jarvis(s, False))

    module = types.ModuleType("jarvis.db.figshare")
    module.data = data  # type: ignore[attr-defined]
    for name in ("jarvis", "jarvis.db"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "jarvis.db.figshare", module)
    samples, problems = read_samples("jarvis:dft_3d", ["gap"])
    assert asked == ["dft_3d"]
    assert (samples.ids, problems) == (tuple(IDS), [])
    assert_pair(samples)


def test_without_jarvis_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jarvis", None)
    with pytest.raises(DataError, match=r"^jarvis:dft_3d: needs jarvis-tools \(pip install jarvis-tools\); or "):
        read_samples("jarvis:dft_3d", ["gap"])


# Primitive cells ------------------------------------------------------------------------------------------------------


def test_primitive_cells_are_the_same_crystal(tmp_path: Path) -> None:
    salt = pair()[0]
    write_json(tmp_path / "a.json", [(salt * (2, 1, 1)).as_dict(), salt.as_dict()])
    ase_io.write(tmp_path / "b.extxyz", atoms(salt))
    model = cf.Crystalformer(
        cf.CrystalformerConfig(model_dim=16, num_heads=2, num_blocks=2, ff_dim=16, num_basis=8, r0=(0.7,))
    ).double()
    for name in ("a.json", "b.extxyz"):
        samples, problems = read_samples(tmp_path / name, primitive=True)
        assert problems == []
        assert {len(x) for x in samples.structures} == {2}
        with torch.no_grad():
            reduced = model(cf.CrystalBatch.from_structures(samples.structures, torch.float64))
            full = model(cf.CrystalBatch.from_structures([salt], torch.float64))
        assert torch.allclose(reduced, full.expand_as(reduced), rtol=1e-5, atol=0)


def test_distortions_are_not_averaged_away(tmp_path: Path) -> None:
    double = pair()[0] * (2, 1, 1)
    double.translate_sites([0], [0.1, 0, 0], frac_coords=False)
    write_json(tmp_path / "a.json", double.as_dict())
    samples, _ = read_samples(tmp_path / "a.json", primitive=True)
    assert len(samples.structures[0]) == 16


# In parallel, and kept ------------------------------------------------------------------------------------------------


def identical(one: Samples, other: Samples) -> bool:
    return one.ids == other.ids and all(
        a.species_and_occu == b.species_and_occu
        and a.labels == b.labels
        and np.array_equal(a.cart_coords, b.cart_coords)
        and np.array_equal(a.frac_coords, b.frac_coords)
        and np.array_equal(a.lattice.matrix, b.lattice.matrix)
        for a, b in zip(one.structures, other.structures, strict=True)
    )


def test_processes_give_the_same(tmp_path: Path) -> None:
    structures = [cif(x) for x in aflow_prototypes(limit=70, max_atoms=8)]
    rows = [[f"x{i}", x] for i, x in enumerate(structures)]
    rows.insert(50, ["bad", "data_x"])
    path = write_csv(tmp_path / "t.csv", [["id", "cif"], *rows])
    seen: list[tuple[int, int]] = []
    one, problems = read_samples(path)
    two, others = read_samples(path, workers=2, progress=lambda *x: seen.append(x))
    assert identical(one, two)
    assert problems == others
    assert [x.id for x in problems] == ["bad"]
    assert seen[-1] == (len(rows), len(rows))


@pytest.mark.parametrize("primitive", [False, True])
def test_parsed_structures_are_kept(primitive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged = pair()[0].copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    disordered = core.Structure(core.Lattice.cubic(3), [{"Au": 0.5, "Cu": 0.25}], [[0, 0, 0]])
    structures = [*pair(), charged, disordered, core.Structure(core.Lattice.cubic(3), ["D"], [[0, 0, 0]])]
    path = write_csv(tmp_path / "t.csv", [["id", "cif"], *([f"x{i}", cif(s)] for i, s in enumerate(structures))])
    fresh = read_samples(path, primitive=primitive)[0]
    first = read_samples(path, primitive=primitive, cache=tmp_path / "cache")[0]
    assert read_samples(path, primitive=not primitive, cache=tmp_path / "cache")[0].ids == fresh.ids
    monkeypatch.setattr(parsing_module, "parse", lambda *_: pytest.fail("parsed again"))
    again = read_samples(path, primitive=primitive, cache=tmp_path / "cache")[0]
    assert identical(fresh, first)
    assert identical(fresh, again)
    assert {str(site.specie) for site in fresh.structures[2]} == {"Na+", "Cl-"}


def test_what_does_not_come_back_whole_is_not_kept(tmp_path: Path) -> None:
    magnetic = pair()[0].copy()
    magnetic.add_site_property("magmom", [1.0] * len(magnetic))
    path = write_json(tmp_path / "a.json", magnetic.as_dict())
    for _ in range(2):
        (structure,) = read_samples(path, cache=tmp_path / "cache")[0].structures
        assert structure.site_properties["magmom"] == [1.0] * 8
    assert not (tmp_path / "cache").exists()


def test_damage_to_kept_structures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_csv(tmp_path / "t.csv", table())
    fresh = read_samples(path, cache=tmp_path / "cache")[0]
    (shard,) = (tmp_path / "cache").iterdir()
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="crystalformer.data"):
        assert identical(read_samples(path, cache=tmp_path / "cache")[0], fresh)
    (message,) = caplog.messages
    assert message == f"{shard} is damaged, so its content is made again: its checksum is wrong"


def test_real_data() -> None:
    path = Path(__file__).parents[1].parent / "shared" / "data" / "carbon24_val.csv.gz"
    if not path.exists():
        pytest.skip("needs the carbon crystals of ../shared/data")
    samples, problems = read_samples(path, ["energy_per_atom"])
    assert (len(samples), problems) == (2032, [])
    assert samples.ids[0] == "C-148264-7891-51"
    assert samples.targets[0].tolist() == [-154.223695]
    assert {len(x) for x in samples.structures} == set(range(6, 25, 2))
