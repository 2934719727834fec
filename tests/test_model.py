"""The model: sizes, initialisation, calibration, files, and what it refuses."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from problems import problem
from torch.nn import functional as F

import crystalformer as cf
from crystalformer.model.layers import Decay, max_pool, mean_pool, rho

SMALL = cf.CrystalformerConfig(num_blocks=2, model_dim=16, num_heads=4, ff_dim=32, num_basis=8, readout_dims=(8, 4))


NAN = float("nan")


def batch(**options) -> cf.CrystalBatch:
    x = problem(**options)
    return cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)


def test_size_of_the_paper():
    assert cf.CrystalformerConfig().num_layer_weights == 853_505 - 98 * 128
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(cf.Crystalformer()) == 853_505
    assert count(cf.Crystalformer(cf.CrystalformerConfig(num_basis=0))) == 820_737


def test_t_fixup_initialisation():
    torch.manual_seed(0)
    config = cf.CrystalformerConfig()
    model, fixup = cf.Crystalformer(config), 0.67 * config.num_blocks**-0.25
    uniform = lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5  # deviation of Xavier's
    attention = model.blocks[0].attention
    expected = {
        model.embedding.weight: config.model_dim**-0.5 * (9 * config.num_blocks) ** -0.25,
        attention.q_proj.weight: uniform(128, 128),
        attention.v_proj.weight: fixup * uniform(128, 128),
        attention.out_proj.weight: fixup * uniform(128, 128),
        attention.decay.weight: 16**-0.5,
        attention.edge_weight: 64**-0.5 * uniform(64, 128),
        model.blocks[0].linear1.weight: fixup * uniform(128, 512),
        model.blocks[0].linear2.weight: fixup * uniform(512, 128),
    }
    for weight, deviation in expected.items():
        weight = weight.detach()
        assert float(weight.std()) == pytest.approx(deviation, rel=0.15)
        assert abs(float(weight.mean())) < 0.2 * deviation


@pytest.mark.parametrize("domain", ["real", "reciprocal", "multihead", "real_reciprocal"])
def test_every_weight_is_used(domain):
    model = cf.Crystalformer(dataclasses.replace(SMALL, domain=domain, num_targets=3, num_blocks=3))
    x = batch()
    out = model(x)
    assert out.shape == (x.num_crystals, 3)
    assert model.encode(x).shape == (x.num_atoms, 16)
    out.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 0]
    # A bias of the keys shifts all scores of an atom alike, which softmax does not see.
    assert [name for name in unused if "k_proj.bias" not in name] == []
    assert any("edge_weight" in name for name, _ in model.named_parameters()) == (domain != "reciprocal")


def test_mixed_species_are_mixtures():
    model, x = cf.Crystalformer(SMALL), batch()
    mixed = dataclasses.replace(x, species=x.occupancies())
    torch.testing.assert_close(model(mixed), model(x))
    mixed.species = 0.5 * mixed.species + 0.5 * mixed.species.roll(1, 0)
    embedded = model.embedding(x.species)
    torch.testing.assert_close(model.embedding(mixed.species), 0.5 * embedded + 0.5 * embedded.roll(1, 0))


def test_rho_is_the_papers_function():
    x = torch.linspace(-200, 200, 401)
    for bound in (0.3, 0.5, 0.9):
        y = rho(x, bound)
        torch.testing.assert_close(y, (1 - bound) * F.elu(0.1 * x / (1 - bound)) + 1)
        assert (y >= bound).all()
        assert (y.diff() >= 0).all()
        slope = (rho(torch.tensor(1e-3), bound) - rho(torch.tensor(-1e-3), bound)) / 2e-3
        assert float(slope) == pytest.approx(0.1, rel=1e-3)


def test_calibration_standardises_the_scores_and_stays():
    torch.manual_seed(0)
    model, x = cf.Crystalformer(SMALL), batch()
    before = [block.attention.decay for block in model.blocks]
    assert [(float(d.shift), float(d.scale)) for d in before] == [(0.0, 1.0)] * 2
    model.calibrate(x)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attention.decay.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    model(x)
    for score in seen:
        assert float(score.mean()) == pytest.approx(0, abs=1e-5)
        assert float(score.std()) == pytest.approx(1, rel=1e-5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_calibration_needs_atoms_that_differ():
    decay = Decay(2, 3)
    with pytest.raises(ValueError, match="batch must hold atoms that differ, to calibrate on"):
        decay.calibrate(torch.zeros(4, 2, 3))


def test_mean_pool():
    x = torch.randn(5, 3)
    torch.testing.assert_close(mean_pool(x, torch.tensor([0, 2, 5])), torch.stack([x[:2].mean(0), x[2:].mean(0)]))


def test_max_pool():
    x = torch.randn(5, 3, requires_grad=True)
    found = max_pool(x, torch.tensor([0, 2, 5]))
    torch.testing.assert_close(found, torch.stack([x[:2].amax(0), x[2:].amax(0)]))
    torch.testing.assert_close(max_pool(x[[0, 0]], torch.tensor([0, 2])), x[:1])
    (slope,) = torch.autograd.grad(max_pool(x[[1, 1, 1]], torch.tensor([0, 3])).sum(), x)
    assert slope.sum(1).tolist() == [0, 3, 0, 0, 0]


def test_rescale():
    model, x = cf.Crystalformer(dataclasses.replace(SMALL, num_targets=2)), batch()
    before = model(x)
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    expected = before.double() * deviation + mean
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    torch.testing.assert_close(model.rescale_(mean, deviation)(x), expected, rtol=1e-12, atol=0)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    torch.testing.assert_close(model.rescale_(deviation, mean.abs())(x), expected * mean.abs() + deviation)
    with pytest.raises(ValueError, match=r"target_deviation must be larger than 0 and finite, not -1\.0"):
        model.rescale_(mean, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"target_mean must be 2, as num_targets, not 1\.0"):
        cf.Crystalformer(dataclasses.replace(SMALL, num_targets=2)).rescale_(mean[:1], deviation[:1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_units": "eV"}, "target_units must be a sequence, not 'eV'"),
        ({"target_units": (1,)}, "target_names and target_units must be strings, not 1"),
        ({"target_units": ("eV", "K")}, "target_units must be 1, as num_targets, not eV, K"),
        ({"target_mean": (0.0,)}, "target_mean and target_deviation must both be given, or none of them"),
        ({"target_mean": (float("nan"),), "target_deviation": (1.0,)}, "target_mean must be .* not nan"),
        ({"elements": (0,)}, "elements must be an integer, at least 1 and at most 98, not 0"),
        ({"elements": (99,)}, "elements must be an integer, at least 1 and at most 98, not 99"),
    ],
)
def test_what_a_training_fills_in_is_checked(values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(SMALL, **values)


def test_units_are_kept_to_the_last_digit(tmp_path):
    pytest.importorskip("safetensors", reason="models are kept in safetensors files")
    model, x = cf.Crystalformer(SMALL), batch()
    mean, deviation = torch.tensor([-1e6 - 1 / 3]).double(), torch.tensor([0.1]).double()
    expected = model(x).double() * deviation + mean
    model.rescale_(mean, deviation).save_pretrained(tmp_path)
    loaded = cf.Crystalformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded.to(torch.float32)(x), expected)
    assert loaded.config == model.config


def test_images_are_built_once_and_checked():
    model, x = cf.Crystalformer(SMALL), batch()
    expected = model(x)
    assert x.images is None, "the caller's batch is not changed"
    x.images = model.build_images(x)
    assert torch.equal(model(x), expected)
    geometry = (x.positions, x.lattice, x.ptr)
    for options, message in (
        ({"decay_min": 0.3}, "batch.images must be built for decay_min at most 0.127551, as the model's, not for 0.3"),
        ({"tol": 1e-3}, "batch.images must be built for tol at most 1e-06, as the model's, not for 0.001"),
        ({"logit_range": 1.0}, "batch.images must be built for logit_range at least 4, as the model's, not for 1"),
    ):
        x.images = cf.build_images(*geometry, **options)
        with pytest.raises(ValueError, match=message):
            model(x)
    x.images = cf.build_images(*geometry, cutoff=12.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="batch must be a CrystalBatch, not Tensor"):
        model(x.positions)
    with pytest.raises(ValueError, match="precision must be 'exact' or 'tf32', not 'fast'"):
        cf.Crystalformer(precision="fast")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', 'cpu', 'reference', not 'gpu'"):
        cf.Crystalformer(backend="gpu")
    for config in ({}, {"num_blocks": 2}, 0):
        with pytest.raises(TypeError, match=f"config must be a CrystalformerConfig, not {type(config).__name__}"):
            cf.Crystalformer(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_dim": 0}, "model_dim must be an integer, at least 1, not 0"),
        ({"num_blocks": 2.0}, r"num_blocks must be an integer, at least 1 and at most 128, not 2\.0"),
        ({"num_heads": True}, "num_heads must be an integer, at least 1, not True"),
        ({"num_basis": -1}, "num_basis must be an integer, at least 0 and at most 65536, not -1"),
        ({"readout_dims": ()}, r"readout_dims must be a sequence of numbers, not \(\)"),
        ({"readout_dims": (8, 0)}, "readout_dims must be an integer, at least 1, not 0"),
        ({"r0": 1.4}, r"r0 must be a sequence of numbers, not 1\.4"),
        ({"r0": (1.4, -1.0)}, r"r0 must be at least 1e-06 and at most 1e\+06, not -1\.0"),
        ({"r0_reciprocal": (1e200,)}, r"r0_reciprocal must be at least 1e-06 and at most 1e\+06, not 1e\+200"),
        ({"r0": (1.4, 1e-5)}, "r0 must be at least 0.0001 and at most 100000, a tenth of r_max, .* not 1e-05"),
        ({"r_max": 0}, r"r_max must be at least 0\.001 and at most 1e\+06, not 0"),
        ({"basis_width": 1e7}, r"basis_width must be at least 0\.001 and at most 1000, not 10000000"),
        ({"num_basis": 10**5}, "num_basis must be an integer, at least 0 and at most 65536, not 100000"),
        ({"basis_width": "wide"}, "basis_width must be a number, not str"),
        ({"decay_bound": 1.0}, r"decay_bound must be larger than 0 and smaller than 1, not 1\.0"),
        ({"dropout": -0.1}, r"dropout must be at least 0 and smaller than 1, not -0\.1"),
        ({"tol": 2.0}, r"tol must be at least 1e-16 and smaller than 1, not 2\.0"),
        ({"logit_range": 800.0}, r"logit_range must be at least 0 and smaller than 500, not 800\.0"),
        ({"pooling": "sum"}, "pooling must be one of mean, max, not 'sum'"),
        ({"activation": "tanh"}, "activation must be one of relu, silu, not 'tanh'"),
        ({"domain": "fourier"}, "domain must be one of real, reciprocal, multihead, real_reciprocal, not 'fourier'"),
        ({"num_heads": 3}, "model_dim must be a multiple of num_heads=3, not 128"),
        ({"num_heads": 1, "domain": "multihead"}, "num_heads must be even for domain='multihead', not 1"),
        ({"num_blocks": 10**7}, "num_blocks must be an integer, at least 1 and at most 128, not 10000000"),
        ({"readout_dims": (1,) * 10**4}, "readout_dims must be at most 128 numbers, not 10000"),
        ({"model_dim": 10**6}, r"config must be of at most 1,000,000,000 weights, not 16,\d+,"),
        ({"target_names": "energy"}, "target_names must be a sequence, not 'energy'"),
        ({"target_names": (1,)}, "target_names and target_units must be strings, not 1"),
        ({"target_names": ("a", "a"), "num_targets": 2}, "target_names must be different names, not 'a', 'a'"),
        ({"target_names": ("a",), "num_targets": 2}, "target_names must be 2, as num_targets, not a"),
        ({"dropout": NAN}, "dropout must be at least 0 and smaller than 1, not nan"),
        ({"tol": 1e-300}, "tol must be at least 1e-16 and smaller than 1, not 1e-300"),
        ({"tol": True}, "tol must be a number, not bool"),
        ({"domain": ["real"]}, r"domain must be one of real, .*, not \['real'\]"),
    ],
)
def test_config_says_what_is_wrong(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cf.CrystalformerConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"r0": (1e-4, 1e5)},
        {"r0": (1e-6, 1e6), "r_max": 1e-3, "basis_width": 1e3},
        {"r0": (1e-6,), "r0_reciprocal": (1e6,), "num_basis": 0},
        {"r0": (1e-6,), "domain": "reciprocal"},
        {"r0": (1.4, 1e-6), "domain": "real_reciprocal"},
    ],
)
def test_a_model_takes_every_config_there_is(options):
    cf.Crystalformer(dataclasses.replace(SMALL, **options))


def test_config_of_the_paper():
    config = cf.CrystalformerConfig(r0=(1.4, 2.8), domain="real_reciprocal")
    assert config.decay_min == pytest.approx(0.5 / (2 * 2.8**2))
    assert [config.num_real_heads(block) for block in range(4)] == [8, 0, 8, 0]
    assert cf.CrystalformerConfig.from_dict(json.loads(config.to_json())) == config


def test_validation_in_inference_mode_leaves_training_possible(backend):
    model, x = cf.Crystalformer(SMALL, backend), batch()
    with torch.inference_mode():
        x.images = model.build_images(x)
        model(x)
    model.encode(x).sum().backward()
    assert model.embedding.weight.grad.abs().max() > 0


def test_a_copy_of_a_list_starts_without_layouts(backend):
    model, x = cf.Crystalformer(SMALL, backend), batch()
    x.images = model.build_images(x)
    expected = model(x)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert other.images.layouts == {}
        assert torch.equal(model(other), expected)


@torch.no_grad()
def test_autocast_keeps_the_sums_in_full_precision(backend):
    torch.manual_seed(0)
    model, x = cf.Crystalformer(SMALL, backend), batch()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.calibrate(x)
        out = model(x)
    assert 0 < float((out - expected).abs().max()) < 0.2 * float(expected.abs().max())


def test_forces_and_stress_of_the_model_are_differences_of_its_output():
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(num_blocks=2, model_dim=16, num_heads=2, ff_dim=16)).double()
    x = problem(kinds=(("cubic", 2), ("left_handed", 2)))
    species = torch.arange(1, 1 + len(x.positions))
    batch = cf.CrystalBatch(species, x.positions.clone(), x.lattice.clone(), x.ptr)
    batch.images = model.build_images(batch)
    batch.positions.requires_grad_()
    batch.lattice.requires_grad_()
    forces, stress = torch.autograd.grad(model(batch).sum(), (batch.positions, batch.lattice))
    step = 1e-5
    for leaf, grad in ((batch.positions, forces), (batch.lattice, stress)):
        along = torch.randn_like(leaf)
        energies = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * along
                energies.append(model(batch).sum())
                leaf -= sign * step * along
        difference = (energies[0] - energies[1]) / (2 * step)
        torch.testing.assert_close((grad * along).sum(), difference, rtol=1e-6, atol=0.0)
