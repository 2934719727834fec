"""crystalformer crossval: every crystal tested once, by a model that has not seen its fold."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SIZES, refused

from crystalformer.app import cli, crossval, trainings
from crystalformer.data.folds import in_order, random_folds, read_folds
from crystalformer.data.ionic import ionic_crystals
from crystalformer.data.samples import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
SMALL = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=2", "--lr=0.02"]
NUMBER = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Crystals as Matbench's folds are handed on, one JSON record a line, the first without a structure."""
    folder = tmp_path_factory.mktemp("crossval")
    lines = []
    for number, x in enumerate(ionic_crystals(NUMBER, seed=1)):
        s = x.structure
        cell = {"lattice": s.lattice.matrix.tolist(), "frac_coords": s.frac_coords.tolist()}
        cell["species"] = [site.specie.symbol for site in s]
        record = {"id": f"salt-{number}", "fold": number % 3, "structure": cell if number else None}
        lines.append(json.dumps(record | {"energy": x.energy, "volume": s.volume}))
    (folder / "salts.jsonl").write_text("\n".join(lines))
    (folder / "folds.csv").write_text("".join(f"salt-{i},{i % 3}\n" for i in range(NUMBER)))
    return folder


def command(folder: Path, out: Path, folds: object, *more: object) -> list[str]:
    options = ("--data", folder / "salts.jsonl", "--target", "energy", "--folds", folds, "--out", out, *SMALL, *more)
    return ["crossval", *map(str, options)]


@pytest.fixture(scope="module")
def run(folder) -> Path:
    out = folder / "run"
    assert cli.main(command(folder, out, folder / "salts.jsonl", "--unit", "eV")) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_crystal_is_tested_by_the_training_without_its_fold(run, folder):
    found = rows(run / "predictions.csv")
    assert {row["id"]: int(row["fold"]) for row in found} == {f"salt-{i}": i % 3 for i in range(1, NUMBER)}
    assert len(found) == NUMBER - 1
    for fold in range(3):
        sets = json.loads((run / f"fold-{fold}.json").read_text())
        assert sorted(sets["test"]) == sorted(row["id"] for row in found if row["fold"] == str(fold))
        assert len(sets["val"]) == 1
    # The training of a fold is one of `train`.
    alone = folder / "alone"
    data = ["--data", str(folder / "salts.jsonl"), "--target", "energy", "--split", str(run / "fold-1.json")]
    assert cli.main(["train", *data, "--out", str(alone), *SMALL]) == 0
    tested = [row for row in rows(alone / "predictions.csv") if row["set"] == "test"]
    assert [row["energy_predicted"] for row in tested] == [x["energy_predicted"] for x in found if x["fold"] == "1"]


def test_errors_are_those_of_the_predictions(run):
    metrics = json.loads((run / "metrics.json").read_text())
    maes = []
    for fold, about in metrics["folds"].items():
        here = [row for row in rows(run / "predictions.csv") if row["fold"] == fold]
        errors = [float(row["energy_predicted"]) - float(row["energy"]) for row in here]
        maes.append(statistics.fmean(map(abs, errors)))
        assert about["mae"]["energy"] == pytest.approx(maes[-1])
        assert about["rmse"]["energy"] == pytest.approx(statistics.fmean(x**2 for x in errors) ** 0.5)
        assert about["crystals"] == len(here)
    assert metrics["mae"]["energy"] == pytest.approx(statistics.fmean(maes))
    assert metrics["mae_deviation"]["energy"] == pytest.approx(statistics.stdev(maes))
    card = (run / "README.md").read_text()
    assert (
        f"| energy (eV) | **mean** | {NUMBER - 1} | {statistics.fmean(maes):.4g} ± {statistics.stdev(maes):.4g} |"
        in card
    )
    assert "| folds | salts.jsonl |" in card
    assert str(run.parent) not in card
    for name in ("parity_energy.png", "learning_curve_energy.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in card


def test_the_learning_curve_is_the_mean_of_the_trainings(tmp_path):
    """Over the values that are known, and as far as all trainings go."""
    for name, text in (("one", "epoch,val_mae/x\n1,4.0\n2,nan\n3,8.0\n"), ("two", "epoch,val_mae/x\n1,2.0\n2,1.0\n")):
        (tmp_path / name).write_text(text)
    rows = crossval._mean_history([tmp_path / "one", tmp_path / "two"])
    assert rows == [{"epoch": 1, "val_mae/x": 3.0}, {"epoch": 2, "val_mae/x": 1.0}]


def test_targets_of_any_name(folder):
    """One is called as a column of the predictions, two are alike but for what predictions add."""
    records = [json.loads(line) for line in (folder / "salts.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"set": record["volume"], "energy_predicted": 2 * record["energy"]}
    (folder / "names.jsonl").write_text("\n".join(map(json.dumps, records)))
    out, names = folder / "names", ["set", "energy", "energy_predicted"]
    data = ["--data", str(folder / "names.jsonl"), "--target", *names, "--folds", "2", "--out", str(out)]
    assert cli.main(["crossval", *data, *SMALL, "--epochs=1"]) == 0
    mae = json.loads((out / "metrics.json").read_text())["mae"]
    folds = [json.loads((out / f"fold-{i}" / "metrics.json").read_text())["mae"]["test"] for i in range(2)]
    for name in names:
        assert mae[name] == pytest.approx(statistics.fmean(x[name] for x in folds))


def test_stopped_and_resumed(run, folder, capsys, monkeypatch):
    """Folds that are done are not trained again; the result is the same."""
    out, trained = folder / "stopped", []
    train = trainings.train

    def stop(folder, *args, **options):
        trained.append(folder.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(folder, *args, **options)

    monkeypatch.setattr(trainings, "train", stop)
    assert cli.main(command(folder, out, folder / "salts.jsonl", "--unit", "eV")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"crystalformer: stopped; go on with: crystalformer crossval --out {out} --resume"
    )
    assert cli.main(["crossval", "--out", str(out), "--resume", "--lr", "0.1"]) == 2
    assert f"lr must be 0.02, as when {out} was begun, not 0.1" in capsys.readouterr().err
    assert "must be a new or an empty folder" in refused(capsys, *command(folder, out, 3))
    sets = (out / "fold-0.json").read_bytes()
    (out / "fold-0.json").write_text('{"train": [], "val": [], "test": []}')
    assert cli.main(["crossval", "--out", str(out), "--resume"]) == 2
    assert "the crystals of fold-0 must be those of when the cross-validation began" in capsys.readouterr().err
    (out / "fold-0.json").write_bytes(sets)
    tested = (out / "fold-0" / "predictions.csv").read_bytes()
    assert cli.main(["crossval", "--out", str(out), "--resume"]) == 0
    assert trained == ["fold-0", "fold-1", "fold-1", "fold-2"]
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    for damaged in (b"\n".join(tested.split(b"\n")[:-2]), b"\xff"):
        (out / "fold-0" / "predictions.csv").write_bytes(damaged)
        assert cli.main(["crossval", "--out", str(out), "--resume"]) == 2
        assert "predictions.csv: " in capsys.readouterr().err


def test_what_cannot_be_cross_validated(folder, capsys, tmp_path):
    out = tmp_path / "out"
    text = (folder / "folds.csv").read_text()
    for name, content, message in (
        ("unknown", text + "salt-99,0\n", "has crystals that the data do not have: salt-99 (1 crystal)"),
        ("few", text.replace("salt-5,2\n", ""), "has no fold of: salt-5 (1 crystal)"),
        ("twice", text + "salt-5,0\n", "must have one fold for each crystal, but 'salt-5' is in 2 and 0"),
        ("empty", text.replace("salt-5,2", "salt-5,"), "has no fold of: salt-5 (1 crystal)"),
        ("case", text.replace(",2", ",a").replace(",1", ",A"), "folds must differ by more than case"),
        (
            "alone",
            text.replace(",2", ",1").replace(",1", ",0").replace("salt-5,0", "salt-5,1"),
            "to validate, but there are 1",
        ),
        ("one", text.replace(",2", ",0").replace(",1", ",0"), "must have from 2 to 1000 folds, not 1"),
        ("paths", text.replace(",2", ",../2"), "folds must be numbers or short names, which become names of folders"),
        ("names", "id,part\nsalt-1,0\n", "has no column 'fold'"),
    ):
        (tmp_path / name).with_suffix(".csv").write_text(content)
        assert message in refused(capsys, *command(folder, out, tmp_path / f"{name}.csv")), name
    for more, message in (
        (("--folds", "1"), "folds must be from 2 to 17, not 1, of 17 crystals"),
        (("--folds", "18"), "folds must be from 2 to 17, not 18, of 17 crystals"),
        (("--folds", tmp_path / "no.csv"), "no.csv: no such file"),
        (("--val_fraction", "1"), "val_fraction must be"),
        (("--val_fraction", "0.99"), "folds must leave crystals to train and, by val_fraction=0.99, to validate"),
        (("--cache", out / "cache"), "cache must be a folder outside of out"),
        (("--jobs", "0"), "jobs must be an integer, at least 1 and at most 1024, not 0"),
        (("--devices", "2"), "unrecognized arguments: --devices 2"),
        (("--split", "x"), "unrecognized arguments: --split x"),
    ):
        assert message in refused(capsys, *command(folder, out, 3, *more)), message
    assert not out.exists()
    assert cli.main(command(folder, out, 2, "--lr", "9e5", "--epochs", "3")) == 1
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_a_bad_row_that_repeats_an_id_costs_no_crystal(folder, capsys):
    text, data, out = (folder / "salts.jsonl").read_text(), folder / "repeated.jsonl", folder / "repeated"
    data.write_text(f"{text}\n{text.splitlines()[4]}")
    assert cli.main([*command(folder, out, 2), "--data", str(data), "--epochs=1"]) == 0
    found = {row["id"]: row["fold"] for row in rows(out / "predictions.csv")}
    assert sorted(found) == sorted(f"salt-{i}" for i in range(1, NUMBER))
    fold = f"fold-{found['salt-4']}"
    capsys.readouterr()
    assert cli.main(["evaluate", str(out / fold), "--data", str(data), "--split", str(out / f"{fold}.json")]) == 1
    tested = sum(x == found["salt-4"] for x in found.values())
    assert f"{tested} crystals, 2 rows left out" in capsys.readouterr().err


def test_random_folds_depend_on_ids_and_seed_alone():
    ids = [f"mp-{i}" for i in range(23)]
    found = random_folds(ids, 5, seed=3)
    assert random_folds(ids[::-1], 5, seed=3) == found
    assert random_folds(ids, 5, seed=4) != found
    sizes = [[*found.values()].count(x) for x in in_order([*found.values()])]
    assert sizes == [5, 5, 5, 4, 4]
    assert in_order(["10", "b", "9", "a", "9"]) == ["9", "10", "a", "b"]


def test_a_table_of_folds_may_have_structures(folder):
    found = read_folds(folder / "salts.jsonl")
    assert found == read_folds(folder / "folds.csv")
    (folder / "floats.csv").write_text("".join(f"{id},{fold}.0\n" for id, fold in found.items()))
    assert found == read_folds(folder / "floats.csv")
    with pytest.raises(DataError, match="no such file"):
        read_folds(folder / "none.csv")


def test_folds_side_by_side(run, folder):
    out = folder / "side-by-side"
    assert cli.main(command(folder, out, folder / "salts.jsonl", "--unit", "eV", "--jobs", "2")) == 0
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert "epoch   2 of 2" in (out / "fold-1.log").read_text()


def test_one_fold_of_several_at_once_that_fails(folder, capsys):
    out = folder / "failed"
    options = ("--jobs", "2", "--lr", "9e5", "--epochs", "3")
    assert cli.main(command(folder, out, folder / "salts.jsonl", *options)) == 1
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_several_at_once_end_on_a_signal_and_go_on(run, folder, number):
    """All processes end, with what their last epoch has written."""
    out = folder / f"stopped-{number}"
    arguments = command(folder, out, folder / "salts.jsonl", "--unit", "eV", "--jobs", "3", "--epochs", "100")
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which jobs in the background do not have
        "from crystalformer.app import cli\n"
        "sys.exit(cli.program())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not all((out / f"fold-{i}" / "checkpoints" / "last.ckpt").exists() for i in range(3)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert error.splitlines()[-1] == f"crystalformer: stopped; go on with: crystalformer crossval --out {out} --resume"
    with pytest.raises(ProcessLookupError):  # of the session, no process is left
        os.killpg(process.pid, 0)
    for fold in range(3):
        lines = (out / f"fold-{fold}.log").read_text().splitlines()
        assert lines[-1].startswith("crystalformer: stopped; go on with: crystalformer train")
