"""Files that are no data, or far too much of it: one clear error, at once, before memory or time are gone."""

import bz2
import gzip
import io
import json
import lzma
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crystal_files import cif, core, jarvis, pair, write_csv, write_json

import crystalformer as cf
from crystalformer.common import user_files
from crystalformer.data import DataError, read_samples, read_split
from crystalformer.data.files import sniff


def zipped(*files: bytes) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as file:
        for i, content in enumerate(files):
            file.writestr(f"{i}.cif", content)
    return result.getvalue()


# Zeros, which pack to a thousandth and less; the tests unpack only 1 MB whatever the ratio.
BOMB, ANY = bytes(2 << 20), 1 << 20
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda x: gzip.compress(x, 6),
    "bz2": bz2.compress,
    "xz": lambda x: lzma.compress(x, preset=0),
    "zip": zipped,
}


@pytest.mark.parametrize("kind", PACKED)
def test_bombs_are_not_unpacked(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "ANY_RATIO_BYTES", ANY)
    path = tmp_path / f"a.cif.{kind}"
    path.write_bytes(PACKED[kind](BOMB))
    with pytest.raises(DataError, match=r"bytes unpack to more than 1,048,576: CRYSTALFORMER_MAX_BYTES must allow"):
        read_samples(path)
    path.write_bytes(PACKED[kind](cif(pair()[0]).encode()))
    assert len(read_samples(path)[0]) == 1


def test_the_environment_sets_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.cif"
    path.write_text(cif(pair()[0]))
    monkeypatch.setenv(user_files.LIMIT, "100")
    with pytest.raises(DataError, match=r"bytes are more than the 100 that CRYSTALFORMER_MAX_BYTES allows"):
        read_samples(path)
    (tmp_path / "b.cif.gz").write_bytes(gzip.compress(bytes(1000)))
    with pytest.raises(DataError, match="bytes unpack to more than 100"):
        read_samples(tmp_path / "b.cif.gz")
    monkeypatch.setenv(user_files.LIMIT, "lots")
    with pytest.raises(DataError, match="CRYSTALFORMER_MAX_BYTES must be a number of bytes, not 'lots'"):
        read_samples(path)
    monkeypatch.setenv(user_files.LIMIT, str(1 << 30))
    path.with_suffix(".gz").write_bytes(gzip.compress(BOMB))
    assert len(user_files.read_bytes(path.with_suffix(".gz"))) == len(BOMB)


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("pipe.csv", "pipe.db", "pipe.json"):
        os.mkfifo(tmp_path / name)
        for read in (read_samples, read_split) if name != "pipe.db" else (read_samples,):
            with pytest.raises(DataError, match="must be a file, not a pipe"):
                read(tmp_path / name)
    with pytest.raises(DataError, match=r"/dev/zero: .*must be a file, not a device"):
        read_samples("/dev/zero")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(DataError, match=r"loop.csv: no such file"):
        read_samples(tmp_path / "loop.csv")
    with pytest.raises(DataError, match="File name too long"):
        read_samples(tmp_path / ("x" * 5000))
    with (tmp_path / "huge.csv").open("wb") as file:
        file.truncate(1 << 32)  # of nothing
    with pytest.raises(DataError, match="bytes are more than the 2,147,483,648 that CRYSTALFORMER_MAX_BYTES allows"):
        read_samples(tmp_path / "huge.csv")
    (tmp_path / "inside").mkdir()
    os.mkfifo(tmp_path / "inside" / "a.cif")
    (tmp_path / "inside" / "id_prop.csv").write_text(f"a,1\n{'x' * 5000},2\n")
    _, problems = read_samples(tmp_path / "inside", ["gap"])
    assert [x.reason.split(",")[0] for x in problems] == [
        f"{tmp_path}/inside/a.cif: cannot be read: must be a file",
        "no file of that structure",
    ]


DEEP = '{"a":' * 9999


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", DEEP, "not a JSON file: nested too deeply"),
        ("a.jsonl", DEEP, "not a JSON file: nested too deeply"),
        ("a.json", "9" * 9999, "not a JSON file: "),
        ("a.json", b"\xff\xfe{\0}\0", "not a text in UTF-8: it has zero bytes"),
        ("a.csv", b"id,cif\n\xe9,x\n", "not a text in UTF-8: byte 7 cannot be decoded"),
        ("a.cif", bytes(1000), "not a text in UTF-8: it has zero bytes"),
        ("a.zip", zipped(b"a", b"b"), "a zip must hold one file, not 2"),
        ("a.zip", zipped(b"a")[:-9], "cannot be unpacked: BadZipFile"),
        ("a.cif.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], "cannot be unpacked: EOFError"),
    ],
)
def test_what_is_no_text(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_samples(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_time_grows_with_the_text_not_with_its_square(tmp_path: Path) -> None:
    blank = "\n" * 1_000_000
    start = time.monotonic()
    assert sniff(blank) is None
    path = tmp_path / "a.cif"
    path.write_text(blank + cif(pair()[0]))
    assert len(read_samples(path)[0]) == 1
    path.write_text(f"data_x{blank}")
    assert len(read_samples(path)[1]) == 1
    assert time.monotonic() - start < 5


def test_rows_that_would_stop_the_others(tmp_path: Path) -> None:
    """What a number, an id or a structure can be that is none is a problem of its row."""
    good, salt = cif(pair()[0]), jarvis(pair()[0], True)
    path = write_json(
        tmp_path / "t.json",
        [
            {"id": "a", "atoms": salt, "gap": 1},
            {"id": "big", "atoms": salt, "gap": 10**400},
            {"id": "half \ud800", "atoms": salt, "gap": 1},
            {"id": "far", "atoms": salt | {"coords": [[1e6, 0, 0]] * 8, "cartesian": True}, "gap": 1},
            {"id": "dense", "atoms": salt | {"lattice_mat": (np.eye(3) * 0.05).tolist()}, "gap": 1},
            {"id": "nowhere", "atoms": salt | {"coords": [[float("nan")] * 3] * 8}, "gap": 1},
        ],
    )
    samples, problems = read_samples(path, ["gap"])
    assert samples.ids == ("a",)
    reasons = {x.id: x.reason for x in problems}
    assert list(reasons) == ["big", "half \\ud800", "far", "dense", "nowhere"]
    for id, reason in (
        ("big", "gap must be a number, not '1000"),
        ("half \\ud800", "the id must be text that UTF-8 can hold"),
        ("far", "the structure must have positions within 10000 Å, not 1e+06"),
        ("dense", "the structure must have at least 0.1 Å³ an atom, not "),
        ("nowhere", "the structure must have finite positions"),
    ):
        assert reasons[id].startswith(reason)
    rows = [["id", "cif"], ["a", good], ["deep", DEEP], ["bytes", good.replace("5.64", "inf")]]
    samples, problems = read_samples(write_csv(tmp_path / "t.csv", rows))
    assert (samples.ids, [x.id for x in problems]) == (("a",), ["deep", "bytes"])
    assert problems[0].reason == "the structure is not JSON: nested too deeply"


def test_lines_end_where_the_format_says(tmp_path: Path) -> None:
    """Not at the other characters that Python's splitlines takes for ends."""
    records = [{"id": f"x{i}\u2028y", "structure": s.as_dict()} for i, s in enumerate(pair())]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(json.dumps(x, ensure_ascii=False) for x in records), encoding="utf-8")
    assert read_samples(path)[0].ids == ("x0\u2028y", "x1\u2028y")


def test_splits_that_are_none(tmp_path: Path) -> None:
    for content in (DEEP, "\0", "[1]", '{"train": 3}'):
        (tmp_path / "split.json").write_text(content)
        with pytest.raises(DataError, match=r"split.json: "):
            read_split(tmp_path / "split.json")


# Occupancies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[-0.1, 0.5], [float("nan"), 0.5], [float("inf"), 0], [0, 0], [0.7, 0.7]])
def test_occupancies_that_are_none(shares: list[float]) -> None:
    species = torch.zeros(2, 98)
    species[0, 10], species[1, :2] = 1, torch.tensor(shares)
    ptr = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"^species must be (finite|occupancies from 0 that add up to at most 1)"):
        cf.CrystalBatch(species, torch.rand(2, 3), torch.eye(3)[None] * 4, ptr)
    species[1, :2] = torch.tensor([0.334, 0.667])  # the digits of a file
    cf.CrystalBatch(species, torch.rand(2, 3), torch.eye(3)[None] * 4, ptr)


def test_occupancies_of_structures() -> None:
    """pymatgen drops a share that is NaN without a word, and leaves a site of nothing."""
    nothing = core.Structure(core.Lattice.cubic(4), ["Cl", {"Na": float("nan")}], [[0, 0, 0], [0.5] * 3])
    negative = core.Structure(core.Lattice.cubic(4), ["Cl"], [[0, 0, 0]])
    negative[0].species = core.Composition({"Na": -0.5}, allow_negative=True)
    for structure, shares in ((nothing, r"\[\] in site 1"), (negative, r"\[-0.5\] in site 0")):
        with pytest.raises(ValueError, match=rf"^structures\[0\] must have shares from 0 .* at most 1, not {shares}"):
            cf.CrystalBatch.from_structures([structure])
