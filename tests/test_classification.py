"""Losses by name; classes, whose probability is learnt: from the file over training and report to predictions."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SIZES, refused
from crystal_files import cif, pair, write_csv, write_json
from small_training import SMALL

import crystalformer
from crystalformer import Crystalformer
from crystalformer.app import cli
from crystalformer.app.metrics import CLASSIFICATION, not_learnt, notes, scores
from crystalformer.data import DataError, read_samples
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import CrystalDataset, Recipe, Regression, fit, predict
from crystalformer.training.losses import Auc, auc

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
OPTIONS = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=6", "--lr=0.02", "--loss=bce"]
NUMBER = 40


@pytest.fixture(scope="module")
def salts(tmp_path_factory) -> Path:
    """Crystals that are deep or not, as pandas writes it."""
    crystals = ionic_crystals(NUMBER, seed=1)
    middle = sorted(x.energy for x in crystals)[NUMBER // 2]
    rows = [["id", "deep", "cif"]]
    for number, x in enumerate(crystals):
        rows.append([f"salt-{number}", x.energy < middle, x.structure.remove_oxidation_states().to(fmt="cif")])
    return write_csv(tmp_path_factory.mktemp("classes") / "salts.csv", rows)


@pytest.fixture(scope="module")
def run(salts) -> Path:
    out = salts.parent / "run"
    fractions = ["--fractions", "0.6", "0.2", "0.2"]
    data = ["--data", str(salts), "--target", "deep"]
    assert cli.main(["train", *data, *fractions, "--out", str(out), *OPTIONS]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_classes_as_tables_have_them(tmp_path):
    good = cif(pair()[0])
    values = ["0", "1", "True", " false", "YES", "no", "1.0", "0.0"]
    table = [["id", "cif", "stable"], *([f"x{i}", good, x] for i, x in enumerate(values))]
    samples, problems = read_samples(write_csv(tmp_path / "t.csv", table), ["stable"], classes=True)
    assert samples.targets[:, 0].tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    assert problems == []
    records = [{"id": i, "structure": pair()[0].as_dict(), "stable": x} for i, x in enumerate([True, 0, 1.0, None])]
    samples, (problem,) = read_samples(write_json(tmp_path / "t.json", records), ["stable"], classes=True)
    assert samples.targets[:, 0].tolist() == [1, 0, 1]
    assert problem.reason == "stable is missing"
    for value in ("maybe", "2", "0.5", "-1"):
        wrong = write_csv(tmp_path / "t.csv", [*table, ["odd", good, value]])
        message = f"t.csv, row 9: odd: stable must be 0 or 1, true or false, yes or no, not '{value}'"
        with pytest.raises(DataError, match=f"^{message}$"):
            read_samples(wrong, ["stable"], classes=True)
    samples, (problem,) = read_samples(
        write_csv(tmp_path / "t.csv", [*table, ["odd", good, "nan"]]), ["stable"], classes=True
    )
    assert problem.reason == "stable must be finite, not nan"


def test_area_under_the_curve():
    probabilities, classes = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert float(auc(probabilities, classes)) == 0.75  # of 4 pairs 3 are in order
    assert float(auc(torch.full((4,), 0.3), classes)) == 0.5
    assert auc(probabilities, torch.ones(4)).isnan()
    metric = Auc()
    metric.update(probabilities[:3], classes[:3])
    metric.update(torch.tensor([0.8, 0.9]), torch.tensor([1.0, torch.nan]))
    assert float(metric.compute()) == 0.75


@pytest.mark.parametrize("loss", ["l1", "mse", "huber", "bce"])
def test_losses(loss):
    """The loss of an epoch of one batch is that of torch, and the gradient reaches every weight."""
    torch.manual_seed(0)
    model = Crystalformer(replace(SMALL, dropout=0.0, probabilities=loss == "bce"))
    crystals = ionic_crystals(8, seed=1)
    targets = torch.tensor([[float(i % 2)] for i in range(8)])
    data = CrystalDataset([x.structure for x in crystals], targets, model)
    batch = next(iter(data.loader(8))).crystals
    model.calibrate(batch)
    functions = {
        "l1": torch.nn.functional.l1_loss,
        "mse": torch.nn.functional.mse_loss,
        "huber": torch.nn.functional.smooth_l1_loss,
        "bce": lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(),
    }
    with torch.no_grad():
        expected = float(functions[loss](model.outputs(batch), targets))
    before = [x.detach().clone() for x in model.parameters()]
    task = Regression(model, torch.zeros(1), torch.ones(1), loss=loss)
    (row,) = fit(task, data.loader(8), data.loader(8), epochs=1)
    assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(before[1:], [*model.parameters()][1:], strict=True))
    predictions = predict(model, data.loader(8))
    if loss == "bce":
        assert ((predictions > 0) & (predictions < 1)).all()
        assert row["val_auc/target"] == pytest.approx(float(auc(predictions, targets)), rel=1e-4)
        right = (predictions > 0.5) == (targets > 0.5)
        assert row["val_accuracy/target"] == pytest.approx(float(right.double().mean()))


def test_a_loss_that_does_not_fit(capsys, salts, tmp_path):
    with pytest.raises(ValueError, match="loss must be one of l1, mse, huber, bce, not 'l2'"):
        Recipe(loss="l2")
    for loss, probabilities in (("bce", False), ("l1", True)):
        model = Crystalformer(replace(SMALL, probabilities=probabilities))
        with pytest.raises(ValueError, match=f"loss must be bce where .*, and only there, not {loss}"):
            Regression(model, torch.zeros(1), torch.ones(1), loss=loss)
    command = ("train", "--data", salts, "--target", "deep", "--out", tmp_path / "out")
    assert "loss must be one of" in refused(capsys, *command, "--loss", "l2")
    assert "deep must be a number, not 'False'" in refused(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_training(run, salts):
    metrics = json.loads((run / "metrics.json").read_text())
    told = [row for row in rows(run / "predictions.csv") if row["set"] == "test"]
    true = torch.tensor([float(row["deep"]) for row in told])
    predicted = torch.tensor([float(row["deep_predicted"]) for row in told], dtype=torch.float64)
    assert set(true.tolist()) == {0.0, 1.0}
    assert metrics["auc"]["test"]["deep"] == pytest.approx(float(auc(predicted, true)))
    accuracy = float(((predicted > 0.5) == (true > 0.5)).double().mean())
    assert metrics["accuracy"]["test"]["deep"] == pytest.approx(accuracy)
    given = {row["id"]: row["deep"] == "True" for row in rows(salts)}
    train = [given[id] for id in json.loads((run / "split.json").read_text())["train"]]
    share = sum(train) / len(train)
    assert metrics["baseline"]["deep"] == pytest.approx(share)
    assert metrics["baseline_auc"]["test"]["deep"] == 0.5
    larger = float((true == float(share > 0.5)).double().mean())
    assert metrics["baseline_accuracy"]["test"]["deep"] == pytest.approx(larger)
    assert "mae" not in metrics
    card = (run / "README.md").read_text()
    assert f"| deep | test | 8 | {metrics['auc']['test']['deep']:.4g} | 0.5 | " in card
    assert "Predicts the probability of deep of a crystal from its structure.\n" in card
    assert "tags: [crystals, materials, classification]" in card
    assert {x.stem for x in run.glob("*.png")} == {"roc_deep", "learning_curve_deep"}
    history = rows(run / "history.csv")
    assert {"train_auc/deep", "val_auc/deep", "val_accuracy/deep", "val_loss"} < set(history[0])
    assert float(history[-1]["train_auc/deep"]) > 0.7 > 0.5


def test_evaluate_info_and_load(run, salts, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    assert cli.main(["evaluate", str(run), "--data", str(salts), "--split", str(run / "split.json")]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["target", "AUC", "accuracy"]
    numbers = [metrics[key]["test"]["deep"] for key in ("auc", "accuracy", "baseline_auc", "baseline_accuracy")]
    assert [float(x) for x in line.split()[1:5]] == pytest.approx(numbers, rel=1e-3)
    assert cli.main(["info", str(run)]) == 0
    assert "test AUC, deep" in capsys.readouterr().out
    samples, _ = read_samples(salts, ["deep"], classes=True)
    predicted = crystalformer.load(run).predict(samples.structures)
    assert ((predicted > 0) & (predicted < 1)).all()
    told = {row["id"]: float(row["deep_predicted"]) for row in rows(run / "predictions.csv")}
    places = [samples.ids.index(id) for id in told]
    assert predicted[places, 0].tolist() == pytest.approx([*told.values()], rel=1e-4)


def test_one_class_has_no_auc(run, salts, tmp_path, capsys):
    ids = {row["deep"]: [] for row in rows(salts)}
    for row in rows(salts):
        ids[row["deep"]].append(row["id"])
    one, other = ids["True"], ids["False"]
    sets = {"train": one[:10] + other[:10], "val": one[10:14], "test": other[10:14]}
    (tmp_path / "split.json").write_text(json.dumps(sets))
    data, split = ["--data", str(salts)], ["--split", str(tmp_path / "split.json")]
    out = tmp_path / "out"
    assert cli.main(["train", *data, *split, "--target", "deep", "--out", str(out), *OPTIONS, "--epochs=2"]) == 0
    said = capsys.readouterr()
    assert "There is one class only of deep in val: it has no AUC." in said.err
    assert "validation AUC of deep nan" in said.out
    assert "| deep | test | 4 | - | - | " in (out / "README.md").read_text()
    assert json.loads((out / "metrics.json").read_text())["auc"] == {"val": {}, "test": {}}
    assert cli.main(["evaluate", str(run), *data, *split]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[1] == "-"
    assert "there is one class only of deep: it has no AUC" in err


def test_what_was_not_learnt():
    true = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    for predicted, nothing in (([0.9, 0.1, 0.2, 0.8], ["x"]), ([0.1, 0.9, 0.8, 0.2], [])):
        found = scores(CLASSIFICATION, ["x"], torch.tensor(predicted)[:, None], true)
        metrics = {"auc": {"val": found["auc"]}, "baseline_auc": {"val": {"x": 0.5}}, "values": {"val": {"x": 4}}}
        assert not_learnt(metrics) == nothing
    metrics["auc"]["val"]["x"] = 0.25
    assert notes(metrics) == [
        "Nothing was learnt of x: its validation AUC, 0.25, is no larger than that of the mean, 0.5."
    ]


def test_cross_validation(salts, tmp_path, capsys):
    out = tmp_path / "crossval"
    data = ["--data", str(salts), "--target", "deep", "--folds", "2", "--out", str(out)]
    assert cli.main(["crossval", *data, *OPTIONS, "--epochs=2"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    found = [json.loads((out / f"fold-{i}" / "metrics.json").read_text())["auc"]["test"]["deep"] for i in range(2)]
    assert metrics["auc"]["deep"] == pytest.approx(sum(found) / 2)
    assert f"test AUC of deep: {metrics['auc']['deep']:.4g} ± " in capsys.readouterr().out
    assert (out / "roc_deep.png").is_file()
    assert "| area under the ROC curve | predicting the mean |" in (out / "README.md").read_text()
