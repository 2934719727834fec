"""Ensembles: trained, combined, loaded; their deviations held against their errors."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import SIZES, refused
from crystal_files import cif, write_csv

import crystalformer
from crystalformer.app import calibration, cli
from crystalformer.app.predictor import Predictor
from crystalformer.data.ionic import ionic_crystals

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
SMALL = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=2", "--lr=0.02"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ensemble") / "salts.csv"
    rows = [[f"salt-{i}", x.energy, cif(x.structure)] for i, x in enumerate(ionic_crystals(40, seed=1))]
    return write_csv(path, [["id", "energy", "cif"], *rows])


@pytest.fixture(scope="module")
def run(data) -> Path:
    out = data.parent / "run"
    assert cli.main(command(data, out)) == 0
    return out


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--data", str(data), "--target", "energy", "--ensemble", "3", "--out", str(out), *SMALL, *more]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_members_differ_in_their_seed_alone(run, data):
    alone = data.parent / "alone"
    options = [x for x in command(data, alone, "--seed", "2", "--split-seed", "0") if x not in ("--ensemble", "3")]
    assert cli.main(options) == 0
    assert (alone / "predictions.csv").read_bytes() == (run / "member-2" / "predictions.csv").read_bytes()
    assert (run / "member-0" / "predictions.csv").read_bytes() != (run / "member-1" / "predictions.csv").read_bytes()


def test_the_mean_predicts_and_the_deviation_fits_the_validation_errors(run):
    members = [rows(run / f"member-{i}" / "predictions.csv") for i in range(3)]
    scale = json.loads((run / "metrics.json").read_text())["deviation_scale"]["energy"]
    ratios = []
    for row, *found in zip(rows(run / "predictions.csv"), *members, strict=True):
        predicted = torch.tensor([float(x["energy_predicted"]) for x in found], dtype=torch.float64)
        assert float(row["energy_predicted"]) == pytest.approx(float(predicted.mean()))
        assert float(row["energy_deviation"]) == pytest.approx(scale * float(predicted.std()))
        if row["set"] == "val":
            error = float(row["energy_predicted"]) - float(row["energy"])
            ratios.append(error / float(row["energy_deviation"]))
    assert torch.tensor(ratios).square().mean() == pytest.approx(1)


def test_side_by_side_and_resumed(run, data):
    out = data.parent / "side-by-side"
    assert cli.main(command(data, out, "--jobs", "3")) == 0
    for name in ("predictions.csv", "ensemble.json"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    (out / "member-1" / "metrics.json").unlink()
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()


def test_loaded_as_one_model(run, data, tmp_path, capsys):
    assert cli.main(["predict", str(run), str(data), "--out", str(tmp_path / "out.csv")]) == 0
    found = {row["id"]: row for row in rows(tmp_path / "out.csv")}
    for row in rows(run / "predictions.csv"):
        for name in ("energy_predicted", "energy_deviation"):
            said = found[row["id"]][name.removesuffix("_predicted")]
            assert float(said) == pytest.approx(float(row[name]), rel=1e-4, abs=1e-6)
    predictor = crystalformer.load([run / "member-0", run / "member-2"])
    structures = [x.structure for x in ionic_crystals(3, seed=9)]
    alone = [crystalformer.load(run / f"member-{i}").predict(structures) for i in (0, 2)]
    torch.testing.assert_close(predictor.predict(structures), torch.stack(alone).mean(0))
    torch.testing.assert_close(predictor.predict_deviation(structures)[1], torch.stack(alone).std(0))


def test_cross_validation_of_ensembles(data, tmp_path):
    out = tmp_path / "crossval"
    options = command(data, out, "--folds", "2", "--jobs", "2")
    assert cli.main(["crossval", *options[1:]]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    for fold in range(2):
        of_members = [json.loads((out / f"fold-{fold}/member-{i}/metrics.json").read_text()) for i in range(3)]
        mean = sum(x["mae"]["test"]["energy"] for x in of_members) / 3
        assert metrics["folds"][str(fold)]["members_mae"]["energy"] == pytest.approx(mean)
        here = [x for x in rows(out / "predictions.csv") if x["fold"] == str(fold)]
        mae = sum(abs(float(x["energy"]) - float(x["energy_predicted"])) for x in here) / len(here)
        assert metrics["folds"][str(fold)]["mae"]["energy"] == pytest.approx(mae)
        assert all(float(x["energy_deviation"]) > 0 for x in here)
    assert "| of one member |" in (out / "README.md").read_text()


def test_what_is_no_ensemble(data, tmp_path, capsys):
    for more, message in (
        (("--ensemble", "0"), "ensemble must be an integer, at least 2 and at most 1000, not 0"),
        (("--jobs", "0"), "jobs must be an integer, at least 1"),
        (("--ensemble", "1", "--jobs", "2"), "ensemble must be given with jobs=2"),
    ):
        assert message in refused(capsys, *command(data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_calibration_of_normal_errors():
    """Deviations three times too small are found to be, and once multiplied cover what they should."""
    rng = torch.Generator().manual_seed(0)
    deviations = torch.rand(20_000, generator=rng, dtype=torch.float64) + 0.1
    errors = 3 * deviations * torch.randn(20_000, generator=rng, dtype=torch.float64)
    scale = calibration.scale(errors, deviations)
    assert scale == pytest.approx(3, rel=0.02)
    found = calibration.summary(errors, scale * deviations)
    assert found["within_1"] == pytest.approx(0.6827, abs=0.01)
    assert found["within_2"] == pytest.approx(0.9545, abs=0.01)
    assert found["miscalibration"] < 0.01
    assert calibration.summary(errors, deviations)["miscalibration"] > 0.2
    assert 0.3 < found["rank_correlation"] < 0.9
    assert "rank_correlation" not in calibration.summary(errors, torch.ones_like(errors))  # which have no ranks
    with pytest.raises(ValueError, match="must differ"):
        calibration.scale(errors, torch.zeros_like(errors))


def test_classes_from_a_trained_model(run, data, tmp_path):
    """Each member starts from the same model; deviations of probabilities are as they are."""
    header, *table = csv.reader(data.read_text().splitlines(keepends=True))
    classes = [[id, i % 2, text] for i, (id, _, text) in enumerate(table)]
    file, out = write_csv(tmp_path / "classes.csv", [header, *classes]), tmp_path / "out"
    start = run / "member-0"
    options = ["--from", str(start), "--freeze", "embedding", "--loss", "bce", "--jobs", "2"]
    assert (
        cli.main(
            ["train", "--data", str(file), "--target", "energy", "--ensemble", "2", *options, "--out", str(out), *SMALL]
        )
        == 0
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["deviation_scale"] == {"energy": 1.0}
    assert "calibration" not in metrics
    assert 0 <= metrics["auc"]["test"]["energy"] <= 1
    begun = crystalformer.load(start).model.embedding.weight
    members = [crystalformer.load(out / f"member-{i}").model for i in range(2)]
    assert all(torch.equal(x.embedding.weight, begun) for x in members)
    assert not torch.equal(*(x.readout[-1].weight for x in members))


def test_what_an_ensemble_is_no_model_for(run, data, tmp_path, capsys):
    arguments = ["train", "--data", str(data), "--target", "energy", "--from", str(run), "--out", str(tmp_path / "out")]
    assert "the model to start from must be a single one, not an ensemble" in refused(capsys, *arguments)
    arguments = ["train", "--out", str(run), "--resume", "--ensemble", "1"]
    assert f"out must be the folder of a single training, not {run}" in refused(capsys, *arguments)
    with pytest.raises(ValueError, match="the model of a calculator must be a single one"):
        crystalformer.ase.Calculator(run, per_atom=True, factor=1.0)
    with pytest.raises(ValueError, match=r"path must be folders of single models, not .*run, which"):
        crystalformer.load([run, run / "member-0"])
    assert "target must not be energy_deviation beside energy" in refused(
        capsys, *command(data, tmp_path / "out", "--target", "energy", "energy_deviation")
    )


def test_damaged_ensembles(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "member-1")
    with pytest.raises(FileNotFoundError, match="must have all members of its ensemble, but member-1 is not there"):
        crystalformer.load(copy)
    for text in ("3", "{}", '{"members": [1], "deviation_scale": 2}'):
        (copy / "ensemble.json").write_text(text)
        with pytest.raises(ValueError, match="must say members and deviation_scale of an ensemble"):
            crystalformer.load(copy)
    about = {"members": ["member-0", "member-2"], "deviation_scale": {"volume": 2.0}}
    (copy / "ensemble.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"ensemble.json must have the targets energy, not volume"):
        crystalformer.load(copy)
    (copy / "ensemble.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"of a complete ensemble, but that in .* was stopped"):
        crystalformer.load(copy)


def test_outside_is_what_one_member_has_not_seen(run):
    known = crystalformer.load(run)
    first, other = known.members[:2]
    few = dataclasses.replace(other.config, elements=other.config.elements[1:])
    other.config = few
    both = Predictor([first, other])
    assert both.seen.elements == few.elements
    assert Predictor([other, first]).seen.elements == few.elements
