"""A training that is resumed with more epochs: what it ends with, and what cannot be made longer."""

import csv
import signal
from pathlib import Path

import pytest
import torch
import yaml
from command_line import SIZES
from crystal_files import write_csv
from small_training import Stop, train
from test_weights import Trail

import crystalformer
from crystalformer.app import cli
from crystalformer.app import train as app_train
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import AverageLastEpochs, Recipe
from crystalformer.training.callbacks import weight_callbacks
from crystalformer.training.checkpoints import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")


def run(epochs, *callbacks, **options):
    identity = {"epochs": epochs, "schedule": options.get("schedule", "inverse_sqrt")}
    return train(epochs=epochs, average=0, callbacks=callbacks, identity=identity, **options)


@pytest.mark.parametrize(
    "recipe", [Recipe(average_epochs=0), Recipe(ema=0.9), Recipe(best_epoch=True)], ids=["last", "ema", "best"]
)
def test_without_a_mean_it_is_as_if_it_had_been_so_long_from_the_beginning(recipe, tmp_path):
    rows, whole = run(5, *weight_callbacks(recipe))
    run(3, *weight_callbacks(recipe), checkpoints=tmp_path)
    more_rows, model = run(5, *weight_callbacks(recipe), checkpoints=tmp_path)
    assert [x["val_loss"] for x in more_rows] == [x["val_loss"] for x in rows]
    weights = whole.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("epochs", "average", "more", "of_more", "begins"),
    [(3, 1, 5, 2, 3), (4, 2, 5, 3, 2), (4, 2, 6, 3, 4)],
    ids=["a later mean", "the same mean goes on", "a mean over what is added"],
)
def test_the_mean_is_that_of_the_new_last_epochs(epochs, average, more, of_more, begins, tmp_path):
    trails = [Trail(), Trail()]
    run(epochs, AverageLastEpochs(average), trails[0], checkpoints=tmp_path)
    assert trails[0].ends[-1] == len(trails[0].weights)
    stop = Stop(more - 1, signal.SIGTERM)  # and through a checkpoint in the middle of it
    with pytest.raises(SystemExit):
        run(more, AverageLastEpochs(of_more), trails[1], stop, checkpoints=tmp_path)
    steps = trails[1].ends[-1] if trails[1].ends else 0
    last = Trail()
    _, model = run(more, AverageLastEpochs(of_more), last, checkpoints=tmp_path)
    weights = trails[0].weights + trails[1].weights[:steps] + last.weights
    ends = trails[0].ends + [x + len(trails[0].weights) for x in trails[1].ends]
    expected = torch.stack(weights[ends[begins - 1] :]).mean(0)
    torch.testing.assert_close(model.embedding.weight.detach(), expected)
    assert (expected - torch.stack(weights[ends[begins - 2] :]).mean(0)).abs().max() > 1e-4


def test_what_cannot_be_longer_or_shorter(tmp_path):
    for schedule in ("cosine", "one_cycle"):
        run(2, checkpoints=tmp_path / schedule, schedule=schedule)
        with pytest.raises(
            CheckpointError, match=rf"epochs must be 2, .* follows {schedule} to its end\. Start another"
        ):
            run(3, checkpoints=tmp_path / schedule, schedule=schedule)
    run(2, checkpoints=tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"epochs must be 2, as when .* began, not 1: a resumed training has no fewer"
    ):
        run(1, checkpoints=tmp_path / "run")


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    rows = [["id", "energy", "cif"]]
    for number, x in enumerate(ionic_crystals(12, seed=1)):
        rows.append([f"salt-{number}", x.energy, x.structure.remove_oxidation_states().to(fmt="cif")])
    data = ["--data", str(write_csv(tmp_path / "salts.csv", rows)), "--target", "energy"]
    options = ["--epochs=2", "--batch-size=3", "--lr=0.02", "--best_epoch", *(f"--model.{x}" for x in SIZES.split())]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert cli.main(["train", *data, *options, "--epochs=4", "--out", str(whole)]) == 0
    assert cli.main(["train", *data, *options, "--out", str(out)]) == 0
    before = (out / "config.yaml").read_bytes()
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs=1"]) == 2
    assert "epochs must be 2, as when" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs=4", "--seed=1"]) == 2
    assert "must be" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before

    fit = app_train.fit
    with monkeypatch.context() as patch:
        patch.setattr(app_train, "fit", lambda *x, **options: fit(*x[:4], [*x[4], Stop(3, signal.SIGTERM)], **options))
        assert cli.main(["train", "--out", str(out), "--resume", "--epochs=4"]) == 143
    assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 4
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()
    assert len(list(csv.DictReader((out / "history.csv").read_text().splitlines()))) == 4
    weights = crystalformer.load(whole).model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in crystalformer.load(out).model.state_dict().items())
    assert Path(out / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
