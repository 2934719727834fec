"""The command line on data and models: what works, and one clear line for what cannot."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import SIZES, refused

import crystalformer
from crystalformer.app import cli
from crystalformer.data.ionic import ionic_crystals

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
SMALL = [f"--model.{x}" for x in SIZES.split()] + ["--batch-size=8", "--epochs=3", "--lr=0.02"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With crystals in salts.csv, a row of it not readable, and a CIF."""
    folder = tmp_path_factory.mktemp("cli")
    with (folder / "salts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["material_id", "energy", "volume", "cif"])
        for number, x in enumerate(ionic_crystals(30, seed=1)):
            structure = x.structure.remove_oxidation_states()
            cif = "no CIF" if number == 7 else structure.to(fmt="cif")
            table.writerow([f"salt-{number}", x.energy, structure.volume, cif])
    structure.to(str(folder / "last.cif"))
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """The folder of a training."""
    out = folder / "run"
    arguments = [
        "train",
        "--data",
        str(folder / "salts.csv"),
        "--target",
        "energy",
        "volume",
        "--out",
        str(out),
        *SMALL,
    ]
    assert cli.main(arguments) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_folder_of_a_training(run, folder):
    names = {path.name for path in run.iterdir()}
    plots = {f"{kind}_{x}.png" for kind in ("parity", "residuals", "learning_curve") for x in ("energy", "volume")}
    files = {"README.md", "config.yaml", "history.csv", "metrics.json", "predictions.csv", "problems.csv", "split.json"}
    assert names == files | plots | {"model", "checkpoints"}
    for name in plots:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["crystals"] == {"train": 23, "val": 3, "test": 3}
    assert metrics["left_out"] == 1
    (problem,) = rows(run / "problems.csv")
    assert problem["id"] == "salt-7"
    assert len(rows(run / "history.csv")) == 3

    # What is written about the model is what the model does.
    with (folder / "salts.csv").open(newline="") as file:
        samples = {row["material_id"]: row for row in csv.DictReader(file)}
    tested = [row for row in rows(run / "predictions.csv") if row["set"] == "test"]
    assert [row["id"] for row in tested] == json.loads((run / "split.json").read_text())["test"]
    from pymatgen.core import Structure

    structures = [Structure.from_str(samples[row["id"]]["cif"], "cif") for row in tested]
    predicted = crystalformer.load(run).predict(structures)
    for column, name in enumerate(("energy", "volume")):
        true = torch.tensor([float(samples[row["id"]][name]) for row in tested])
        assert predicted[:, column].tolist() == pytest.approx([float(row[f"{name}_predicted"]) for row in tested], 1e-4)
        assert metrics["mae"]["test"][name] == pytest.approx(float((predicted[:, column] - true).abs().mean()), 1e-4)
        train = json.loads((run / "split.json").read_text())["train"]
        mean = torch.tensor([float(samples[id][name]) for id in train]).mean()
        assert metrics["baseline_mae"]["test"][name] == pytest.approx(float((true - mean).abs().mean()), 1e-4)
        assert f"| {name} | test | 3 | {metrics['mae']['test'][name]:.4g} |" in (run / "README.md").read_text()


def test_names_with_a_bar_do_not_break_the_tables():
    from crystalformer.app import report

    assert report.row_of_table("|E|", 0.5) == r"| \|E\| | 0.5 |"


def test_a_config_repeats_the_training(run, folder):
    again = folder / "again"
    assert cli.main(["train", "--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    for name in ("predictions.csv", "split.json", "config.yaml"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert (again / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_resume(run, folder, capsys):
    before = (run / "predictions.csv").read_bytes()
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert (run / "predictions.csv").read_bytes() == before
    assert cli.main(["train", "--out", str(run), "--resume", "--model.num_basis", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # behind that of the row that is left out
    assert "model.num_basis must be 8, as when the training" in line
    assert "not 4" in line
    assert "must be the folder of a training" in refused(
        capsys, "train", "--out", folder / "none", "--resume", "--data", folder / "salts.csv", "--target", "energy"
    )


def test_a_training_that_diverges(folder, capsys, tmp_path):
    data = ["--data", str(folder / "salts.csv"), "--target", "energy", "--out", str(tmp_path / "out")]
    assert cli.main(["train", *data, *SMALL, "--lr=9e5"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite" in line
    assert line.endswith(": lower lr")


def test_predict(run, folder, capsys, tmp_path):
    predictor = crystalformer.load(run)
    arguments = ["predict", str(run), str(folder / "last.cif")]
    assert cli.main(arguments) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert list(row) == ["id", "energy", "volume", "outside"]
    assert row["id"] == "last"
    from pymatgen.core import Structure

    value = predictor.predict([Structure.from_file(folder / "last.cif")])[0]
    assert [float(row["energy"]), float(row["volume"])] == pytest.approx(value.tolist(), 1e-4)

    assert cli.main([*arguments, "--out", str(tmp_path / "out.csv")]) == 0
    assert rows(tmp_path / "out.csv") == [row]
    assert capsys.readouterr().out == ""

    # The row that cannot be read is named; the others are predicted.
    assert cli.main(["predict", str(run), str(folder / "salts.csv"), str(folder / "last.cif")]) == 1
    out, err = capsys.readouterr()
    predicted = list(csv.DictReader(out.splitlines()))
    assert len(predicted) == 30
    assert predicted[-1]["id"] == "last"
    assert [float(predicted[-1][name]) for name in ("energy", "volume")] == pytest.approx(value.tolist(), 1e-6)
    assert "salt-7" in err.splitlines()[0]
    assert err.splitlines()[-1] == "crystalformer: 1 of 31 rows could not be predicted"
    assert cli.main([*arguments, str(folder / "last.cif")]) == 0
    ids = [row["id"] for row in csv.DictReader(capsys.readouterr().out.splitlines())]
    assert ids == [f"{folder / 'last.cif'}:last"] * 2


def test_a_device_that_is_not_there(run, folder, capsys, monkeypatch):
    def empty(*_, device):
        if device.type == "cuda":
            raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", empty)
    for device, reason in (("cuda", "Torch not compiled with CUDA"), ("abacus", "abacus"), ("meta", "not 'meta'")):
        assert reason in refused(capsys, "predict", run, folder / "last.cif", "--device", device)
        with pytest.raises(ValueError, match=rf"^device must be one that .*{reason}"):
            crystalformer.load(run, device)


def test_out_is_none_of_the_files_that_are_read(run, folder, capsys, tmp_path):
    """Under whatever name, and not when writing fails either; other files are replaced."""
    crystals = tmp_path / "crystals"
    crystals.mkdir()
    source = crystals / "some.cif"
    source.write_bytes((folder / "last.cif").read_bytes())
    (tmp_path / "soft.csv").symlink_to(source)
    os.link(source, tmp_path / "hard.csv")
    kept = {path: path.read_bytes() for path in (source, run / "predictions.csv", run / "split.json")}
    for command in (("predict", run, source), ("predict", run, crystals), ("evaluate", run, "--data", source)):
        for out in (source, tmp_path / "soft.csv", tmp_path / "hard.csv", run / "predictions.csv"):
            line = refused(capsys, *command, "--out", out)
            assert f"out must be a file of its own, but {out} is there already, and part of " in line
    split = ("--split", run / "split.json", "--data", folder / "salts.csv")
    assert "split.json, which is read" in refused(
        capsys, "evaluate", run / "model", *split, "--out", run / "split.json"
    )
    assert {path: path.read_bytes() for path in kept} == kept

    line = refused(capsys, "predict", run, source, "--out", "x" * 5000)
    assert line.startswith("crystalformer: out must be a file that can be written, not xxx")
    assert line.endswith("xxx: File name too long\n")

    out = tmp_path / "out.csv"
    out.write_text("old")
    assert cli.main(["predict", str(run), str(source), "--out", str(out)]) == 0
    assert [row["id"] for row in rows(out)] == ["some"]
    before = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        arguments = ["evaluate", str(run), "--data", str(folder / "salts.csv"), "--out", str(out)]
        assert cli.main(arguments) in (1, 2)
        assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"crystals", "soft.csv", "hard.csv", "out.csv"}


def test_out_is_not_the_config(run, folder, capsys, tmp_path):
    config = tmp_path / "options.yaml"
    for command, text in (
        (("predict", run, folder / "last.cif"), "{}"),
        (("evaluate", run), f"data: {folder}/salts.csv"),
    ):
        config.write_text(text)
        for given in (("--config", config), (f"--config={config}",)):
            assert f"{config} is there already, and part of {config}" in refused(
                capsys, *command, *given, "--out", config
            )
        assert config.read_text() == text


def test_names_of_targets_that_are_no_names_of_files(folder, capsys, tmp_path):
    """None overwrites another's plots; a dollar is no mathematics; the command's last lines say what came out."""
    names = ["ΔE/atom $\\x$", "ΔE atom", "δe_atom", "V|atom"]
    with (folder / "salts.csv").open(newline="") as source, (tmp_path / "names.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", *names, "cif"])
        for row in list(csv.DictReader(source))[8:]:
            table.writerow([row["material_id"], *[row["energy"]] * 3, row["volume"], row["cif"]])
    out = tmp_path / "out"
    assert (
        cli.main(["train", "--data", str(tmp_path / "names.csv"), "--target", *names, "--out", str(out), *SMALL]) == 0
    )
    stems = ("ΔE_atom_x_", "ΔE_atom", "δe_atom_2", "V_atom")
    assert {path.stem for path in out.glob("parity_*.png")} == {f"parity_{x}" for x in stems}
    card, mae = (out / "README.md").read_text(), json.loads((out / "metrics.json").read_text())["mae"]["test"]
    assert all(f"](parity_{x}.png)" in card for x in stems)
    lines = capsys.readouterr().out.splitlines()[-5:]
    for name, line in zip(names, lines, strict=False):
        assert line.startswith(f"  test MAE of {name} {mae[name]:.4g}, ")
    assert lines[-1].endswith(str(out / "README.md"))


def test_evaluate_and_info(run, folder, capsys):
    split = ["--split", str(run / "split.json"), "--set", "test"]
    assert cli.main(["evaluate", str(run), "--data", str(folder / "salts.csv"), *split]) == 1
    out, err = capsys.readouterr()
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("energy", "volume"):
        (line,) = (line.split() for line in out.splitlines() if line.startswith(name))
        expected = [metrics["mae"]["test"][name], metrics["baseline_mae"]["test"][name]]
        assert [float(line[1]), float(line[3])] == pytest.approx(expected, rel=1e-3)
    assert "1 row could not be used" in err
    assert cli.main(["evaluate", str(run), "--data", str(folder / "salts.csv"), *split, "--out", "-"]) == 1
    csv_out, err = capsys.readouterr()
    tested = [row["id"] for row in rows(run / "predictions.csv") if row["set"] == "test"]
    assert [row["id"] for row in csv.DictReader(csv_out.splitlines())] == tested
    assert out in err
    assert cli.main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "energy, volume" in out
    assert f"{metrics['mae']['test']['energy']:.4g}" in out
    assert cli.main(["info", str(run / "model")]) == 0


def test_python(run):
    structures = [x.structure for x in ionic_crystals(5, seed=2)]
    predictor = crystalformer.load(run)
    assert predictor.names == ("energy", "volume")
    predicted = predictor.predict(structures)
    assert predicted.shape == (5, 2)
    mixed = [structures[0].to_ase_atoms(), *structures[1:]]
    torch.testing.assert_close(predictor.predict(mixed), predicted)
    torch.testing.assert_close(predictor.predict([structures[3] * (2, 1, 1)]), predicted[3:4], rtol=1e-2, atol=1e-2)

    features, atoms = predictor.encode(structures), predictor.encode(structures, atoms=True)
    assert features.shape == (5, 16)
    assert [len(x) for x in atoms] == [len(x) for x in structures]
    torch.testing.assert_close(torch.stack([x.mean(0) for x in atoms]), features)
    with torch.no_grad():
        torch.testing.assert_close(
            predictor.model.in_units(predictor.model.readout(features)), predicted, rtol=1e-6, atol=0
        )
    with pytest.raises(ValueError, match="at least one structure"):
        predictor.predict([])


def test_wrong_input_is_refused_in_one_line(run, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = ("train", "--data", folder / "salts.csv")
    out = ("--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, text in (
        (("tarin",), "must be one of train, crossval, predict"),
        (("train",), "required"),
        ((*data, "--target", "energy"), "required"),
        ((*data, *out), "target"),
        ((*data, *out, "--target", "gap"), "no column 'gap'"),
        ((*data, *out, "--target", "energy", "--epochs", "many"), "epochs"),
        ((*data, *out, "--target", "energy", "--epochs", "0"), "epochs must be an integer, at least 1 and at most"),
        ((*data, *out, "--target", "energy", "--model.num_heads", "3"), "model_dim must be a multiple of num_heads=3"),
        ((*data, *out, "--target", "energy", "--fractions", "0.5", "0.1", "0.1"), "fractions must be"),
        ((*data, *out, "--target", "energy", "--fractions", "0.9", "0", "0.1"), "val must hold at least one"),
        ((*data, *out, "--target", "energy", "--split", tmp_path / "no.json"), "no.json: no such file"),
        ((*data, *out, "--target", "energy", "--config", tmp_path / "no.yaml"), "no.yaml"),
        ((*data, *out, "--target", "energy", "--train", "x"), "either data or train"),
        ((*data, *out, "--target", "energy", "--strict"), "salt-7"),
        ((*data, *out, "--target", "energy", "--accelerator", "gpu"), "torch finds no GPU"),
        ((*data, *out, "--target", "energy", "--pres", "jarvis"), "unrecognized arguments: --pres"),
        (
            (*data, *out, "--target", "energy", "--seed", "-1"),
            "seed must be an integer, at least 0 and at most 184467",
        ),
        (
            (*data, *out, "--target", "energy", "--loaders", "-1"),
            "loaders must be an integer, at least 0 and at most 1024",
        ),
        ((*data, *out, "--target", "energy", "--cache", folder / "last.cif"), "cache must be a folder"),
        ((*data, "--out", folder / "last.cif/out", "--target", "energy"), "out must be a folder that can be written"),
        (("train", *out, "--resume"), "must be the folder of a training"),
        (("train", *out, "--target", "energy"), "either data or train"),
        (("train", *out, "--target", "energy", "--train", folder / "salts.csv"), "val must be given with train"),
        (("train", "--data", tmp_path / "no.csv", *out, "--target", "energy"), "no.csv: no such file"),
        (("train", "--data", tmp_path / "empty", *out, "--target", "energy"), "empty"),
        ((*data, "--out", tmp_path / "full", "--target", "energy"), "must be a new or an empty folder"),
        (("predict", run), "files"),
        (("predict", run, tmp_path / "no.cif"), "no.cif: no such file"),
        (("predict", tmp_path / "empty", folder / "last.cif"), "config.json"),
        (
            ("predict", run, folder / "last.cif", "--out", tmp_path / "no/such.csv"),
            "out must be a file in a folder that is there",
        ),
        (("predict", run, folder / "last.cif", "--device", "abacus"), "abacus"),
        (("evaluate", run, "--data", folder / "salts.csv", "--target", "energy"), "target must name 2 columns"),
        (("evaluate", run, "--data", folder / "salts.csv", "--set", "val"), "split must be given with set"),
        (("info", tmp_path / "no"), "config.json"),
        (("convert", folder / "salts.csv", *out), "must be a checkpoint that torch.load reads"),
        (("convert", tmp_path / "no.ckpt", *out), "No such file"),
    ):
        assert text in refused(capsys, *arguments), arguments
    assert not (tmp_path / "out").exists()


def test_models_of_other_versions(run, folder, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    def changed(name, **values):
        model = crystalformer.Crystalformer.from_pretrained(run / "model")
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        save_file(load_file(path), path)  # without the config in it, which counts more than config.json
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return tmp_path / name

    line = refused(capsys, "info", changed("newer", format=2, crystalformer="9.1"))
    for text in ("format 1", f"crystalformer {crystalformer.__version__} reads", "not 2", "crystalformer==9.1"):
        assert text in line
    line = refused(capsys, "predict", changed("unknown", flux=1, crystalformer="9.1"), folder / "last.cif")
    for text in ("not flux", "crystalformer 9.1", f"this is {crystalformer.__version__}"):
        assert text in line
    assert "weights that fit" in refused(capsys, "info", changed("other", num_basis=4))
    path = changed("torn")
    (path / "config.json").write_text("{")
    assert "config.json" in refused(capsys, "info", path)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])
    assert "model.safetensors" in refused(capsys, "info", path)


def test_stopped_and_resumed_as_a_program(run, folder, tmp_path):
    """By SIGTERM: its exit code, one line that says how to go on, and the same result after that."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"
    arguments = [*SMALL, "--data", str(folder / "salts.csv"), "--target", "energy", "volume", "--out", str(out)]
    code = f"""
import os, signal, sys, torch; torch.set_num_threads(1)
from crystalformer.app import cli
from crystalformer.training import Progress
after = Progress.on_train_batch_end
def stop(self, trainer, *args):
    after(self, trainer, *args)
    if trainer.global_step == 4: os.kill(os.getpid(), signal.SIGTERM)
Progress.on_train_batch_end = stop
sys.exit(cli.main(["train", *{arguments!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"crystalformer: stopped; go on with: crystalformer train --out {out} --resume"
    )
    assert "Traceback" not in done.stderr
    with pytest.raises(FileNotFoundError, match=r"was stopped; go on with: crystalformer train --out .* --resume"):
        crystalformer.load(out)
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
