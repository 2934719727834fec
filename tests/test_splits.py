"""Splits: the same on every machine, written and read back, and refused when they overlap."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crystalformer.data.samples import DataError, Problem, Samples, write_problems
from crystalformer.data.splits import read_split, split, write_split

IDS = [f"mp-{i}" for i in range(10)]
EXPECTED = {
    "train": ["mp-6", "mp-7", "mp-8", "mp-4", "mp-9", "mp-5"],
    "val": ["mp-2", "mp-1"],
    "test": ["mp-3", "mp-0"],
}


def test_a_seeded_split_for_ever() -> None:
    """Written down: who repeats a training elsewhere, or in years, gets these."""
    assert split(IDS, (0.6, 0.2, 0.2), seed=0) == EXPECTED
    assert split(IDS[::-1], (0.6, 0.2, 0.2), seed=0) == EXPECTED
    assert split(IDS, (0.6, 0.2, 0.2), seed=1) != EXPECTED


def test_sizes_and_that_every_id_is_in_one_set() -> None:
    ids = [str(i) for i in range(1003)]
    parts = split(ids)
    assert {name: len(x) for name, x in parts.items()} == {"train": 803, "val": 100, "test": 100}
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == sorted(ids)
    assert {name: len(x) for name, x in split(ids[:3]).items()} == {"train": 1, "val": 1, "test": 1}
    assert {name: len(x) for name, x in split(ids, (0.9, 0.1, 0)).items()} == {"train": 903, "val": 100, "test": 0}
    assert {name: len(x) for name, x in split(ids[:1], (0, 0, 1)).items()} == {"train": 0, "val": 0, "test": 1}


@pytest.mark.parametrize(
    ("ids", "fractions", "message"),
    [
        (IDS, (0.8, 0.1), r"^fractions must be three numbers from 0 that add up to 1, not \(0.8, 0.1\)"),
        (IDS, (0.8, 0.1, 0.2), r"^fractions must be three numbers"),
        (IDS, (1.2, -0.1, -0.1), r"^fractions must be three numbers"),
        (["a", "b", "a"], (0.8, 0.1, 0.1), r"^ids must differ, but 'a' is there twice"),
        (["a", "b"], (0.8, 0.1, 0.1), r"^ids must be enough for the fractions \(0.8, 0.1, 0.1\), not 2"),
    ],
)
def test_what_cannot_be_split(ids: list[str], fractions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(ids, fractions)


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    write_split(path, split(IDS))
    assert read_split(path) == split(IDS)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        {"id_train": [1, "b"], "id_val": ["c"], "id_test": []},  # ALIGNN's ids_train_val_test.json
        {"train": {"1": 0.5, "b": 0.1}, "val": {"c": 1.0}},  # JARVIS leaderboard
        {"val": ["c"], "train": ["1", "b"], "test": []},
    ],
)
def test_conventions(content: Any, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(content))
    assert read_split(tmp_path / "ids.json") == {"train": ["1", "b"], "val": ["c"], "test": []}


def test_a_folder_of_lists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has none of train.txt, val.txt, test.txt$"):
        read_split(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"a\r\nb c\n\n")
    (tmp_path / "val.txt").write_text("d")
    assert read_split(tmp_path) == {"train": ["a", "b c"], "val": ["d"], "test": []}
    (tmp_path / "test.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"test\.txt: no list of ids: not a text in UTF-8: it has zero bytes$"):
        read_split(tmp_path)
    (tmp_path / "test.txt").unlink()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"the split must have the sets train, val, test, not notes$"):
        read_split(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["a"], "val": ["a"]}', "the split must have each id once, but 'a' is in train and in val"),
        ('{"train": ["a", "a"]}', "the split must have each id once, but 'a' is twice in train"),
        ('{"training": ["a"]}', "the split must have the sets train, val, test, not training"),
        ('{"train": ["a"], "id_train": ["b"]}', "must name each set once, not train, id_train"),
        ('{"train": "a"}', "must be a dictionary with lists of ids, train, val, test"),
        ('["a"]', "must be a dictionary with lists of ids, train, val, test"),
        ("{", "no JSON: "),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_split(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_split(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_wrong_split_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^split must have each id once, but 'a' is in train and in test"):
        write_split(tmp_path / "split.json", {"train": ["a"], "test": ["a"]})
    assert not list(tmp_path.iterdir())


# Samples --------------------------------------------------------------------------------------------------------------


def test_select() -> None:
    samples = Samples(("a", "b", "c"), ("A", "B", "C"), torch.tensor([[1.0], [2.0], [3.0]]).double(), ("gap",))
    some = samples.select(["c", "a"])
    assert (some.ids, some.structures, some.targets.tolist(), some.names) == (
        ("c", "a"),
        ("C", "A"),
        [[3], [1]],
        ("gap",),
    )
    assert len(samples.select([])) == 0
    with pytest.raises(ValueError, match=r"^ids must be among those of the samples, not d, e \(2 of 3\)$"):
        samples.select(["d", "a", "e"])
    with pytest.raises(ValueError, match=r"^ids must differ, but 'a' is there twice"):
        samples.select(["a", "a"])


@pytest.mark.parametrize(
    ("ids", "structures", "targets", "message"),
    [
        (("a", "a"), (1, 2), torch.zeros(2, 1).double(), "ids must differ"),
        (("a", "b"), (1,), torch.zeros(2, 1).double(), "structures must be 2, as ids, not 1"),
        (
            ("a",),
            (1,),
            torch.zeros(1, 1),
            r"targets must be fp64 of shape \(1, 1\), as ids and names, not torch.float32",
        ),
        (("a",), (1,), torch.zeros(1).double(), r"targets must be fp64 of shape \(1, 1\)"),
    ],
)
def test_samples_that_do_not_fit(ids: Any, structures: Any, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Samples(ids, structures, targets, ("gap",))


def test_the_report(tmp_path: Path) -> None:
    write_problems(tmp_path / "bad.csv", [Problem("mp-1", "a.csv, row 2", 'no "gap", none')])
    assert (tmp_path / "bad.csv").read_text() == 'id,source,reason\nmp-1,"a.csv, row 2","no ""gap"", none"\n'
