"""read_samples: every bad row is reported with its id, and what is no data at all is refused in one line."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crystal_files import cif, core, id_prop, jarvis, pair, to_poscar, write_csv, write_json, xyz

from crystalformer.data import DataError, read_samples

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
    "NaN": "gap must be finite, not NaN",
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
        ("5", "gap must be finite"),
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
    assert "cannot be unpacked: EOFError" in reasons["cut"]
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
    assert problems[1].reason == "gap must be finite, not nan"
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
    with pytest.raises(ValueError, match=r"^workers must be an integer, at least 0 and at most 1024, not -1"):
        read_samples(tmp_path, workers=-1)
