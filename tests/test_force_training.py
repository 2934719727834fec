"""Energies, forces and stresses together: read, learnt, reported, evaluated, and what a model then calculates."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refused

import crystalformer as cf
from crystalformer.app import cli
from crystalformer.data import forces as data_forces
from crystalformer.data.readers import read_samples
from crystalformer.training import ForceDataset, ForceRegression, fit
from crystalformer.training.forces import fit_element_energies

pytest.importorskip("ase", reason="the data are made by ase")
from ase import Atoms, io
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

SIZES = {"model_dim": 32, "num_heads": 4, "num_blocks": 2, "ff_dim": 64, "num_basis": 32, "r0": 0.7, "tol": 1e-4}
OPTIONS = [f"--model.{name}={x}" for name, x in SIZES.items()]
OPTIONS += ["--batch-size=8", "--epochs=20", "--lr=0.01", "--target=energy"]
SHIFT = {29: -100.0, 79: -20.0}  # eV, energies of the elements that are not those of ase's EMT


def alloys(number: int) -> list[Atoms]:
    """Distorted cells of copper and gold with their energies, forces and stresses."""
    random, found = np.random.default_rng(0), []
    for _ in range(number):
        atoms = bulk("Cu", a=random.uniform(3.7, 4.1), cubic=True)
        atoms.numbers[: random.integers(0, 5)] = 79
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.normal(0, 0.02, (3, 3))), scale_atoms=True)
        atoms.positions += random.normal(0, 0.1, atoms.positions.shape)
        atoms.calc = EMT()
        energy = atoms.get_potential_energy() + sum(SHIFT[z] for z in atoms.numbers)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=atoms.get_forces(), stress=atoms.get_stress())
        found.append(atoms)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alloys") / "alloys.extxyz"
    io.write(path, alloys(40))
    return path


@pytest.fixture(scope="module")
def run(file) -> Path:
    out = file.parent / "run"
    assert cli.main(["train", "--data", str(file), "--forces", "--stress", "--out", str(out), *OPTIONS]) == 0
    return out


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dataset(model: cf.Crystalformer, number: int = 40) -> ForceDataset:
    atoms = alloys(number)
    energies = torch.tensor([[x.get_potential_energy() / len(x)] for x in atoms])
    forces, stress = (
        [torch.from_numpy(y) for y in x]
        for x in zip(*((x.get_forces(), x.get_stress(False)) for x in atoms), strict=True)
    )
    return ForceDataset(atoms, energies, model, list(forces), list(stress))


def task(number: int = 40, **options) -> tuple[ForceRegression, ForceDataset]:
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(**SIZES | {"r0": (SIZES["r0"],)}))
    data = dataset(model, number)
    model.calibrate(next(iter(data.loader(number))).crystals)
    return ForceRegression(model, data, **options), data


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    """Through the forces and stresses: second derivatives of the attention."""
    torch.set_default_dtype(torch.float64)
    try:
        learner, data = task(3)
        for weight in learner.model.blocks.parameters():
            weight.data *= 3  # else the attention hardly matters yet
        example = learner.on_before_batch_transfer(next(iter(data.loader(3))), 0)
        learner.log = lambda *_, **__: None
        learner._step("train", learner.train_metrics, example).backward()
        for name in ("blocks.0.attention.q_proj.weight", "blocks.0.attention.edge_weight", "embedding.weight"):
            weight = learner.model.get_parameter(name)
            place = tuple(int(x) for x in (weight.grad.abs() == weight.grad.abs().max()).nonzero()[0])
            ends = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    weight[place] += step
                ends.append(learner._step("train", learner.train_metrics, example).item())
            with torch.no_grad():
                weight[place] += 1e-5
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs(slope) > 1e-4
            assert float(weight.grad[place]) == pytest.approx(slope, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_forces_are_learnt_and_weights_say_of_what():
    """Beside the energy alone, which knows little of forces."""
    errors = {}
    for weight in (0.0, 5.0):
        learner, data = task(lr=1e-2, forces_weight=weight, stress_weight=0.0)
        errors[weight] = fit(learner, data.loader(8, 0), data.loader(40), epochs=15)[-1]["val_mae/forces"]
    zero = float(torch.cat(data.forces).abs().mean())
    assert errors[5.0] < 0.7 * zero
    assert errors[5.0] < 0.9 * errors[0.0]


def test_energies_of_elements_come_first():
    learner, data = task()
    energies = {z: float(learner.energies[z - 1]) for z in (29, 79)}
    for z, shift in SHIFT.items():
        assert energies[z] == pytest.approx(shift, abs=1.0)
    assert float(learner.energies[0]) == pytest.approx(sum(energies.values()) / 2)  # of what no crystal has
    assert float(learner.deviation) < 1.0  # of energies that differ by 80 eV
    exact = ForceDataset(data.crystals, torch.zeros(40, 1), learner.model, data.forces)
    exact.targets = torch.stack([(x.species == 79).double().mean() for x in data.crystals])[:, None] * 2 + 1
    found = fit_element_energies(exact)
    assert [float(found[z - 1]) for z in (29, 79)] == pytest.approx([1.0, 3.0], abs=1e-9)
    assert float(ForceRegression(learner.model, exact).deviation) == 1.0  # nothing is left but rounding


def test_a_training_reports_forces_and_stress(run, file, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    history = table(run / "history.csv")
    for name in ("energy", "forces", "stress"):
        assert metrics["mae"]["test"][name] < metrics["baseline_mae"]["test"][name]
        assert metrics["mae"]["val"][name] == pytest.approx(float(history[-1][f"val_mae/{name}"]), rel=1e-3)
        assert (run / f"parity_{name}.png").is_file()
        assert (run / f"learning_curve_{name}.png").is_file()
    card = (run / "README.md").read_text()
    assert f"| forces (eV/Å) | test | {metrics['values']['test']['forces']} |" in card
    assert "![Predictions of stress](parity_stress.png)" in card
    rows = [x for x in table(run / "forces.csv") if x["set"] == "test"]
    errors = [abs(float(row[i]) - float(row[f"{i}_predicted"])) for row in rows for i in "xyz"]
    assert len(errors) == 4 * 4 * 3
    assert np.mean(errors) == pytest.approx(metrics["mae"]["test"]["forces"], rel=1e-9)

    assert cli.main(["info", str(run)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"test MAE, energy .*, of predicting the mean ", told)
    assert re.search(r"test MAE, stress .*, of predicting 0 ", told)

    # The file has energies of cells, the model those of an atom.
    samples, _ = read_samples(file, ["energy"], forces=True, stress=True)
    predictor = cf.load(run)
    assert predictor.units == ("eV/atom",)
    assert predictor.model.config.elements == (29, 79)
    told = {row["id"]: row for row in table(run / "predictions.csv")}
    tested = samples.select([x for x in samples.ids if told.get(x, {}).get("set") == "test"])
    assert [float(told[x]["energy"]) for x in tested.ids] == pytest.approx((tested.targets[:, 0] / 4).tolist())
    predicted = predictor.predict(tested.structures)[:, 0]
    assert [float(told[x]["energy_predicted"]) for x in tested.ids] == pytest.approx(predicted.tolist(), rel=1e-6)

    # The calculator gives the same, of the cell.
    atoms = tested.structures[0]
    atoms.calc = cf.ase.Calculator(run)
    assert atoms.get_potential_energy() == pytest.approx(4 * float(predicted[0]), rel=1e-6)
    components = np.array([[float(row[f"{i}_predicted"]) for i in "xyz"] for row in rows if row["id"] == tested.ids[0]])
    np.testing.assert_allclose(atoms.get_forces(), components, atol=1e-4)

    arguments = ["evaluate", str(run), "--data", str(file), "--split", str(run / "split.json"), "--forces", "--stress"]
    assert cli.main(arguments) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for name in ("energy", "forces", "stress"):
        assert float(lines[name][2]) == pytest.approx(metrics["mae"]["test"][name], rel=1e-2)


def test_rows_without_usable_forces_are_problems(tmp_path):
    good, *bad = alloys(5)
    bad[0].calc.results["forces"] = None
    bad[1].calc.results["forces"] = np.full((4, 3), np.nan)
    bad[2].calc.results["stress"] = None
    records = []
    for atoms in (good, *bad):
        structure = {"lattice": atoms.cell.tolist(), "species": atoms.get_chemical_symbols()}
        record = {"structure": structure | {"frac_coords": atoms.get_scaled_positions().tolist()}}
        of_atoms = {
            name: None if (x := atoms.calc.results[name]) is None else x.tolist() for name in ("forces", "stress")
        }
        records.append(record | of_atoms | {"energy": atoms.calc.results["energy"]})
    records[4]["forces"] = records[4]["forces"][:3]
    records.append(records[0] | {"structure": "data_x\n_cell_length_a 3\n"})
    records.append(records[0] | {"stress": [[1.0, 2.0], [3.0, 4.0]]})
    records.append(records[0] | {"forces": "strong"})
    path = tmp_path / "alloys.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in records))
    samples, problems = read_samples(path, ["energy"], forces=True, stress=True)
    assert samples.ids == ("0",)
    np.testing.assert_array_equal(samples.forces[0].numpy(), good.calc.results["forces"])
    np.testing.assert_array_equal(samples.stress[0].numpy(), good.get_stress(voigt=False))
    assert [x.reason for x in problems] == [
        "forces is missing",
        "forces must be finite, not nan",
        "stress is missing",
        "forces must be of 4 atoms, not of 3",
        "forces must come with extxyz, an ase database or JSON, which keep the order of atoms, not with a CIF",
        "stress must be (3,3) or 6 numbers, not an array of shape (2, 2)",
        "forces must be (n,3) numbers, not 'strong'",
    ]
    assert samples.select(["0"]).stress == samples.stress
    assert float(data_forces.per_atom(samples).targets) == pytest.approx(records[0]["energy"] / 4)
    with pytest.raises(ValueError, match=r"^forces must be True with stress$"):
        read_samples(path, stress=True)
    with pytest.raises(ValueError, match=r"^primitive must be False with forces"):
        read_samples(path, forces=True, primitive=True)


def test_a_training_begins_with_the_energies_that_the_model_knew(run, tmp_path):
    """Also where other crystals would have others of the elements, and one element is new."""
    others = alloys(12)
    for atoms in others:
        forces, stress = atoms.get_forces(), atoms.get_stress()
        energy = atoms.get_potential_energy() + 7.0 * (atoms.numbers == 29).sum()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
    strange = others[0].copy()
    strange.numbers[0] = 47
    zero = np.zeros((len(strange), 3))
    strange.calc = SinglePointCalculator(strange, energy=5.0, forces=zero, stress=np.zeros(6))
    io.write(tmp_path / "others.extxyz", [*others, *[strange] * 6])
    out = tmp_path / "out"
    still = ["--epochs=1", "--lr=1e-12", "--weight_decay=0", "--bias_decay=0", "--average_epochs=0"]
    options = ["--data", str(tmp_path / "others.extxyz"), "--target", "energy", "--forces", "--stress", *still]
    assert cli.main(["train", *options, "--from", str(run), "--out", str(out)]) == 0
    one, two = cf.load(run), cf.load(out)
    assert set(two.model.config.elements) == {29, 47, 79}
    torch.testing.assert_close(two.predict(others), one.predict(others), rtol=0, atol=1e-4)
    assert one.predict(others).std() > 1
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0  # which reads the model it started from no more
    assert torch.equal(cf.load(out).predict(others), two.predict(others))

    # The energy of gold stays where no crystal has any.
    for atoms in others:
        atoms.calc.atoms.numbers[:] = atoms.numbers[:] = 29
    io.write(tmp_path / "copper.extxyz", others)
    options[1], copper = str(tmp_path / "copper.extxyz"), tmp_path / "copper"
    assert cli.main(["train", *options, "--from", str(run), "--out", str(copper)]) == 0
    assert cli.main(["train", "--out", str(copper), "--resume"]) == 0
    configs = (one.model.config, cf.load(copper).model.config)
    energies = [dict(zip(x.elements, x.element_energies, strict=True)) for x in configs]
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)
    assert energies[0][79] != pytest.approx(energies[0][29], abs=0.1)


def test_options_that_do_not_go_together(run, file, capsys, tmp_path):
    def training(*more) -> str:
        return refused(capsys, "train", "--data", file, "--out", tmp_path / "out", *more)

    assert "forces must be given with stress" in training("--target", "energy", "--stress")
    assert "primitive must not be given with forces" in training("--target", "energy", "--forces", "--primitive")
    assert "unit must be eV/atom with forces, not eV" in training("--target", "energy", "--forces", "--unit", "eV")
    assert "target must be the energy alone with forces" in training("--target", "energy", "free", "--forces")
    assert "target must be the energy alone with forces, not forces" in training("--target", "forces", "--forces")
    assert "loss must be of numbers with forces" in training("--target", "energy", "--forces", "--loss", "bce")
    told = training("--target", "energy", "--forces_weight", "3")
    assert "forces must be given with forces_weight=3" in told
    told = training("--target", "energy", "--forces", "--stress_weight", "3")
    assert "stress must be given with stress_weight=3" in told
    with pytest.raises(ValueError, match=r"^energy_weight, forces_weight, stress_weight must not all be 0$"):
        task(3, energy_weight=0, forces_weight=0, stress_weight=0)
    with pytest.raises(ValueError, match="loss must be of numbers, not bce"):
        task(3, loss="bce")
    model = cf.load(run).model
    model.config = replace(model.config, element_energies=())
    model.save_pretrained(tmp_path / "plain")
    told = refused(capsys, "evaluate", tmp_path / "plain", "--data", file, "--forces")
    assert "which was trained without them" in told
