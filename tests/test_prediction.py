"""`crystalformer predict` at scale: rows as they come, going on after a stop, and what the training did not have."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from crystal_files import pair, write_jsonl, xyz
from small_training import SMALL

import crystalformer as cf
from crystalformer.app import cli, prediction_stream
from crystalformer.app.outside import NAMED, Guesses, Outside
from crystalformer.app.prediction_file import whole_rows
from crystalformer.app.predictor import Predictor
from crystalformer.data.dataset import CrystalDataset
from crystalformer.model.structures import read_structure
from crystalformer.training import Regression

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
CONFIG = replace(SMALL, target_names=("energy",), elements=(11, 17), largest_cell=2, atom_volumes=(20.0, 25.0))


def salt(edge: float = 5.64) -> Any:
    structure = pair()[0].copy()
    structure.scale_lattice(edge**3)
    return structure


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prediction") / "model"
    torch.manual_seed(0)
    cf.Crystalformer(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def salts(tmp_path, monkeypatch) -> Path:
    """40 crystals that differ, of which one is no crystal and another repeats an id; predicted 8 at a time."""
    monkeypatch.setattr(prediction_stream, "STRUCTURES_AT_ONCE", 8)
    records = [{"id": f"c{i}", "structure": salt(5.5 + i / 100).as_dict()} for i in range(40)]
    records[5]["structure"] = {"sites": []}
    records[12]["id"] = "c11"
    return write_jsonl(tmp_path / "salts.jsonl", records)


def test_what_the_training_did_not_have(model, tmp_path, capsys) -> None:
    predictor = cf.load(model)
    skewed = pair()[1]
    large = salt() * (2, 1, 1)  # a supercell is no larger
    distorted = large.copy()
    distorted.translate_sites(0, [0.01, 0.02, 0.03])
    found = predictor.outside([salt(), large, distorted, salt(6.5), skewed])
    assert found[0] == found[1] == Outside()
    assert found[2] == Outside((), 16, 0.0)
    assert found[3] == Outside((), 0, pytest.approx(6.5**3 / 8))
    assert found[4].elements == (8, 26, 98)
    assert [str(x) for x in found[:4]] == ["", "", "16 atoms", "34.3 Å³ an atom"]
    assert str(found[4]).startswith("element O; element Fe; element Cf; 3 atoms")
    old = replace(CONFIG, elements=(), largest_cell=0, atom_volumes=())  # of a model that does not know
    assert Outside.of(read_structure(skewed, "x"), old) == Outside()

    (tmp_path / "a.extxyz").write_text(xyz([salt(), skewed, distorted, salt(6.5)]))
    assert cli.main(["predict", str(model), str(tmp_path / "a.extxyz")]) == 0
    out, err = capsys.readouterr()
    told = [row["outside"] for row in csv.DictReader(out.splitlines())]
    assert told == [str(found[i]) for i in (0, 4, 2, 3)]
    guess = "crystalformer: no crystal of the training had"
    assert [line for line in err.splitlines() if line.startswith(guess)] == [
        f"{guess} more than 2 atoms in its primitive cell, predictions are guesses for a:1, a:2",
        *(f"{guess} {x}, predictions are guesses for a:1" for x in ("O", "Fe", "Cf")),
        f"{guess} less than 20 or more than 25 Å³ an atom, predictions are guesses for a:3",
    ]
    guesses = Guesses(CONFIG)
    guesses.add([f"c{i}" for i in range(NAMED + 5000)], itertools.repeat(Outside((54,)), NAMED + 5000))
    (line,) = guesses.lines()
    assert line.endswith("c8, c9 and 5,000 more")


@pytest.mark.parametrize("symmetry_tol", [0.0, 1e-5])
def test_a_training_keeps_what_it_has_seen(symmetry_tol: float) -> None:
    from crystalformer.data import build_crystals

    structures = [salt() * (2, 1, 1), salt(6.0)]
    model = cf.Crystalformer(SMALL)
    crystals = build_crystals(structures, model, symmetry_tol=symmetry_tol)
    data = CrystalDataset(crystals, torch.tensor([[0.0], [1.0]]), model)
    atoms = 2 if symmetry_tol else 16
    volumes = pytest.approx((5.64**3 / 8, 6.0**3 / 8), rel=1e-6)
    assert data.seen == {"elements": (11, 17), "largest_cell": atoms, "atom_volumes": volumes}
    task = Regression(model, torch.zeros(1), torch.ones(1))
    config = task.finish(**data.seen).config
    assert (config.elements, config.largest_cell, config.atom_volumes) == ((11, 17), atoms, volumes)
    assert [str(x) for x in Predictor(model).outside(structures)] == ["", ""]
    config = task.finish((3,), 99, (1.0, 30.0)).config  # it learns anew
    assert (config.elements, config.largest_cell) == ((3, 11, 17), 99)
    assert config.atom_volumes == (1.0, 30.0)
    model.config = replace(config, elements=(), largest_cell=0, atom_volumes=())  # and before nobody knew
    config = task.finish(**data.seen).config
    assert (config.elements, config.largest_cell, config.atom_volumes) == ((), 0, ())


def test_wrong_ranges_are_refused() -> None:
    for values, message in (
        ({"largest_cell": -1}, "largest_cell must be an integer, at least 0, not -1"),
        ({"atom_volumes": (1.0,)}, "atom_volumes must be two numbers, the least first, not 1.0"),
        ({"atom_volumes": (2.0, 1.0)}, "atom_volumes must be two numbers, the least first, not 2.0, 1.0"),
        ({"atom_volumes": (0.0, 1.0)}, "atom_volumes must be larger than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **values)


def test_rows_are_those_of_the_predictor(model, salts, capsys, tmp_path) -> None:
    out = tmp_path / "out.csv"
    assert cli.main(["predict", str(model), str(salts), "--out", str(out)]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "row" in line]
    assert "salts.jsonl, row 6: c5: " in err[0]
    assert err[1].endswith("salts.jsonl, row 13: c11: the same id as salts.jsonl, row 12")
    assert err[-1] == "crystalformer: 2 of 40 rows could not be predicted"
    good = [i for i in range(40) if i not in (5, 12)]
    rows = list(csv.reader(out.read_text().splitlines()))
    assert rows[0] == ["id", "energy", "outside"]
    assert [row[0] for row in rows[1:]] == [f"c{i}" for i in good]
    expected = cf.load(model).predict([salt(5.5 + i / 100) for i in good])[:, 0].tolist()
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(expected, rel=1e-5)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.csv"]


def test_a_structure_without_lists_is_a_bad_row(model, tmp_path, capsys, monkeypatch) -> None:
    prepared = Predictor._prepared

    def refuse(self, crystals):
        if any(len(x.positions) > 8 for x in crystals):
            raise ValueError("images must number less")
        return prepared(self, crystals)

    monkeypatch.setattr(Predictor, "_prepared", refuse)
    (tmp_path / "a.extxyz").write_text(xyz([salt(), salt() * (2, 1, 1), salt(6.0)]))
    assert cli.main(["predict", str(model), str(tmp_path / "a.extxyz")]) == 1
    out, err = capsys.readouterr()
    assert [row["id"] for row in csv.DictReader(out.splitlines())] == ["a:0", "a:2"]
    assert "crystalformer: a:1: images must number less" in err.splitlines()


def test_files_that_repeat_an_id(model, tmp_path, capsys) -> None:
    one, two, other = (tmp_path / name for name in ("one.jsonl", "two.jsonl", "other.jsonl"))
    for path, ids in ((one, "ab"), (two, "bc"), (other, "de")):
        write_jsonl(path, [{"id": x, "structure": salt().as_dict()} for x in ids])
    for files, expected in (
        ((one, other), ["a", "b", "d", "e"]),
        ((one, two), [f"{one}:a", f"{one}:b", f"{two}:b", f"{two}:c"]),
    ):
        assert cli.main(["predict", str(model), *map(str, files)]) == 0
        assert [row["id"] for row in csv.DictReader(capsys.readouterr().out.splitlines())] == expected
    assert "no.cif: no such file" in refused(capsys, "predict", model, one, tmp_path / "no.cif")  # before any row


# Going on -------------------------------------------------------------------------------------------------------------


def stopped(model: Path, salts: Path, out: Path, monkeypatch, batches: int = 2) -> None:
    """A prediction that a signal ends after some batches."""
    predict, left = Predictor.predict, iter(range(batches))

    def stop(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", stop)
        assert cli.main(["predict", str(model), str(salts), "--out", str(out)]) == 130


@pytest.mark.parametrize("cut", [0, 3, 40, 10**6])
def test_resume_goes_on_after_the_last_whole_row(cut: int, model, salts, tmp_path, monkeypatch, capsys) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert cli.main(["predict", str(model), str(salts), "--out", str(whole)]) == 1
    stopped(model, salts, out, monkeypatch)
    assert len(list(whole_rows(out))) == 17
    assert out.read_bytes() == whole.read_bytes()[: out.stat().st_size]
    os.truncate(out, max(0, out.stat().st_size - cut))
    predicted = []
    predict = Predictor.predict
    monkeypatch.setattr(
        Predictor, "predict", lambda self, x, *more: predicted.append(len(x)) or predict(self, x, *more)
    )
    assert cli.main(["predict", str(model), str(salts), "--out", str(out), "--resume"]) == 1
    assert capsys.readouterr().err.endswith("crystalformer: 2 of 40 rows could not be predicted\n")
    assert sum(predicted) == {0: 22, 3: 23, 40: 24}.get(cut, 38)  # of 38
    rows, expected = ([row for row, _ in whole_rows(path)] for path in (out, whole))
    assert [(row[0], row[2]) for row in rows] == [(row[0], row[2]) for row in expected]
    values = [float(row[1]) for row in expected[1:]]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(values, rel=1e-5)
    assert not (tmp_path / "out.csv.unfinished.json").exists()


def test_only_what_was_begun_is_gone_on_with(model, salts, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out.csv"
    arguments = ("--out", out, "--resume")
    stopped(model, salts, out, monkeypatch)
    kept, state = out.read_bytes(), tmp_path / "out.csv.unfinished.json"
    other = tmp_path / "other"
    cf.Crystalformer(CONFIG).save_pretrained(other)
    assert "model must be the same as when" in refused(capsys, "predict", other, salts, *arguments)
    again = ("predict", model, salts, *arguments)
    assert "symmetry_tol must be the same" in refused(capsys, *again, "--symmetry_tol", "0.5")
    assert "files must be the same" in refused(capsys, "predict", model, salts, salts, *arguments)
    out.write_bytes(kept.replace(b"id,energy,", b"id,volume,", 1))
    assert "must have the columns id, energy, outside, not id, volume, outside" in refused(capsys, *again)
    out.write_bytes(kept.replace(b"\nc3,", b"\nd3,"))
    assert cli.main(list(map(str, again))) == 2
    assert f"{out} cannot be resumed: its row 'd3' is not in the files" in capsys.readouterr().err.splitlines()[-1]
    out.write_bytes(kept)
    text = state.read_text()
    state.write_text(text.replace("salts", "malts"))
    assert "damaged" in refused(capsys, *again)
    state.unlink()
    assert f"resume must find {state}" in refused(capsys, *again)
    assert out.read_bytes() == kept
    out.unlink()  # nothing is there to go on with: it begins
    assert cli.main(list(map(str, again))) == 1
    assert len(list(whole_rows(out))) == 39


def test_an_unfinished_file_is_not_taken_for_complete(model, salts, tmp_path, monkeypatch) -> None:
    """By a later prediction that has no row to write."""
    out, state = tmp_path / "out.csv", tmp_path / "out.csv.unfinished.json"
    stopped(model, salts, out, monkeypatch)
    kept = out.read_bytes(), state.read_bytes()
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"id": "a", "structure": {"sites": []}}])
    assert cli.main(["predict", str(model), str(bad), "--out", str(out)]) == 1
    assert (out.read_bytes(), state.read_bytes()) == kept


def test_rows_of_ids_with_anything_in_them(tmp_path) -> None:
    path = tmp_path / "a.csv"
    rows = [["id", "x"], ["a\nb", "1"], ['a"b', "2"], ["a,b", "3"]]
    from crystalformer.common.storage import csv_text

    text = csv_text(rows).encode()
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        found = list(whole_rows(path))
        assert [row for row, _ in found] == rows[: len(found)]
        assert found == [] or text[: found[-1][1]].endswith(b"\n")
    assert len(found) == 4


@pytest.mark.skipif(shutil.which("ps") is None, reason="ps says which processes are left")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_its_processes(number: int, code: int, model, tmp_path) -> None:
    """With whole rows, in one line."""
    (tmp_path / "a.extxyz").write_text(xyz([salt()]) * 6000)
    out = tmp_path / "out.csv"
    program = (
        "import signal, sys\n"
        "from crystalformer.app import cli; from crystalformer.data import streams\n"
        "streams.SECONDS_ALONE = 0.0\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which jobs in the background do not have
        "    sys.exit(cli.program())"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "predict", model, tmp_path / "a.extxyz", "--out", out, "--workers", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 100) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert time.monotonic() - began < 15
    assert err.splitlines()[-1] == "crystalformer: stopped"
    assert "Traceback" not in err
    rows = [row for row, _ in whole_rows(out)]
    assert 1 < len(rows) < 6000
    assert out.read_bytes().endswith(b"\n")
    assert json.loads((tmp_path / "out.csv.unfinished.json").read_text())["files"] == [str(tmp_path / "a.extxyz")]
    processes = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout
    left = [state for group, state in map(str.split, processes.splitlines()) if group == str(process.pid)]
    assert all(state.startswith("Z") for state in left)  # ended, if nobody has looked
