"""What training, prediction and evaluation tell is so: every digit, units, elements, NaN, and what was not learnt."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
import torch
from command_line import SIZES

import crystalformer
from crystalformer.app import cli, metrics, plots, prediction_commands
from crystalformer.common import loading, words
from crystalformer.common.elements import NUM_ELEMENTS, SYMBOLS
from crystalformer.data.ionic import ionic_crystals
from crystalformer.data.readers import read_samples
from crystalformer.model import structures

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
SMALL = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=4", "--lr=0.02"]
OFFSET = -1e6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Crystals with a target far from 0, and one of no meaning."""
    folder = tmp_path_factory.mktemp("private")
    with (folder / "salts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "total", "noise", "cif"])
        for number, x in enumerate(ionic_crystals(30, seed=1)):
            structure = x.structure.remove_oxidation_states()
            table.writerow([f"salt-{number}", OFFSET + x.energy / 100, number**2 % 7, structure.to(fmt="cif")])
    return folder / "salts.csv"


@pytest.fixture(scope="module")
def labels() -> set[str]:
    """Of the axes of the plots of `run`."""
    return set()


@pytest.fixture(scope="module")
def errors() -> io.StringIO:
    """What `run` said on stderr."""
    return io.StringIO()


@pytest.fixture(scope="module")
def run(data, labels, errors) -> Path:
    out = data.parent / "run"
    save = plots.Figure.savefig

    def noted(figure, *where, **options):
        labels.update(text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()))
        save(figure, *where, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(plots.Figure, "savefig", noted)
        arguments = ["--data", str(data), "--target", "total", "noise", "--unit", "eV/atom", "", "--out", str(out)]
        assert cli.main(["train", *arguments, *SMALL]) == 0
    return out


def read(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_a_large_offset_costs_no_digits(run, data, capsys):
    """From the file over the training and its tables to `evaluate`."""
    given, told = read(data), {id: x for id, x in read(run / "predictions.csv").items() if x["set"] == "test"}
    assert all(float(x["total"]) == float(given[id]["total"]) for id, x in told.items())
    true = torch.tensor([float(x["total"]) for x in told.values()], dtype=torch.float64)
    predicted = torch.tensor([float(x["total_predicted"]) for x in told.values()], dtype=torch.float64)
    train = [float(given[id]["total"]) for id in json.loads((run / "split.json").read_text())["train"]]
    mean = torch.tensor(train, dtype=torch.float64).mean()
    written = json.loads((run / "metrics.json").read_text())
    assert written["mae"]["test"]["total"] == pytest.approx(float((predicted - true).abs().mean()), rel=1e-9)
    assert written["baseline_mae"]["test"]["total"] == pytest.approx(float((mean - true).abs().mean()), rel=1e-9)
    assert written["baseline"]["total"] == float(mean)
    assert predicted.std() < 0.5  # and so many digits are needed: a step of fp32 is 0.0625 there

    arguments = ["evaluate", str(run), "--data", str(data), "--split", str(run / "split.json"), "--out", "-"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    again = {row["id"]: float(row["total"]) for row in csv.DictReader(out.splitlines())}
    assert [again[id] - OFFSET for id in told] == pytest.approx((predicted - OFFSET).tolist(), rel=1e-5)
    (line,) = (line.split() for line in err.splitlines() if line.startswith("total"))
    expected = [written[name]["test"]["total"] for name in ("mae", "baseline_mae")]
    assert [float(line[2]), float(line[4])] == pytest.approx(expected, rel=1e-3)


def test_units(run, data, labels, capsys):
    assert {"true total (eV/atom)", "error of total (eV/atom)", "mean absolute error of total (eV/atom)"} < labels
    assert {"true noise", "error of noise", "mean absolute error of noise"} < labels
    card = (run / "README.md").read_text()
    assert "Predicts total (eV/atom), noise of a crystal" in card
    assert "| total (eV/atom) | test |" in card
    assert cli.main(["info", str(run)]) == 0
    assert "total (eV/atom), noise\n" in capsys.readouterr().out
    assert crystalformer.load(run).units == ("eV/atom", "")
    arguments = ["train", "--data", str(data), "--target", "total", "--unit", "eV", "K", "--out", str(run / "no")]
    assert cli.main(arguments) == 2
    assert "unit must be one for each target, total, not eV, K" in capsys.readouterr().err


def test_the_card_has_no_path_of_this_machine(run, data):
    card = (run / "README.md").read_text()
    assert str(data.parent) not in card
    assert "| data | salts.csv |" in card
    assert "\nsalts.csv: 24 train, 3 val, 3 test crystals; 0 rows could not be used. Elements: " in card


def test_what_was_not_learnt(run, errors, capsys):
    maes = {"val": {"total": 0.5, "noise": 2.0, "x": float("nan")}, "test": {"total": 3.0, "noise": 3.0, "x": 0.0}}
    means = {"val": {"total": 0.6, "noise": 2.0, "x": 1.0}, "test": {"total": 1.0, "noise": 1.0, "x": 1.0}}
    assert metrics.not_learnt({"mae": maes, "baseline_mae": means}) == ["noise", "x"]
    assert metrics.not_learnt({}) == []
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("Nothing was learnt of noise: its validation error, ")
    assert f"**{line}**" in (run / "README.md").read_text()
    assert cli.main(["info", str(run)]) == 0
    assert "nothing learnt of       noise\n" in capsys.readouterr().out


def test_elements_that_the_training_never_saw(run, data, capsys, tmp_path):
    from pymatgen.core import Element

    assert [Element.from_Z(z).symbol for z in range(1, NUM_ELEMENTS + 1)] == SYMBOLS
    known, strange = ionic_crystals(2, seed=1)
    strange.structure.replace(0, "Xe")
    known.structure.to(str(tmp_path / "known.cif"))
    strange.structure.to(str(tmp_path / "strange.cif"))
    assert cli.main(["predict", str(run), str(tmp_path / "known.cif"), str(tmp_path / "strange.cif")]) == 0
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == ["id", "known", "strange"]
    assert "crystalformer: no crystal of the training had Xe, predictions are guesses for strange" in err.splitlines()
    (tmp_path / "strange.cif").rename(tmp_path / "red\x1b[31m.cif")
    assert cli.main(["predict", str(run), str(tmp_path / "red\x1b[31m.cif")]) == 0
    assert capsys.readouterr().err.endswith("predictions are guesses for red\\x1b[31m\n")  # nothing for the terminal
    predictor = crystalformer.load(run)
    assert predictor.unseen_elements([known.structure, strange.structure]) == [(), (54,)]
    predictor.model.config = crystalformer.CrystalformerConfig()  # as of a model that was saved without them
    assert predictor.unseen_elements([strange.structure]) == [()]


def test_predict_looks_at_each_structure_once(run, data, monkeypatch):
    seen, look = [], structures._pymatgen_mixtures
    samples, _ = read_samples(data)
    monkeypatch.setattr(prediction_commands, "_bar", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(structures, "_pymatgen_mixtures", lambda x, name: seen.append(name) or look(x, name))
    prediction_commands._predictions(crystalformer.load(run), samples.ids, samples.structures)
    assert seen == list(samples.ids)


def test_predictions_that_are_not_finite(run, data, capsys, monkeypatch):
    """Of a model that knows nothing of an element: the other crystals of the batch keep theirs."""
    samples, _ = read_samples(data)
    predictor = crystalformer.load(run)
    expected = predictor.predict(samples.structures)
    z = samples.structures[3][0].specie.Z
    with torch.no_grad():
        predictor.model.embedding.weight[z - 1] = torch.nan
    spoiled = [i for i, x in enumerate(samples.structures) if z in x.atomic_numbers]
    predicted = predictor.predict(samples.structures)
    assert predicted.isnan().all(1).nonzero()[:, 0].tolist() == spoiled
    good = ~predicted.isnan().any(1)
    torch.testing.assert_close(predicted[good], expected[good])

    def refuse(batch):
        raise ValueError("decay_min must be finite")

    with monkeypatch.context() as patch:
        patch.setattr(predictor.model, "forward", refuse)
        with pytest.raises(ValueError, match="decay_min"):  # no fault of a crystal
            predictor.predict(samples.structures)

    monkeypatch.setattr(prediction_commands, "load_model", lambda *_: predictor)
    for arguments, end in (
        (["predict", str(run), str(data)], f"crystalformer: {len(spoiled)} of 30 rows could not be predicted"),
        (["evaluate", str(run), "--data", str(data), "--out", "-"], ""),
    ):
        assert cli.main(arguments) == 1
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == 1 + 30 - len(spoiled)
        assert "nan" not in out
        assert {f"crystalformer: salt-{i}: the prediction is not finite" for i in spoiled} < set(err.splitlines())
        assert end in err.splitlines() or not end
    with torch.no_grad():
        predictor.model.embedding.weight[:] = torch.nan
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.endswith("crystalformer: none of the predictions is finite\n")


def test_a_training_whose_test_crystals_give_nan_names_them(run, data, capsys, monkeypatch):
    monkeypatch.setattr("crystalformer.app.report.predict", lambda model, loader: torch.full((3, 2), torch.nan))
    assert cli.main(["train", "--out", str(run), "--resume"]) == 1
    ids = [id for id, x in read(run / "predictions.csv").items() if x["set"] == "val"]
    assert capsys.readouterr().err.endswith(f"the predictions of val are not finite for {', '.join(ids)}\n")


def test_the_slow_backend_says_why(run, data, capsys, monkeypatch):
    monkeypatch.setitem(loading.AVAILABLE, "cpu", "the compiled CPU kernels are hidden: do this")
    assert cli.main(["evaluate", str(run), "--data", str(data), "--split", str(run / "split.json")]) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("crystalformer: attention by the backend 'reference' on cpu, ")
    assert line.endswith("because the compiled CPU kernels are hidden: do this")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON: "),
        ("[" * 100_000, "no JSON: "),
        ("[1]", "must be a dictionary, as a training writes it, not list"),
        ('{"mae": 3}', "mae must be a number for each target for each set, not 3"),
        ('{"mae": {"val": {"total": "x"}}}', "mae must be a number for each target for each set, not {'val'"),
        ('{"mae": {"val": {"total": 1}}}', "baseline_mae must have the targets of mae, total, for val"),
        ('{"baseline": {"total": null}}', "baseline must be a number for each target, not {'total': None}"),
        ('{"epochs": true}', "epochs must be an integer, not True"),
        ('{"versions": []}', "versions must be a string for each library, not []"),
    ],
)
def test_metrics_of_the_wrong_shape(content, message, run, data, capsys):
    good = (run / "metrics.json").read_text()
    try:
        (run / "metrics.json").write_text(content)
        for arguments in (["info", str(run)], ["evaluate", str(run), "--data", str(data)]):
            capsys.readouterr()
            assert cli.main(arguments) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(f"crystalformer: {run / 'metrics.json'}")
            assert message in err
            assert err.count("\n") == 1
    finally:
        (run / "metrics.json").write_text(good)


def test_words():
    counts = [words.count(x, "row") for x in (0, 1, 2, 1000)]
    assert counts == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    numbers = [0.0, 1.23456, -1234.567, 123456.7, -1e6 - 1 / 3, 1.5e-7, 1e20, float("nan")]
    assert list(map(words.short, numbers)) == ["0", "1.235", "-1235", "123457", "-1000000", "1.5e-07", "1e+20", "nan"]
    assert words.some(["a", "b", "c"]) == "a, b, c"
    assert words.some(["a", "b", "c"], 2) == "a, b and 1 more"
