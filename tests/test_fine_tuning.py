"""Trainings that start from a trained model: what they keep, what they learn, and that they need it only once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import SIZES, refused
from crystal_files import write_csv
from small_training import Stop

import crystalformer
from crystalformer.app import cli, train
from crystalformer.common import storage
from crystalformer.data.ionic import ionic_crystals
from crystalformer.data.readers import read_samples
from crystalformer.training import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
OPTIONS = ["--batch-size=8", "--epochs=4", "--lr=0.02"]
MODEL = [f"--model.{x}" for x in SIZES.split()]
STILL = ["--epochs=1", "--lr=1e-12", "--weight_decay=0", "--bias_decay=0"]


@pytest.fixture(scope="module")
def salts(tmp_path_factory) -> Path:
    rows = [["id", "energy", "volume", "meV", "cif"]]
    for number, x in enumerate(ionic_crystals(24, seed=1)):
        cif = x.structure.remove_oxidation_states().to(fmt="cif")
        rows.append([f"salt-{number}", x.energy, x.structure.volume, 1000 * x.energy, cif])
    return write_csv(tmp_path_factory.mktemp("fine") / "salts.csv", rows)


@pytest.fixture(scope="module")
def base(salts) -> Path:
    out = salts.parent / "base"
    assert cli.main(["train", *data(salts, "energy"), "--unit", "eV", "--out", str(out), *OPTIONS, *MODEL]) == 0
    return out


def data(salts: Path, *targets: str) -> list[str]:
    return ["--data", str(salts), "--target", *targets]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return crystalformer.load(folder).model.state_dict()


def test_the_same_target_is_predicted_from_the_beginning(salts, base, tmp_path):
    """Whatever crystals the mean and the deviation are of."""
    out, samples = tmp_path / "out", read_samples(salts)[0]
    more = ["--unit", "eV", "--from", str(base), "--out", str(out), "--seed", "5"]
    assert cli.main(["train", *data(salts, "energy"), *more, *STILL]) == 0
    one, two = crystalformer.load(base), crystalformer.load(out)
    assert one.model.config.target_mean != two.model.config.target_mean
    expected = one.predict(samples.structures)
    torch.testing.assert_close(two.predict(samples.structures), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1


@pytest.mark.parametrize(
    ("targets", "unit"), [(("volume",), ()), (("energy",), ("meV",)), (("energy", "volume"), ("eV", "Å³"))]
)
def test_of_other_targets_the_last_layer_is_new(salts, base, tmp_path, targets, unit):
    out = tmp_path / "out"
    units = ["--unit", *unit] if unit else []
    assert cli.main(["train", *data(salts, *targets), *units, "--from", str(base), "--out", str(out), *STILL]) == 0
    before, after = weights(base), weights(out)
    for name, x in before.items():
        if name.startswith("readout.2."):
            assert x.shape != after[name].shape or (x - after[name]).abs().max() > 1e-3
        else:
            torch.testing.assert_close(after[name], x, rtol=0, atol=1e-6)  # the scales of the decays, too
    assert {name for name, x in before.items() if name.endswith("scale") and x != 1}


def test_what_is_frozen_does_not_learn(salts, base, tmp_path):
    out = tmp_path / "out"
    more = ["--from", str(base), "--freeze", "embedding", "blocks", "--out", str(out)]
    assert cli.main(["train", *data(salts, "meV"), *more, *OPTIONS]) == 0
    before, after = weights(base), weights(out)
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (not name.startswith("readout.")), name
    only = tmp_path / "only"  # no bias among what learns
    more = ["--from", str(base), "--freeze", "blocks", "readout", "--out", str(only)]
    assert cli.main(["train", *data(salts, "energy"), "--unit", "eV", *more, *OPTIONS, "--epochs=1"]) == 0
    assert not torch.equal(weights(only)["embedding.weight"], before["embedding.weight"])

    settings = yaml.safe_load((out / "config.yaml").read_text())
    digest = storage.sha256({}, before)
    assert (settings["from"], settings["from_sha256"]) == (str(base), digest)
    assert settings["freeze"] == ["embedding", "blocks"]
    assert settings["model"] == yaml.safe_load((base / "config.yaml").read_text())["model"]
    card = (out / "README.md").read_text()
    assert f"| from | base |\n| from_sha256 | {digest} |\n| freeze | ['embedding', 'blocks'] |" in card
    again = tmp_path / "again"
    assert cli.main(["train", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert (again / "predictions.csv").read_bytes() == (out / "predictions.csv").read_bytes()


def test_a_resumed_training_needs_the_model_no_more(salts, base, tmp_path, monkeypatch, capsys):
    moved, whole, out = tmp_path / "moved", tmp_path / "whole", tmp_path / "out"
    shutil.copytree(base, moved)
    command = ["train", *data(salts, "volume"), *OPTIONS, "--from", str(moved), "--freeze", "blocks", "--out"]
    assert cli.main([*command, str(whole)]) == 0
    fit = train.fit

    def stopped(task, one, two, epochs, callbacks, **options):
        return fit(task, one, two, epochs, [*callbacks, Stop(2, 15)], **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stopped)
        assert cli.main([*command, str(out)]) == 143
    shutil.rmtree(moved)
    capsys.readouterr()
    line = refused(capsys, "train", "--out", out, "--resume", "--from", base)
    assert f"from must be {moved}, as when the training in {out} began, not {base}" in line
    line = refused(capsys, "train", "--out", out, "--resume", "--from_sha256", "abc")
    assert "from_sha256 must be " in line
    assert line.endswith("began, not abc\n")
    assert cli.main(["train", "--out", str(out), "--resume", "--freeze", "embedding"]) == 2
    assert "freeze must be ['blocks'], as when the training" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert all(torch.equal(x, weights(whole)[name]) for name, x in weights(out).items())
    recipe = Recipe(epochs=4, batch_size=8, lr=0.02)
    start = train.Start(moved, freeze=("blocks",))
    train.train(out, "volume", train.DataSource(data=salts), recipe, start=start, resume=True)


def test_what_a_training_cannot_start_from(salts, base, tmp_path, capsys):
    command = ("train", *data(salts, "energy"), "--out", tmp_path / "out", *OPTIONS)
    for more, message in (
        (("--from", tmp_path), "from must be the folder of a training or a model: "),
        (("--from", base, "--model.num_blocks", "2"), f"model.num_blocks must be 1, as of the model in {base}, not 2"),
        (("--from", base, "--freeze", "head"), "freeze must name parts among embedding, blocks, readout, not 'head'"),
        (("--from", base, "--freeze", "embedding", "blocks", "readout"), "freeze must leave a part of"),
        (("--from", base, "--freeze", "readout"), "freeze must not name readout, whose last layer is new"),
        (("--freeze", "blocks"), "from must be given with freeze"),
        (("--from", base, "--from_sha256", "abc"), "from must have the weights of SHA-256 abc, as from_sha256 says"),
    ):
        assert message in refused(capsys, *command, *more), message
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="start must be a Start, not str"):
        train.train(tmp_path / "out", "energy", train.DataSource(data=salts), start=str(base))


def test_classes_from_a_model_of_numbers(salts, base, tmp_path):
    samples = read_samples(salts, ["energy"])[0]
    table = [["id", "deep", "cif"]]
    middle = samples.targets.median()
    for id, x, y in zip(samples.ids, samples.structures, samples.targets[:, 0], strict=True):
        table.append([id, bool(y < middle), x.to(fmt="cif")])
    path, out = write_csv(tmp_path / "classes.csv", table), tmp_path / "out"
    command = ["train", *data(path, "deep"), "--loss", "bce", "--from", str(base), "--out", str(out)]
    assert cli.main([*command, *OPTIONS, "--model.dropout", "0.1"]) == 0
    predicted = crystalformer.load(out).predict(samples.structures)
    assert ((predicted > 0) & (predicted < 1)).all()
    assert "auc" in json.loads((out / "metrics.json").read_text())
