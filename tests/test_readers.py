"""read_samples: every format gives the same crystals, with their ids and targets."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crystal_files import (
    FORMATS,
    IDS,
    NUMBERS,
    adaptor,
    ase_db,
    ase_io,
    atoms,
    cif,
    id_prop,
    jarvis,
    pair,
    records,
    to_poscar,
    write_csv,
    xyz,
)
from crystals import import_or_skip

from crystalformer.data import DataError, Samples, read_samples


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


def test_real_data() -> None:
    path = Path(__file__).parents[1].parent / "shared" / "data" / "carbon24_val.csv.gz"
    if not path.exists():
        pytest.skip("needs the carbon crystals of ../shared/data")
    samples, problems = read_samples(path, ["energy_per_atom"])
    assert (len(samples), problems) == (2032, [])
    assert samples.ids[0] == "C-148264-7891-51"
    assert samples.targets[0].tolist() == [-154.223695]
    assert {len(x) for x in samples.structures} == set(range(6, 25, 2))


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
