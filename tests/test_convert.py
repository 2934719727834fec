"""The paper's checkpoints in all the forms they come in, and what has no counterpart here."""

import argparse
import json
import types

import pytest
import torch
from problems import problem

import crystalformer as cf
from crystalformer.model.convert import config_from_official, load_official

PARAMS = {
    "encoder_name": "latticeformer",
    "num_layers": 2,
    "model_dim": 16,
    "head_num": 4,
    "ff_dim": 32,
    "embedding_dim": [16],
    "domain": "real",
    "scale_real": [1.4],
    "scale_reci": [2.2],
    "value_pe_dist_real": 8,
    "value_pe_dist_max": -10.0,
    "targets": "bandgap",
}


def official_state(seed: int = 0, scale: float = 2.0, heads: int = 4, basis: int = 8, targets: int = 1):
    """A state dict with the names and shapes of the paper's code, for PARAMS."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng) * 0.2
    state = {"input_embeddings.weight": normal(16, 98)}
    for block in range(2):
        attention = f"encoder.layers.{block}.self_attn."
        state[attention + "gauss_scale"] = torch.tensor([scale, 0.1])
        state[attention + "atten_scale"] = torch.zeros(1)
        state |= {f"{attention}{name}_proj_weight": normal(16, 16) for name in "qkv"}
        state[attention + "in_proj_bias"] = normal(48)
        state[attention + "lattice_pos_weights"] = normal(16)
        state[attention + "pe_dist_proj"] = normal(1, heads, 4, basis)
        state |= {attention + "out_proj.weight": normal(16, 16), attention + "out_proj.bias": normal(16)}
        layer = f"encoder.layers.{block}."
        state |= {layer + "linear1.weight": normal(32, 16), layer + "linear1.bias": normal(32)}
        state |= {layer + "linear2.weight": normal(16, 32), layer + "linear2.bias": normal(16)}
    state |= {"mlp.0.weight": normal(16, 16), "mlp.0.bias": normal(16)}
    return state | {"mlp.3.weight": normal(targets, 16), "mlp.3.bias": normal(targets)}


def lightning(averaged: int):
    """A checkpoint of the paper's RegressionModel: the model, its average, and the targets' mean and deviation."""
    state = {f"model.{key}": x for key, x in official_state(seed=0).items()}
    state |= {f"swa_model.module.{key}": x for key, x in official_state(seed=1).items()}
    state["swa_model.n_averaged"] = torch.tensor(averaged)
    state |= {"target_mean": torch.tensor([1.5]), "target_std": torch.tensor([0.5])}
    return {"state_dict": state, "hyper_parameters": PARAMS, "epoch": 3}


def batch():
    x = problem()
    return cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)


def test_raw_state_dict():
    state = official_state()
    before = {key: x.clone() for key, x in state.items()}
    model, x = cf.convert.from_official(state, PARAMS), batch()
    assert not model.training
    assert all(torch.equal(state[key], before[key]) for key in before), "the caller's state dict is not changed"
    assert torch.equal(model.embedding.weight, state["input_embeddings.weight"].T)
    assert torch.equal(model.blocks[1].attention.k_proj.bias, state["encoder.layers.1.self_attn.in_proj_bias"][16:32])
    assert float(model.blocks[0].attention.decay.scale) == 2.0
    assert torch.isfinite(model(x)).all()


def test_lightning_checkpoint_predicts_in_units():
    x = batch()
    for averaged, weights, seed in ((5, "auto", 1), (5, "model", 0), (0, "auto", 0), (5, "swa", 1)):
        converted = cf.convert.from_official(lightning(averaged), weights=weights)
        raw = cf.convert.from_official(official_state(seed), PARAMS)
        torch.testing.assert_close(converted(x), raw(x).double() * 0.5 + 1.5)


def test_files_are_read_with_weights_only(tmp_path):
    torch.save(lightning(5), tmp_path / "swa.ckpt")
    torch.save(official_state(), tmp_path / "raw.pt")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    x = batch()
    torch.testing.assert_close(load_official(tmp_path / "swa.ckpt")(x), cf.convert.from_official(lightning(5))(x))
    loaded = load_official(tmp_path / "raw.pt", tmp_path / "params.json")
    torch.testing.assert_close(loaded(x), cf.convert.from_official(official_state(), PARAMS)(x))
    torch.save({"state_dict": official_state(), "code": json.loads}, tmp_path / "code.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_official(tmp_path / "code.pt", tmp_path / "params.json")


def test_the_dtype_is_that_of_the_weights():
    """fp64 loses nothing; fp16 becomes fp32, which holds it as it is."""
    state = {key: x.double() + 1e-12 for key, x in official_state().items()}
    model = cf.convert.from_official(state, PARAMS)
    assert torch.equal(model.embedding.weight, state["input_embeddings.weight"].T)
    assert {x.dtype for x in model.parameters()} == {torch.float64}
    state = {key: x.half() for key, x in official_state().items()}
    model = cf.convert.from_official(state, PARAMS)
    assert torch.equal(model.embedding.weight, state["input_embeddings.weight"].T.float())


def test_parameters_as_people_hold_them(tmp_path):
    torch.save(official_state(), tmp_path / "raw.pt")
    expected = cf.convert.from_official(official_state(), PARAMS).config
    for params in (argparse.Namespace(**PARAMS), types.SimpleNamespace(**PARAMS), types.MappingProxyType(PARAMS)):
        assert cf.convert.from_official(official_state(), params).config == expected
        assert config_from_official(params) == expected
    for params in (PARAMS, json.dumps(PARAMS), argparse.Namespace(**PARAMS)):
        assert load_official(tmp_path / "raw.pt", params).config == expected
    for params in ("x", 3, [PARAMS], torch.nn.Identity()):
        with pytest.raises(TypeError, match=r"^params_dict must be a dictionary, or an object with the parameters as"):
            cf.convert.from_official(official_state(), params)
    for text in ("{", '{"a": ' * 9999, tmp_path):
        with pytest.raises(ValueError, match=r"^params must be JSON of parameters or a file with it, not "):
            load_official(tmp_path / "raw.pt", text)


def test_multihead_keeps_the_value_encoding_of_its_real_half():
    model = cf.convert.from_official(official_state(), PARAMS | {"domain": "multihead"})
    weight = official_state()["encoder.layers.0.self_attn.pe_dist_proj"]
    assert torch.equal(model.blocks[0].attention.edge_weight, weight[0, :2])


def test_several_targets():
    params = PARAMS | {"targets": ["bandgap", "energy"]}
    model = cf.convert.from_official(official_state(targets=2), params)
    assert model(batch()).shape == (3, 2)


def test_without_normalisation_the_scores_are_taken_as_they_are():
    model = cf.convert.from_official(official_state(scale=0.0), PARAMS | {"normalize_gauss": False})
    assert [float(x) for x in (model.blocks[0].attention.decay.scale, model.blocks[0].attention.decay.shift)] == [1, 0]


def test_never_calibrated_model_warns():
    with pytest.warns(UserWarning, match=r"blocks 0, 1 were never calibrated: .* call calibrate"):
        model = cf.convert.from_official(official_state(scale=0.0), PARAMS)
    assert float(model.blocks[0].attention.decay.scale) == 1.0


def test_length_scales():
    config = config_from_official(PARAMS | {"scale_real": [1.1, 1.9], "value_pe_dist_max": 8.0, "domain": "real-reci"})
    assert (config.r0, config.r_max, config.domain) == ((1.1, 1.9), 8.0, "real_reciprocal")
    assert config_from_official(PARAMS).r_max is None
    assert config_from_official(PARAMS | {"value_pe_dist_max": -5.0}).r_max == pytest.approx(7.0)
    assert config_from_official(PARAMS | {"scale_real": 2.0}).r0 == (2.0,)
    with pytest.raises(
        ValueError, match=r"params_dict\['value_pe_dist_max'\] must be -10 with several scale_real, not -5"
    ):
        config_from_official(PARAMS | {"scale_real": [1.1, 1.9], "value_pe_dist_max": -5.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "max"}, r"params_dict\['pooling'\] must be 'avr', not 'max'"),
        ({"exclude_self": True}, r"params_dict\['exclude_self'\] must be False, not True"),
        ({"pooling": torch.zeros(2)}, r"params_dict\['pooling'\] must be 'avr', not tensor"),
        ({"head_num": "4"}, r"params_dict\['head_num'\] must be an integer, at least 1, not '4'"),
        ({"num_layers": None}, r"params_dict\['num_layers'\] must be an integer, at least 1 and at most 128, not None"),
        ({"scale_real": []}, r"params_dict\['scale_real'\] must be a sequence of numbers, not \(\)"),
        ({"scale_reci": ["1.4"]}, r"params_dict\['scale_reci'\] must be a number, not str"),
        ({"embedding_dim": 1.5}, r"params_dict\['embedding_dim'\] must be an integer, at least 1, not 1\.5"),
        ({"value_pe_dist_max": "-10"}, r"params_dict\['value_pe_dist_max'\] must be a number, not '-10'"),
        ({"value_pe_dist_max": float("nan")}, r"params_dict\['value_pe_dist_max'\] must be at least 0\.001 .* not nan"),
        ({"normalize_gauss": "false"}, r"params_dict\['normalize_gauss'\] must be true or false, not 'false'"),
        ({"domain": ["real"]}, r"params_dict\['domain'\] must be one of real, reci, "),
        ({"targets": 3}, r"params_dict\['targets'\] must be a name or a list of names, not 3"),
        ({"domain": "reci-real"}, r"params_dict\['domain'\] must be one of real, reci, .*, not 'reci-real'"),
    ],
)
def test_options_without_counterpart(change, message):
    with pytest.raises(ValueError, match=message):
        cf.convert.from_official(official_state(), PARAMS | change)


def test_says_what_is_wrong_with_the_state_dict():
    with pytest.raises(ValueError, match="params_dict must be given: the checkpoint holds no hyper_parameters"):
        cf.convert.from_official(official_state())
    with pytest.raises(ValueError, match="weights must be 'auto', 'model' or 'swa', not 'best'"):
        cf.convert.from_official(official_state(), PARAMS, weights="best")
    with pytest.raises(ValueError, match="weights must be 'model' or 'auto': the checkpoint holds no weight average"):
        cf.convert.from_official(lightning(0), weights="swa")
    with pytest.raises(ValueError, match=r"state_dict must hold keys that start with 'model\.', not other"):
        cf.convert.from_official({"other": torch.zeros(1)}, PARAMS)
    with pytest.raises(ValueError, match=r"state_dict must hold only keys of the paper's model, not extra"):
        cf.convert.from_official(official_state() | {"extra": torch.zeros(1)}, PARAMS)
    state = official_state()
    del state["mlp.3.bias"]
    with pytest.raises(ValueError, match=r"state_dict must hold 'mlp\.3\.bias'"):
        cf.convert.from_official(state, PARAMS)
    for name, value, message in (
        ("input_embeddings.weight", None, "be a tensor of floating-point numbers, not a NoneType"),
        (
            "mlp.0.bias",
            torch.zeros(16, dtype=torch.int64),
            r"be a tensor of floating-point numbers, not of torch\.int64",
        ),
        ("mlp.0.bias", torch.zeros(3), r"have shape \(16\), as params_dict says, not \(3,\)"),
        ("mlp.0.bias", torch.full((16,), float("nan")), r"be finite, but state_dict\['mlp\.0\.bias'\]\[0\] is nan"),
        ("encoder.layers.1.self_attn.gauss_scale", torch.zeros(()), r"have shape \(2\), as params_dict says, not \(\)"),
    ):
        with pytest.raises(ValueError, match=rf"^state_dict\['{name}'\] must {message}"):
            cf.convert.from_official(official_state() | {name: value}, PARAMS)
    with pytest.raises(TypeError, match=r"^state_dict must be a dictionary, not list"):
        cf.convert.from_official([], PARAMS)
