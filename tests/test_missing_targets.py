"""Targets that are not known of every crystal: read, learnt, measured and written where they are known."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SIZES, refused
from crystal_files import cif, pair, write_csv, write_json
from small_training import SMALL

from crystalformer import Crystalformer
from crystalformer.app import cli
from crystalformer.data import DataError, read_samples
from crystalformer.data.dataset import BoundedBatches
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import CrystalDataset, Regression, fit, predict, standardisation

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
OPTIONS = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=2", "--lr=0.02"]
NUMBER, NAN = 24, math.nan


def known(number: int) -> bool:
    """Whether the volume of a crystal is known: of half of them."""
    return number % 2 == 0


def write_salts(path: Path, known=known) -> Path:
    rows = [["id", "energy", "volume", "cif"]]
    for number, x in enumerate(ionic_crystals(NUMBER, seed=1)):
        volume = x.structure.volume if known(number) else ""
        rows.append([f"salt-{number}", x.energy, volume, x.structure.remove_oxidation_states().to(fmt="cif")])
    return write_csv(path, rows)


@pytest.fixture(scope="module")
def salts(tmp_path_factory) -> Path:
    return write_salts(tmp_path_factory.mktemp("missing") / "salts.csv")


def test_a_row_with_one_of_its_targets_is_read(tmp_path):
    good = cif(pair()[0])
    values = [("1", "2"), ("1", ""), (" ", "none"), ("null", "2"), ("nan", "2"), ("1", "inf"), ("1", "x")]
    rows = [["id", "cif", "a", "b"], *([f"x{i}", good, *x] for i, x in enumerate(values))]
    samples, problems = read_samples(write_csv(tmp_path / "t.csv", rows), ["a", "b"])
    assert samples.ids == ("x0", "x1", "x3")
    torch.testing.assert_close(
        samples.targets, torch.tensor([[1, 2], [1, NAN], [NAN, 2]]).double(), equal_nan=True, rtol=0, atol=0
    )
    assert {x.id: x.reason for x in problems} == {
        "x2": "a, b are missing",
        "x4": "a must be finite, not nan",
        "x5": "b must be finite, not inf",
        "x6": "b must be a number, not 'x'",
    }
    structure = pair()[0].as_dict()
    values = [(1.0, None), (None, None), (NAN, 1.0)]
    records = [{"id": i, "structure": structure, "a": a, "b": b} for i, (a, b) in enumerate(values)]
    samples, problems = read_samples(write_json(tmp_path / "t.json", records), ["a", "b"])
    assert samples.ids == ("0",)
    assert [x.reason for x in problems] == ["a, b are missing", "a must be finite, not nan"]
    with pytest.raises(DataError, match="row 2: 1: a, b are missing"):
        read_samples(tmp_path / "t.json", ["a", "b"], strict=True)


def test_only_what_is_known_counts():
    mean, deviation = standardisation(torch.tensor([[1.0, 5.0], [3.0, NAN], [NAN, 7.0]]))
    assert (mean.tolist(), deviation.tolist()) == ([2.0, 6.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"a known value of each target, but targets\[:, 1\] are all NaN"):
        standardisation(torch.tensor([[1.0, NAN]]))

    config = replace(SMALL, num_targets=2, dropout=0.0)
    torch.manual_seed(0)
    model = Crystalformer(config)
    crystals = ionic_crystals(9, seed=1)
    targets = torch.tensor([[x.energy, x.structure.volume] for x in crystals], dtype=torch.float64)
    targets[2:7, 1] = NAN
    data = CrystalDataset([x.structure for x in crystals], targets, model)
    model.calibrate(next(iter(data.loader(9))).crystals)
    mean, deviation = standardisation(targets)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    with torch.no_grad():
        errors = (model(next(iter(data.loader(9))).crystals) - (targets - mean) / deviation).abs()
    (row,) = fit(Regression(model, mean, deviation, ("e", "v"), lr=1e-9), data.loader(9), data.loader(4), epochs=1)
    assert row["train_loss"] == pytest.approx(float(errors.nanmean()), rel=1e-5)
    assert row["val_loss"] == pytest.approx(float(errors.nanmean()), rel=1e-5)
    for name, error in zip(("e", "v"), errors.nanmean(0) * deviation, strict=True):
        assert [row[f"{stage}_mae/{name}"] for stage in ("train", "val")] == pytest.approx([float(error)] * 2, rel=1e-5)
    assert all(x.isfinite().all() for x in model.parameters())
    assert any(not torch.equal(x, before[name]) for name, x in model.named_parameters())
    # A training on the crystals of one target alone sees no value of the other.
    alone = CrystalDataset(data.crystals, torch.stack([targets[:, 0], torch.full((9,), NAN)], 1), model)
    (row,) = fit(Regression(model.train(), mean, deviation, ("e", "v")), data.loader(9), alone.loader(4), epochs=1)
    assert math.isnan(row["val_mae/v"])
    assert row["val_mae/e"] == pytest.approx(
        float(((predict(model, alone.loader(9)) - targets)[:, 0]).abs().mean()), rel=1e-4
    )


def test_each_known_value_has_one_weight_on_any_number_of_processes():
    counts = [1, 2, 2, 1, 2]
    batches = BoundedBatches([5, 1, 1, 9, 2], 3, counts=counts)
    for world in (1, 2, 4):
        for batch in batches.batches:
            shards = [batches.shard(batch, rank, world) for rank in range(world)]
            total = sum(w * counts[i] for x in shards for i, w in zip(x.indices, x.weights, strict=True))
            assert total == pytest.approx(world)
            assert len({w for x in shards for w in x.weights if w}) == 1


def test_targets_of_a_data_set():
    model, structure = Crystalformer(SMALL), ionic_crystals(1)[0].structure
    with pytest.raises(ValueError, match=r"targets must be finite, but targets\[0, 1\] is inf"):
        CrystalDataset([structure], torch.tensor([[NAN, math.inf]]), model)
    with pytest.raises(ValueError, match=r"a known value in each row, but targets\[0\] is \[nan, nan\]"):
        CrystalDataset([structure], torch.tensor([[NAN, NAN]]), model)


def test_train_and_evaluate(salts, tmp_path, capsys):
    out = tmp_path / "run"
    data = ["--data", str(salts), "--target", "energy", "volume"]
    fractions = ["--fractions", "0.5", "0.25", "0.25"]
    assert cli.main(["train", *data, *fractions, "--out", str(out), *OPTIONS]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    split = json.loads((out / "split.json").read_text())
    given = {row["id"]: row for row in csv.DictReader(salts.read_text().splitlines())}
    for part, ids in ((part, split[part]) for part in ("train", "val", "test")):
        volumes = sum(given[id]["volume"] != "" for id in ids)
        assert metrics["values"][part] == {"energy": len(ids), "volume": volumes}
    told = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert sum(row["volume"] == "" for row in told) > 0
    assert all((row["volume"] == "") == (given[row["id"]]["volume"] == "") for row in told)
    assert all(math.isfinite(float(row["volume_predicted"])) for row in told)
    mean = sum(float(given[id]["volume"] or 0) for id in split["train"]) / metrics["values"]["train"]["volume"]
    assert metrics["baseline"]["volume"] == pytest.approx(mean)
    tested = [row for row in told if row["set"] == "test" and row["volume"]]
    errors = [abs(float(row["volume_predicted"]) - float(row["volume"])) for row in tested]
    assert metrics["mae"]["test"]["volume"] == pytest.approx(sum(errors) / len(errors))
    baseline = sum(abs(mean - float(row["volume"])) for row in tested) / len(tested)
    assert metrics["baseline_mae"]["test"]["volume"] == pytest.approx(baseline)
    card = (out / "README.md").read_text()
    assert f"| volume | test | {len(tested)} | " in card
    assert f"\nvolume is known of {metrics['values']['train']['volume']} train, " in card

    capsys.readouterr()
    assert cli.main(["evaluate", str(out), *data[:2], "--split", str(out / "split.json")]) == 0
    (line,) = (x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("volume"))
    assert float(line[1]) == pytest.approx(metrics["mae"]["test"]["volume"], rel=1e-3)
    assert line[5] == str(len(tested))


def test_cross_validation(salts, tmp_path):
    out = tmp_path / "crossval"
    data = ["--data", str(salts), "--target", "energy", "volume", "--folds", "2", "--val_fraction", "0.2"]
    assert cli.main(["crossval", *data, "--out", str(out), *OPTIONS, "--epochs=1"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["values"] == {"energy": NUMBER, "volume": NUMBER // 2}
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert sum(row["volume"] == "" for row in rows) == NUMBER // 2
    errors = [abs(float(x["volume"]) - float(x["volume_predicted"])) for x in rows if x["volume"] and x["fold"] == "0"]
    assert metrics["folds"]["0"]["mae"]["volume"] == pytest.approx(sum(errors) / len(errors))
    assert f"| volume | **mean** | {NUMBER // 2} | " in (out / "README.md").read_text()


def test_a_target_that_no_crystal_of_a_set_has(tmp_path, capsys):
    path = write_salts(tmp_path / "salts.csv", lambda number: number == 0)
    ids = [f"salt-{number}" for number in range(NUMBER)]
    sets = {"train": ids[:16], "val": ids[16:20], "test": ids[20:]}
    split, command = tmp_path / "split.json", ["train", "--data", path, "--target", "energy", "volume"]
    split.write_text(json.dumps(sets))
    command = [str(x) for x in [*command, "--split", split, "--out", tmp_path / "out", *OPTIONS]]
    assert cli.main(command) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["mae"]["test"]) == ["energy"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| volume | test | 0 | - | - | - | - |" in card
    assert "parity_volume" not in card
    split.write_text(json.dumps({**sets, "train": ids[4:16], "val": ids[:4]}))
    command[command.index("--out") + 1] = str(tmp_path / "new")
    assert "train must hold a known value of each target, but none of volume" in refused(capsys, *command)
