"""Crystals as a stream: what `read_samples` reads, of every format, in parts and by other processes."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crystal_files import FORMATS, IDS, ase_db, atoms, cif, core, pair, write_csv, write_jsonl, xyz

from crystalformer.common import user_files
from crystalformer.data import DataError, read_samples, streams
from crystalformer.data.parsing import Source, parse
from crystalformer.data.quick_parsing import quick_crystal
from crystalformer.data.streams import Read, read_ids, read_stream
from crystalformer.model.structures import Crystal, read_structure

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")


def reads(*paths: Path, **options: Any) -> list[Read]:
    return [read for _, part in read_stream(paths, **options) for read in part]


def assert_same(found: Crystal | None, structure: Any) -> None:
    expected = read_structure(structure, "expected")
    assert found is not None
    assert found.mixtures == expected.mixtures
    np.testing.assert_allclose(found.positions, expected.positions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.lattice, expected.lattice, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_what_read_samples_gives(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path)
    samples, problems = read_samples(path)
    assert not problems
    found = reads(path)
    assert [x.id for x in found] == list(samples.ids)
    for read, structure in zip(found, samples.structures, strict=True):
        assert_same(read.crystal, structure)
    assert [id for _, ids in read_ids([path]) for id in ids] == list(samples.ids)


def test_usual_forms_are_read_quickly_and_others_left_to_the_libraries(tmp_path: Path) -> None:
    for structure in pair():
        frame = xyz([structure]).splitlines()
        with ase_db.connect(tmp_path / "a.db") as database:
            row = database.get(database.write(atoms(structure)))
        content = structure.as_dict()
        plain = {"lattice": content["lattice"]["matrix"], "species": [x.specie.symbol for x in structure]}
        sources = [Source("frame", frame), Source("row", row), Source("dict", content)]
        sources.append(Source("dict", plain | {"frac_coords": structure.frac_coords.tolist()}))
        for source in sources:
            assert_same(quick_crystal(source), parse(source)[0].structure)
    frame, content = xyz([pair()[0]]).splitlines(), pair()[0].as_dict()
    mixed, flat = json.loads(json.dumps(content)), json.loads(json.dumps(content))
    mixed["sites"][0]["species"] = [{"element": "Na", "occu": 0.5}, {"element": "K", "occu": 0.5}]
    flat["lattice"]["pbc"] = [True, True, False]
    twice = json.loads(json.dumps(content))
    twice["sites"][1]["abc"] = twice["sites"][0]["abc"]
    slab = [frame[0], frame[1].replace('pbc="T T T"', 'pbc="T T F"'), *frame[2:]]
    assert slab != frame
    numbered = [frame[0], frame[1].replace("pos:R:3", "pos:R:3:Z:I:1"), *(f"{x} 3" for x in frame[2:])]
    cut = [*frame[:-1], frame[-1].rsplit(maxsplit=1)[0]]
    for source in (*(Source("dict", x) for x in (mixed, flat, twice, {})), *(Source("frame", x) for x in (slab, cut))):
        assert quick_crystal(source) is None
    assert quick_crystal(Source("frame", numbered)) is None
    assert read_structure(parse(Source("frame", numbered))[0].structure, "x").mixtures[0] == {3: 1.0}


def many(folder: Path, number: int) -> dict[str, Path]:
    """A file of each format that is a stream, of so many small crystals, some of them bad."""
    structures = [core.Structure(core.Lattice.cubic(3 + i / number), ["Cs"], [[0, 0, 0]]) for i in range(number)]
    records = [{"id": f"c{i}", "structure": s.as_dict()} for i, s in enumerate(structures)]
    records[3]["structure"]["lattice"]["pbc"] = [False] * 3
    records[5]["id"] = "c4"
    lines = write_jsonl(folder / "a.jsonl", records)
    packed = folder / "b.jsonl.gz"
    text = lines.read_text().split("\n")
    text[7] = text[7][:20]
    packed.write_bytes(gzip.compress("\n".join(text).encode()))
    frames = xyz(structures, material_id=[f"c{i}" for i in range(number)]).splitlines()
    frames[3 * 3 + 1] = frames[3 * 3 + 1].replace("Lattice", "Nothing")
    (folder / "a.extxyz").write_text("\n".join(frames))
    with ase_db.connect(folder / "a.db") as database:
        for i, s in enumerate(structures):
            database.write(atoms(s), name=f"c{i}")
    table = write_csv(folder / "a.csv", [["id", "cif"], *([f"c{i}", cif(s)] for i, s in enumerate(structures[:20]))])
    return {"jsonl": lines, "jsonl.gz": packed, "extxyz": folder / "a.extxyz", "db": folder / "a.db", "csv": table}


@pytest.mark.parametrize("workers", [0, 1])
def test_parts_and_processes_give_all_rows_in_their_order(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SECONDS_ALONE", 0.0)
    files = many(tmp_path, 600)  # parts of 256
    found: dict[int, list[Read]] = {}
    for number, part in read_stream(list(files.values()), workers=workers):
        found.setdefault(number, []).extend(part)
    for (name, path), part in zip(files.items(), found.values(), strict=True):
        assert [x.id for x in part][:3] == ["c0", "c1", "c2"]
        assert len(part) == (20 if name == "csv" else 600)
        assert [x.source for x in part][-1] == f"{path.name}, row {len(part)}"
        bad = {i: x.reason for i, x in enumerate(part) if x.crystal is None}
        assert bad.keys() == {"jsonl": {3}, "jsonl.gz": {3, 7}, "extxyz": {3}}.get(name, set())
        assert ("volume" if name == "extxyz" else "periodic") in bad.get(3, "periodic")
        assert "no record in JSON" in bad.get(7, "no record in JSON")
        assert part[-1].crystal is not None
        assert part[-1].crystal.lattice[0, 0] == pytest.approx(3 + (len(part) - 1) / 600)


def test_the_rows_before_what_is_wrong_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.extxyz"
    good = xyz([pair()[0]] * 300)
    path.write_bytes(good.encode() + b"1\n\xff\n")
    found: list[list[Read]] = []
    with pytest.raises(DataError, match=r"a\.extxyz: not a text in UTF-8"):
        found.extend(part for _, part in read_stream([path]))
    assert 256 < sum(map(len, found)) <= 300
    path.write_text(f"{good}8\nand no more")
    *first, last = reads(path)
    assert len(first) == 300
    assert "cannot be read from line 3001 on" in last.reason
    monkeypatch.setattr(user_files, "MAX_LINE", 50)
    with pytest.raises(DataError, match=r"a\.extxyz: a line has more than 50 characters"):
        reads(path)
    for name, message in (("none.db", "no such file"), ("empty.csv", "empty"), ("empty.xyz", "empty")):
        if name.startswith("empty"):
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=message):
            reads(tmp_path / name)
    (tmp_path / "bad.db").write_text("no database")
    with pytest.raises(DataError, match="not an ase database"):
        reads(tmp_path / "bad.db")


def test_streams_are_bounded_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((b" " * 9999 + b"\n") * 200))
    monkeypatch.setattr(user_files, "ANY_RATIO_BYTES", 0)
    with pytest.raises(DataError, match="unpack to more than"):
        reads(path)
    monkeypatch.setenv(user_files.LIMIT, "10")
    with pytest.raises(DataError, match="more than the 10 that CRYSTALFORMER_MAX_BYTES allows"):
        reads(path)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for id, structure in zip(IDS, pair(), strict=True):
        (tmp_path / f"{id}.cif").write_text(cif(structure))
    (tmp_path / "zero.cif").write_text("nothing")
    found = reads(tmp_path)
    assert [x.id for x in found] == [*IDS, "zero"]
    assert found[-1].reason == "not a CIF: it has no data_ block"
