"""Models of the paper's code (github.com/omron-sinicx/crystalformer) as models of ours."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import CrystalformerConfig
from .model import Crystalformer

DOMAINS = {"real": "real", "reci": "reciprocal", "multihead": "multihead", "real-reci": "real_reciprocal"}
# Options of the paper's code that none of its published models uses, and the only value this project knows.
FIXED: dict[str, Any] = {
    "encoder_name": "latticeformer",
    "t_activation": "relu",
    "positive_func": "elu=0.1",
    "gauss_state": "q",
    "pooling": "avr",
    "pre_pooling_op": "no",
    "norm_type": "no",
    "value_pe_condproj": "no",
    "value_pe_headed": True,
    "t_fixup_init": True,
    "use_cgcnn_feat": False,
    "exclude_self": False,
    "norm_func_mode": 0,
    "k_dim": 0,
    "v_dim": 0,
    "value_pe_dist_reci": 0,
    "value_pe_wave_real": 0,
    "value_pe_wave_reci": 0,
    "scale_grad": 0.0,
}


def from_official(
    state_dict: Mapping[str, Any], params_dict: Mapping[str, Any] | None = None, weights: str = "auto"
) -> Crystalformer:
    """The paper's model as ours, in eval mode, predicting in the units of its targets.

    Args:
        state_dict: what `torch.load(path, weights_only=True)` gives: a state dict of the paper's `Latticeformer` or
            of its `RegressionModel`, or a whole Lightning checkpoint.
        params_dict: the parameters of its JSON file; may be None for a Lightning checkpoint, which carries them.
        weights: "model", "swa" (the average over the last epochs, what the paper reports), or "auto": swa where the
            checkpoint has one that has seen an update.

    Raises:
        ValueError: for parameters or keys that have no counterpart here.
    """
    if params_dict is None:
        params_dict = state_dict.get("hyper_parameters")
        if params_dict is None:
            raise ValueError("params_dict must be given: the checkpoint holds no hyper_parameters")
    state_dict = state_dict.get("state_dict", state_dict)
    config = config_from_official(params_dict)
    model = Crystalformer(config)
    tensors = _choose_weights(state_dict, weights)
    model.load_state_dict(_rename(tensors, config, bool(params_dict.get("normalize_gauss", True))))
    if "target_mean" in state_dict:  # the paper's model predicts standardised targets
        model.rescale_(state_dict["target_mean"], state_dict["target_std"])
    return model.eval()


def load_official(path: str | Path, params: str | Path | None = None, weights: str = "auto") -> Crystalformer:
    """`from_official` of a checkpoint file, read with weights_only, and of its parameter JSON.

    Raises:
        ValueError: as `from_official`, and for a file that is no checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a foreign file brings torch to raise
        raise ValueError(f"path must be a checkpoint that torch.load reads with weights_only=True: {path}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"path must hold a dictionary, not {type(checkpoint).__name__}: {path}")
    return from_official(checkpoint, None if params is None else json.loads(Path(params).read_text()), weights)


def config_from_official(params: Mapping[str, Any]) -> CrystalformerConfig:
    """Our configuration for the parameters of the paper's code.

    Raises:
        ValueError: for a parameter whose value has no counterpart here.
    """
    for name, value in FIXED.items():
        if params.get(name, value) != value:
            raise ValueError(f"params_dict[{name!r}] must be {value!r}, not {params[name]!r}")
    domain = params.get("domain", "real")
    if domain not in DOMAINS:
        raise ValueError(f"params_dict['domain'] must be one of {', '.join(DOMAINS)}, not {domain!r}")
    r0 = _sequence(params.get("scale_real", 1.4))
    r_max = params.get("value_pe_dist_max", -10.0)
    if r_max < 0 and r_max != -10.0:
        if len(set(r0)) > 1:
            raise ValueError(f"params_dict['value_pe_dist_max'] must be -10 with several scale_real, not {r_max}")
        r_max = -r_max * r0[0]
    targets = params.get("targets", "")
    names = tuple(filter(None, [targets] if isinstance(targets, str) else targets))
    return CrystalformerConfig(
        num_targets=max(1, len(names)),
        target_names=names,
        model_dim=params.get("model_dim", 128),
        num_heads=params.get("head_num", 8),
        num_blocks=params.get("num_layers", 4),
        ff_dim=params.get("ff_dim", 512),
        readout_dims=tuple(params.get("embedding_dim", (128,))),
        dropout=params.get("dropout", 0.0),
        domain=DOMAINS[domain],
        num_basis=params.get("value_pe_dist_real", 64),
        r_max=None if r_max < 0 else r_max,
        basis_width=params.get("value_pe_width_scale", 1.0),
        r0=r0,
        r0_reciprocal=_sequence(params.get("scale_reci", 2.2)),
        decay_bound=params.get("gauss_lb_real", 0.5),
        decay_bound_reciprocal=params.get("gauss_lb_reci", 0.5),
    )


def _sequence(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _choose_weights(state_dict: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tensors of one `Latticeformer`."""
    if weights not in ("auto", "model", "swa"):
        raise ValueError(f"weights must be 'auto', 'model' or 'swa', not {weights!r}")
    if "input_embeddings.weight" in state_dict:
        return dict(state_dict)
    averaged = int(state_dict.get("swa_model.n_averaged", torch.tensor(0))) > 0
    if weights == "swa" and not averaged:
        raise ValueError("weights must be 'model' or 'auto': the checkpoint holds no weight average with an update")
    prefix = "swa_model.module." if averaged and weights != "model" else "model."
    tensors = {key[len(prefix) :]: x for key, x in state_dict.items() if key.startswith(prefix)}
    if not tensors:
        raise ValueError(f"state_dict must hold keys that start with {prefix!r}, not {', '.join(list(state_dict)[:5])}")
    return tensors


def _rename(tensors: dict[str, Tensor], config: CrystalformerConfig, calibrated: bool) -> dict[str, Tensor]:
    """The tensors under our names."""

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise ValueError(f"state_dict must hold {name!r}, as the paper's model with these parameters does")
        return tensors.pop(name)

    uncalibrated: list[str] = []
    result = {"embedding.weight": take("input_embeddings.weight").T.contiguous()}
    for block in range(config.num_blocks):
        old, new = f"encoder.layers.{block}.", f"blocks.{block}."
        attention, ours = old + "self_attn.", new + "attention."
        for name, bias in zip("qkv", take(attention + "in_proj_bias").chunk(3), strict=True):
            result[f"{ours}{name}_proj.weight"] = take(f"{attention}{name}_proj_weight")
            result[f"{ours}{name}_proj.bias"] = bias
        weight = take(attention + "lattice_pos_weights")
        result[ours + "decay.weight"] = weight.reshape(config.num_heads, config.head_dim)
        scale, shift = take(attention + "gauss_scale")
        usable = calibrated and bool(scale > 0)
        if calibrated and not usable:
            uncalibrated.append(str(block))
        result[ours + "decay.scale"] = scale if usable else torch.ones(())
        result[ours + "decay.shift"] = shift if usable else torch.zeros(())
        tensors.pop(attention + "atten_scale", None)  # of another normalisation, unused
        if config.num_basis and (real := config.num_real_heads(block)):
            result[ours + "edge_weight"] = take(attention + "pe_dist_proj")[0, :real]
        for name in ("self_attn.out_proj", "linear1", "linear2"):
            for kind in ("weight", "bias"):
                result[f"{new}{name.replace('self_attn', 'attention')}.{kind}"] = take(f"{old}{name}.{kind}")
    for layer in range(len(config.readout_dims) + 1):
        for kind in ("weight", "bias"):
            # linear, normalisation (none), ReLU there; linear, ReLU here
            result[f"readout.{2 * layer}.{kind}"] = take(f"mlp.{3 * layer}.{kind}")
    if uncalibrated:
        warnings.warn(
            f"blocks {', '.join(uncalibrated)} were never calibrated: the paper's code would take statistics of each "
            "batch, this model takes scale 1 and shift 0; call calibrate",
            stacklevel=3,
        )
    if tensors:
        raise ValueError(f"state_dict must hold only keys of the paper's model, not {', '.join(sorted(tensors)[:5])}")
    return result
