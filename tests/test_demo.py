"""The demo runs, checks what it says, and its labels are right."""

import csv

import numpy as np
import pytest
import torch

from crystalformer import Crystalformer
from crystalformer.app import demo
from crystalformer.data.ionic import PROTOTYPES, ewald_energy, ionic_crystals, prototype, substituted

COULOMB = 14.3996454784  # e² / (4 pi eps0), eV Å


@pytest.mark.parametrize(
    ("label", "ions", "madelung"),
    [
        ("AB_cF8_225_a_b", {"Na": ("Na", 1), "Cl": ("Cl", -1)}, 1.747565),
        ("AB_cP2_221_b_a", {"Cs": ("Cs", 1), "Cl": ("Cl", -1)}, 1.762675),
        ("AB_cF8_216_c_a", {"Zn": ("Zn", 2), "S": ("S", -2)}, 1.638055),
    ],
)
def test_energies_are_those_of_the_madelung_constants(label, ions, madelung):
    structure = substituted(prototype(label), ions)
    (_, charge), _ = ions.values()
    distance = structure.distance_matrix[0, 1]
    radii = sum(float(site.specie.ionic_radius) for site in structure)
    assert distance == pytest.approx(radii, rel=1e-9)
    energy_per_pair = 2 * ewald_energy(structure)
    assert -energy_per_pair * distance / (COULOMB * charge**2) == pytest.approx(madelung, rel=1e-6)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "-1", "epochs must be an integer, at least 1 and at most"),
        ("--seconds", "nan", "seconds must be larger than 0"),
        ("--seed", "-1", "seed must be an integer, at least 0"),
        ("--out", "/dev/null/x", "Not a directory: '/dev/null/x'"),
    ],
)
def test_wrong_options_are_refused_before_the_work(option, value, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "show_backends", None)
    with pytest.raises(SystemExit, match="2"):
        demo.main([option, value])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_ionic_crystals_are_neutral_small_and_reproducible():
    crystals = ionic_crystals(60, seed=2)
    assert {x.prototype for x in crystals} == {name for name, _, _ in PROTOTYPES}
    for x in crystals:
        assert abs(x.structure.charge) < 1e-9
        assert len(x.structure) <= 6
        assert x.energy < 0
        assert np.isfinite(x.energy)
    assert [x.energy for x in ionic_crystals(5, seed=2)] == [x.energy for x in crystals[:5]]
    assert ionic_crystals(1, seed=3)[0].energy != crystals[0].energy


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "CHECKED", {"rock salt": "AB_cF8_225_a_b", "wurtzite": "AB_hP4_186_b_b"})
    for name, number in (("NUM_TRAIN", 16), ("NUM_VAL", 4), ("NUM_TEST", 6), ("BATCH_SIZE", 8)):
        monkeypatch.setattr(demo, name, number)


def test_demo(tiny, monkeypatch, tmp_path, capsys):
    # Without a warning too: pytest makes them errors.
    monkeypatch.setattr(demo, "TIMES_BETTER", 0.0)
    assert demo.main(["--out", str(tmp_path), "--epochs", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("reference  ready", "rock salt", "predicting the mean", "times smaller", "All is well"):
        assert text in out

    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert list(rows[0]) == ["id", "formula", "target", "prediction"]
    assert len(rows) == 6
    assert len({row["id"] for row in rows}) == 6
    for name in ("parity.png", "learning_curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    test = ionic_crystals(26, seed=0)[-6:]
    assert [row["formula"] for row in rows] == [x.formula for x in test]
    assert [float(row["target"]) for row in rows] == pytest.approx([x.energy for x in test], abs=1e-6)
    model = Crystalformer.from_pretrained(tmp_path / "model")
    batch = demo.CrystalBatch.from_structures([x.structure for x in test])
    with torch.no_grad():
        assert [float(row["prediction"]) for row in rows] == pytest.approx(model(batch)[:, 0].tolist(), abs=1e-4)


def test_demo_fails_where_the_model_does_not_learn(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "check_attention", lambda seed: True)
    monkeypatch.setattr(demo, "TIMES_BETTER", 1e9)
    assert demo.main(["--out", str(tmp_path), "--epochs", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_check_fails_beyond_a_bound(tiny, monkeypatch, capsys):
    assert demo.check_attention(0)
    for name, bound in (("FP32_BOUND", 1e-9), ("PHYSICS_BOUND", 0.0), ("CONTROL_BOUND", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(demo, name, bound)
            assert not demo.check_attention(0)
    capsys.readouterr()
