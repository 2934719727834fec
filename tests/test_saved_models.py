"""Saved models: what is loaded is what was saved, or an error names it; the old or the new one if a save is stopped."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from problems import problem

import crystalformer as cf

st = pytest.importorskip("safetensors.torch", reason="models are kept in safetensors files")
SMALL = cf.CrystalformerConfig(num_blocks=1, model_dim=4, num_heads=2, ff_dim=4, num_basis=2, readout_dims=(2,))
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def batch() -> cf.CrystalBatch:
    x = problem()
    return cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)


def new(seed: int, **changes) -> cf.Crystalformer:
    torch.manual_seed(seed)
    return cf.Crystalformer(dataclasses.replace(SMALL, **changes)).eval()


def same(one: cf.Crystalformer, other: cf.Crystalformer) -> bool:
    x, y = one.state_dict(), other.state_dict()
    return one.config == other.config and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def load(folder: Path) -> cf.Crystalformer:
    return cf.Crystalformer.from_pretrained(folder)


def as_from_elsewhere(folder: Path, **changes) -> None:
    """The model without checksums, its config in config.json alone; tensors changed, or left out where None."""
    weights = st.load_file(folder / WEIGHTS) | changes
    st.save_file({name: x for name, x in weights.items() if x is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(tmp_path, dtype):
    model, x = new(0).to(dtype), batch().to(dtype)
    model.calibrate(x)
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = load(tmp_path / "run" / "model")
    assert same(loaded, model)
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    model.save_pretrained(tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is not the config that")
@pytest.mark.parametrize(("name", "step"), [(WEIGHTS, 97), (CONFIG, 101)])
def test_no_flipped_bit_changes_a_model_unnoticed(tmp_path, name, step):
    model = new(0)
    model.save_pretrained(tmp_path)
    path, refused = tmp_path / name, 0
    data = path.read_bytes()
    for place in range(0, 8 * len(data), step):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert same(load(tmp_path), model), place
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017, either outcome is right
            refused += 1
    assert refused > (0.9 * 8 * len(data) / step if name == WEIGHTS else -1)


def test_a_model_without_checksums_is_loaded(tmp_path):
    model = new(0)
    model.save_pretrained(tmp_path)
    as_from_elsewhere(tmp_path)
    assert same(load(tmp_path), model)


def test_a_config_that_was_changed_counts_for_nothing_and_warns(tmp_path):
    model = new(0)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    for text in (json.dumps(values | {"tol": 1e-2}), json.dumps(values | {"num_blocks": 10**7}), "{", ""):
        (tmp_path / CONFIG).write_text(text)
        with pytest.warns(UserWarning, match=r"config.json is not the config that model.safetensors was saved with"):
            assert same(load(tmp_path), model)
    (tmp_path / CONFIG).unlink()
    assert same(load(tmp_path), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"readout.0.bias": None}, r"but has no readout\.0\.bias$"),
        ({"more": torch.zeros(1)}, "which has no more$"),
        ({"readout.0.bias": torch.zeros(3)}, r"where readout\.0\.bias is of shape \(2,\), not \(3,\)"),
        (
            {"readout.0.bias": torch.zeros(2).double()},
            "of one dtype, but readout.0.bias is torch.float64",
        ),
        (
            {"readout.0.bias": torch.zeros(2).int()},
            "floating-point numbers of one dtype, but readout.0.bias is tor",
        ),
        ({"readout.0.bias": torch.tensor([0, torch.nan])}, "finite numbers, but readout.0.bias does not"),
        (dict.fromkeys(new(0).state_dict()), r"but has no blocks\.0\..*, .*, .* and 18 more"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    new(0).save_pretrained(tmp_path)
    as_from_elsewhere(tmp_path, **change)
    with pytest.raises(ValueError, match=r"model\.safetensors must hold .*" + message):
        load(tmp_path)


def test_files_that_are_no_model(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"path must be a folder with config.json and model.safetensors: no .*s$"
    ):
        load(tmp_path)
    new(0).save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    for data in (b"", b"\0" * 7, b"{}", content[:40], content[:-1], content + b"\0", b"\xff" * 100):
        (tmp_path / WEIGHTS).write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or no safetensors file: \w"):
            load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors must hold weights that fit its config, but has no"):
        load(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"with config.json and model.safetensors: no .*config.json$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 10**5, "no JSON"),
        ("[]", "config must be a dictionary, not list"),
        ('{"num_blocks": 10000000}', "num_blocks must be an integer, at least 1 and at most 128, not 10000000"),
        ('{"num_blocks": 100}', r"model.safetensors must hold weights that fit its config, but has no blocks\.1\."),
        ('{"model_dim": 10000}', r"model.safetensors must hold weights that fit its config, where .* not \(2, 2\)"),
        ('{"colour": "red"}', "config must have names among activation, atom_volumes, .*, not colour"),
        ('{"format": 2, "crystalformer": "9.1"}', r"not 2, written by .* pip install 'crystalformer==9.1'"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, text, message):
    new(0).save_pretrained(tmp_path)
    as_from_elsewhere(tmp_path)
    if text.startswith("{") and text.endswith("}"):
        text = json.dumps(json.loads((tmp_path / CONFIG).read_text()) | json.loads(text))
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


# A save that is stopped -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("changes", [{}, {"model_dim": 8}], ids=["as large", "larger"])
@pytest.mark.filterwarnings("ignore:.*is not the config that")
def test_a_save_that_is_stopped_leaves_the_old_or_the_new_model(tmp_path, monkeypatch, changes):
    """Stopped before and behind every replacement of a file and every write to the disk."""
    old, new_one, outcomes = new(0), new(1, **changes), []
    for stopped_at in range(12):
        old.save_pretrained(tmp_path)
        calls = 0

        def stop_or(do, *arguments, _at=stopped_at):
            nonlocal calls
            for before in (True, False):
                calls += 1
                if calls == _at + 1:
                    raise Killed
                if before:
                    do(*arguments)

        with monkeypatch.context() as patch:
            replace, fsync = os.replace, os.fsync
            patch.setattr(os, "replace", lambda a, b, do=replace: stop_or(do, a, b))
            patch.setattr(os, "fsync", lambda a, do=fsync: stop_or(do, a))
            with pytest.raises(Killed):
                new_one.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        outcomes.append(same(loaded, new_one))
        assert same(loaded, old) != outcomes[-1]
        assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}
    new_one.save_pretrained(tmp_path)
    assert same(load(tmp_path), new_one)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model, broken = new(0), new(1)
    model.save_pretrained(tmp_path)
    torch.nn.init.constant_(broken.readout[0].bias, torch.inf)
    with pytest.raises(ValueError, match=r"model\.safetensors must hold finite numbers, but readout\.0\.bias does not"):
        broken.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)
