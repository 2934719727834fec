"""Models of the paper's code (github.com/omron-sinicx/crystalformer) as models of ours."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.elements import NUM_ELEMENTS
from ..common.user_files import check_regular, parse_json, read_text
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

# Our names and theirs of what is the same.
NUMBERS = {
    "model_dim": "model_dim",
    "num_heads": "head_num",
    "num_blocks": "num_layers",
    "ff_dim": "ff_dim",
    "dropout": "dropout",
    "num_basis": "value_pe_dist_real",
    "basis_width": "value_pe_width_scale",
    "decay_bound": "gauss_lb_real",
    "decay_bound_reciprocal": "gauss_lb_reci",
}
SEQUENCES = {"readout_dims": "embedding_dim", "r0": "scale_real", "r0_reciprocal": "scale_reci"}


def from_official(state_dict: Mapping[str, Any], params_dict: Any = None, weights: str = "auto") -> Crystalformer:
    """The paper's model as ours, in eval mode, predicting in the units of its targets.

    It has the dtype of the weights: fp64 if any of them is, else fp32, which holds fp16 and bf16 as they are.

    Args:
        state_dict: what `torch.load(path, weights_only=True)` gives: a state dict of the paper's `Latticeformer` or
            of its `RegressionModel`, or a whole Lightning checkpoint.
        params_dict: the parameters of its JSON file: a dictionary, or an object that has them as attributes, as
            argparse.Namespace and types.SimpleNamespace; may be None for a Lightning checkpoint, which carries them.
        weights: "model", "swa" (the average over the last epochs, what the paper reports), or "auto": swa where the
            checkpoint has one that has seen an update.

    Raises:
        TypeError: for a state_dict or params_dict of another type.
        ValueError: for parameters or keys that have no counterpart here, shapes that do not fit the parameters, and
            weights that are not finite.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dictionary, not {type(state_dict).__name__}")
    if params_dict is None:
        params_dict = state_dict.get("hyper_parameters")
        if params_dict is None:
            raise ValueError("params_dict must be given: the checkpoint holds no hyper_parameters")
    params = _parameters(params_dict)
    state_dict = state_dict.get("state_dict", state_dict)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict['state_dict'] must be a dictionary, not {type(state_dict).__name__}")
    config = config_from_official(params)
    tensors = _choose_weights(state_dict, weights)
    dtype = torch.float32
    for x in tensors.values():
        dtype = torch.promote_types(dtype, x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else dtype
    model = Crystalformer(config).to(dtype)
    model.load_state_dict(_rename(tensors, config, _flag(params, "normalize_gauss", True)))
    if "target_mean" in state_dict:  # the paper's model predicts standardised targets
        model.rescale_(*(_checked(state_dict, name, config.num_targets) for name in ("target_mean", "target_std")))
    return model.eval()


def load_official(path: str | Path, params: Any = None, weights: str = "auto") -> Crystalformer:
    """`from_official` of a checkpoint file, read with weights_only.

    Args:
        params: the file with the paper's JSON of parameters, or its text; or as `params_dict`.

    Raises:
        OSError: for files that cannot be read.
        TypeError, ValueError: as `from_official`, and for files that are not a checkpoint or not JSON.
    """
    if isinstance(params, (str, Path)):
        try:
            params = parse_json(str(params) if str(params).lstrip().startswith("{") else read_text(params))
        except ValueError as error:
            raise ValueError(f"params must be JSON of parameters or a file with it, not {params}: {error}") from error
    try:
        check_regular(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a foreign file brings torch to raise
        raise ValueError(f"path must be a checkpoint that torch.load reads with weights_only=True: {path}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"path must hold a dictionary, not {type(checkpoint).__name__}: {path}")
    return from_official(checkpoint, params, weights)


def config_from_official(params_dict: Any) -> CrystalformerConfig:
    """Our configuration for the parameters of the paper's code, a dictionary or an object as in `from_official`.

    Raises:
        TypeError: for parameters that are neither.
        ValueError: for a parameter whose value has no counterpart here.
    """
    params = _parameters(params_dict)
    for name, value in FIXED.items():
        given = params.get(name, value)
        if not isinstance(given, (str, int, float)) or given != value:
            raise ValueError(f"params_dict[{name!r}] must be {value!r}, not {given!r}")
    domain = params.get("domain", "real")
    if not isinstance(domain, str) or domain not in DOMAINS:
        raise ValueError(f"params_dict['domain'] must be one of {', '.join(DOMAINS)}, not {domain!r}")
    targets = params.get("targets", "")
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, (list, tuple)) or not all(isinstance(x, str) for x in names):
        raise ValueError(f"params_dict['targets'] must be a name or a list of names, not {targets!r}")
    names = tuple(filter(None, names))
    values = {ours: params[theirs] for ours, theirs in NUMBERS.items() if theirs in params}
    values |= {ours: _sequence(params[theirs]) for ours, theirs in SEQUENCES.items() if theirs in params}
    values |= {"num_targets": max(1, len(names)), "target_names": names, "domain": DOMAINS[domain]}
    try:
        config = CrystalformerConfig(**values)
        return replace(config, r_max=_r_max(params.get("value_pe_dist_max", -10.0), config.r0))
    except (TypeError, ValueError) as error:
        ours, _, rest = str(error).partition(" ")
        theirs = (NUMBERS | SEQUENCES | {"r_max": "value_pe_dist_max"}).get(ours)
        raise ValueError(f"params_dict[{theirs!r}] {rest}" if theirs else f"params_dict: {error}") from error


def _r_max(given: Any, r0: tuple[float, ...]) -> float | None:
    """Å; the paper's code gives it as that many r0 if it is negative, of which -10 is None here."""
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"r_max must be a number, not {given!r}")
    if given >= 0 or given == -10.0:
        return None if given == -10.0 else given
    if len(set(r0)) > 1:
        raise ValueError(f"r_max must be -10 with several scale_real, not {given}")
    return -given * r0[0]


def _parameters(params: Any) -> Mapping[str, Any]:
    """What holds parameters as a dictionary: argparse's Namespace and the like have them as attributes."""
    values = params if isinstance(params, Mapping) else getattr(params, "__dict__", None)
    if not isinstance(values, Mapping) or callable(params):
        wanted = "a dictionary, or an object with the parameters as attributes"
        raise TypeError(f"params_dict must be {wanted}, not {type(params).__name__}")
    return values


def _flag(params: Mapping[str, Any], name: str, default: bool) -> bool:
    value = params.get(name, default)
    if not isinstance(value, int) or value not in (False, True):
        raise ValueError(f"params_dict[{name!r}] must be true or false, not {value!r}")
    return bool(value)


def _sequence(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _choose_weights(state_dict: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tensors of one `Latticeformer`."""
    if weights not in ("auto", "model", "swa"):
        raise ValueError(f"weights must be 'auto', 'model' or 'swa', not {weights!r}")
    if "input_embeddings.weight" in state_dict:
        return dict(state_dict)
    updates = state_dict.get("swa_model.n_averaged", 0)
    if not isinstance(updates, (int, Tensor)):
        raise ValueError(f"state_dict['swa_model.n_averaged'] must be a number, not {updates!r}")
    averaged = bool(torch.as_tensor(updates).sum() > 0)
    if weights == "swa" and not averaged:
        raise ValueError("weights must be 'model' or 'auto': the checkpoint holds no weight average with an update")
    prefix = "swa_model.module." if averaged and weights != "model" else "model."
    tensors = {key[len(prefix) :]: x for key, x in state_dict.items() if str(key).startswith(prefix)}
    if not tensors:
        shown = ", ".join(map(str, list(state_dict)[:5]))
        raise ValueError(f"state_dict must hold keys that start with {prefix!r}, not {shown}")
    return tensors


def _checked(tensors: Mapping[str, Tensor], name: str, *shape: int | None) -> Tensor:
    """The tensor of that name, of that shape, where None is any size."""
    if name not in tensors:
        raise ValueError(f"state_dict must hold {name!r}, as the paper's model with these parameters does")
    x = tensors[name]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"state_dict[{name!r}] must be a tensor of floating-point numbers, not {what}")
    if x.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"state_dict[{name!r}] must have shape ({wanted}), as params_dict says, not {tuple(x.shape)}")
    checks.check_finite(f"state_dict[{name!r}]", x)
    return x


def _rename(tensors: dict[str, Tensor], config: CrystalformerConfig, calibrated: bool) -> dict[str, Tensor]:
    """The tensors under our names."""

    def take(name: str, *shape: int | None) -> Tensor:
        x = _checked(tensors, name, *shape)
        del tensors[name]
        return x

    width, hidden, heads = config.model_dim, config.ff_dim, config.num_heads
    uncalibrated: list[str] = []
    result = {"embedding.weight": take("input_embeddings.weight", width, NUM_ELEMENTS).T.contiguous()}
    for block in range(config.num_blocks):
        old, new = f"encoder.layers.{block}.", f"blocks.{block}."
        attention, ours = old + "self_attn.", new + "attention."
        for name, bias in zip("qkv", take(attention + "in_proj_bias", 3 * width).chunk(3), strict=True):
            result[f"{ours}{name}_proj.weight"] = take(f"{attention}{name}_proj_weight", width, width)
            result[f"{ours}{name}_proj.bias"] = bias
        result[ours + "decay.weight"] = take(attention + "lattice_pos_weights", width).view(heads, config.head_dim)
        scale, shift = take(attention + "gauss_scale", 2)
        usable = calibrated and bool(scale > 0)
        if calibrated and not usable:
            uncalibrated.append(str(block))
        result[ours + "decay.scale"] = scale if usable else torch.ones(())
        result[ours + "decay.shift"] = shift if usable else torch.zeros(())
        tensors.pop(attention + "atten_scale", None)  # of another normalisation, unused
        if config.num_basis and (real := config.num_real_heads(block)):
            weight = take(attention + "pe_dist_proj", None, None, config.head_dim, config.num_basis)
            result[ours + "edge_weight"] = weight[0, :real]
        for name, o, i in (
            ("self_attn.out_proj", width, width),
            ("linear1", hidden, width),
            ("linear2", width, hidden),
        ):
            name_here = name.replace("self_attn", "attention")
            result[f"{new}{name_here}.weight"] = take(f"{old}{name}.weight", o, i)
            result[f"{new}{name_here}.bias"] = take(f"{old}{name}.bias", o)
    widths = (width, *config.readout_dims, config.num_targets)
    for layer, (i, o) in enumerate(pairwise(widths)):
        # linear, normalisation (none), ReLU there; linear, ReLU here
        result[f"readout.{2 * layer}.weight"] = take(f"mlp.{3 * layer}.weight", o, i)
        result[f"readout.{2 * layer}.bias"] = take(f"mlp.{3 * layer}.bias", o)
    if uncalibrated:
        warnings.warn(
            f"blocks {', '.join(uncalibrated)} were never calibrated: the paper's code would take statistics of each "
            "batch, this model takes scale 1 and shift 0; call calibrate",
            stacklevel=3,
        )
    if tensors:
        raise ValueError(f"state_dict must hold only keys of the paper's model, not {', '.join(sorted(tensors)[:5])}")
    return result
