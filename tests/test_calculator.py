"""Trained models in ase: energies, and forces and stresses that are their derivatives, on lists that are used again."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import SMALL

import crystalformer as cf
from crystalformer.app.predictor import Predictor

pytest.importorskip("ase", reason="the calculator is one of ase")
from ase import Atoms
from ase.build import bulk

STEP = 1e-4  # Å, and as a strain
CONFIG = replace(
    SMALL, dropout=0.0, tol=1e-6, r0_reciprocal=(0.7,), target_names=("energy",), target_units=("eV/atom",)
)


def model(config: cf.CrystalformerConfig = CONFIG) -> cf.Crystalformer:
    """An energy that changes by some eV as atoms move."""
    torch.manual_seed(1)
    found = cf.Crystalformer(config)
    found.embedding.weight.data *= 10
    found.calibrate(cf.CrystalBatch.from_structures([crystal(), bulk("Au"), bulk("Cu")]))
    return found.rescale_(torch.full((config.num_targets,), -3.0), torch.full((config.num_targets,), 1000.0)).eval()


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[0] = 79
    atoms.set_cell(atoms.cell.array @ [[1.02, 0.05, 0], [0, 0.97, 0.01], [0.02, 0, 1.01]], scale_atoms=True)
    atoms.rattle(0.1, seed=3)
    return atoms


def energy(calculator: "cf.ase.Calculator", atoms: Atoms) -> float:
    atoms.calc = calculator
    return atoms.get_potential_energy()


@pytest.mark.parametrize("domain", ["real", "reciprocal", "multihead"])
def test_forces_and_stress_are_the_derivatives_of_the_energy(domain):
    """By finite differences in fp64, on one list."""
    calculator = cf.ase.Calculator(model(replace(CONFIG, domain=domain)))
    atoms = crystal()
    atoms.calc = calculator
    forces, stress = atoms.get_forces(), atoms.get_stress()
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert np.abs(forces).max() > 0.1
    assert np.abs(stress).min() > 1e-5
    for i, axis in ((0, 0), (1, 2), (3, 1)):
        ends = [atoms.copy(), atoms.copy()]
        for sign, x in zip((1, -1), ends, strict=True):
            x.positions[i, axis] += sign * STEP
        slope = -(energy(calculator, ends[0]) - energy(calculator, ends[1])) / (2 * STEP)
        assert forces[i, axis] == pytest.approx(slope, abs=1e-6 * np.abs(forces).max())
    for voigt, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        ends = [atoms.copy(), atoms.copy()]
        for sign, x in zip((1, -1), ends, strict=True):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * STEP / 2
            strain[j, i] += sign * STEP / 2
            x.set_cell(x.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        slope = (energy(calculator, ends[0]) - energy(calculator, ends[1])) / (2 * STEP)
        assert stress[voigt] == pytest.approx(slope / atoms.get_volume(), abs=1e-6 * np.abs(stress).max())
    assert calculator.lists_built == 1


def test_lists_are_used_again_while_they_bear_it():
    """Numbers on lists of before are those on lists of now, but for what the certificate leaves out."""
    trained = model()
    calculator, random, atoms = cf.ase.Calculator(trained), np.random.default_rng(0), crystal()
    differences = []
    for _ in range(20):
        atoms.positions += random.normal(0, 0.004, atoms.positions.shape)
        atoms.calc = calculator
        found = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        anew = cf.ase.Calculator(trained)
        for x, y in zip(found, (energy(anew, atoms), atoms.get_forces(), atoms.get_stress()), strict=True):
            differences.append(np.abs(x - y).max())
    assert 2 <= calculator.lists_built <= 10
    assert 0 < max(differences) < 2e-5  # and so some lists were not those of now


def test_smooth_activations_make_smooth_forces():
    """With relu they jump, however small the steps are."""
    jumps = {}
    for activation in ("relu", "silu"):
        atoms, trained, forces = crystal(), model(replace(CONFIG, activation=activation)), []
        for weight in trained.blocks.parameters():
            weight.data *= 2  # or the kinks hardly matter
        atoms.calc = cf.ase.Calculator(trained)
        for _ in range(80):
            atoms.positions[0, 0] += 2e-3
            forces.append(atoms.get_forces())
        steps = np.abs(np.diff(forces, axis=0)).max((1, 2))
        jumps[activation] = steps.max() / np.median(steps)
    assert jumps["silu"] < 5
    assert jumps["relu"] > 4 * jumps["silu"]


def test_what_an_energy_is_of():
    trained = model()
    per_atom, atoms = cf.ase.Calculator(trained), crystal()
    expected = float(cf.app.predictor.Predictor(trained).predict([atoms])[0, 0])
    assert energy(per_atom, atoms) == pytest.approx(4 * expected, rel=1e-6)
    assert energy(per_atom, atoms * (2, 1, 1)) == pytest.approx(8 * expected, rel=1e-6)
    assert energy(cf.ase.Calculator(trained, per_atom=False), atoms) == pytest.approx(expected, rel=1e-6)
    in_mev = model(replace(CONFIG, target_units=("meV",)))
    assert energy(cf.ase.Calculator(in_mev, per_atom=True, factor=1e-3), atoms) == pytest.approx(
        4e-3 * expected, rel=1e-6
    )
    two = model(replace(CONFIG, num_targets=2, target_names=("gap", "energy"), target_units=("eV", "eV/atom")))
    second = 4 * float(Predictor(two).predict([atoms])[0, 1])
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        found = energy(cf.ase.Calculator(two, target="energy", dtype=dtype), atoms)
        assert found == pytest.approx(second, rel=rounding)
    for bad, options, message in (
        (two, {}, r"^target must say which of gap, energy is the energy$"),
        (two, {"target": "volume"}, r"^target must be one of gap, energy, not volume$"),
        (in_mev, {}, r"^per_atom and factor must be given unless the unit of energy is eV or eV/atom, not 'meV'$"),
        (trained, {"factor": -1.0}, r"^factor must be larger than 0"),
        (trained, {"dtype": torch.float16}, r"^dtype must be torch.float32 or torch.float64, not torch.float16$"),
    ):
        with pytest.raises(ValueError, match=message):
            cf.ase.Calculator(bad, **options)


def test_what_cannot_be_calculated():
    atoms = crystal()
    atoms.pbc = (True, True, False)
    with pytest.raises(ValueError, match=r"must be periodic in all three directions, not pbc=\[True, True, False\]$"):
        energy(cf.ase.Calculator(model()), atoms)
    known = model()
    known.config = replace(known.config, elements=(29,))
    with pytest.warns(UserWarning, match=r"^no crystal of the training had Au: "):
        energy(cf.ase.Calculator(known), crystal())
    orbits = cf.CrystalBatch.from_structures([bulk("Cu", cubic=True)], symmetry_tol=1e-5)
    with pytest.raises(ValueError, match=r"^batch must have a row for each atom"):
        cf.model.forces.differentiate(lambda batch: known(batch)[:, 0], orbits)


def test_ase_is_imported_when_it_is_asked_for():
    there = "assert ('ase' in sys.modules) is"
    code = f"import sys, crystalformer as cf; {there} False; cf.ase.Calculator; {there} True"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"^module 'crystalformer' has no attribute 'nothing'$"):
        cf.nothing()
