"""The paper's own code: its weights, converted, give its features, outputs and gradients on ten real crystals.

The numbers lie beside a checkout of the project's workshop, in ../shared/golden, and are not part of the project.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from golden import FILE

import crystalformer as cf

TAGS = ("real", "real_simple", "reciprocal", "multihead", "real_reciprocal", "real_wide_basis")
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"the golden numbers are not here: {FILE.name}")


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return {key: file[key] for key in file.files}


def load(golden, tag, backend, dtype, tol):
    prefix = f"{tag}/state/"
    state = {key.removeprefix(prefix): torch.from_numpy(x) for key, x in golden.items() if key.startswith(prefix)}
    converted = cf.convert.from_official(state, json.loads(str(golden[f"{tag}/config"])))
    model = cf.Crystalformer(dataclasses.replace(converted.config, tol=tol), backend)
    model.load_state_dict(converted.state_dict())
    ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(golden["sizes"])]))
    crystals = (torch.from_numpy(golden[key]) for key in ("numbers", "positions", "lattice"))
    return model.to(dtype), cf.CrystalBatch(*crystals, ptr).to(dtype)


def official_gradients(model, tag):
    """Our gradients under the names and shapes of the paper's code."""
    attention = model.blocks[0].attention
    biases = [getattr(attention, f"{x}_proj").bias.grad for x in "qkv"]
    named = {
        "lattice_pos_weights": attention.decay.weight.grad.flatten(),
        "in_proj_bias": torch.cat(biases),
        "out_proj.weight": attention.out_proj.weight.grad,
        "out_proj.bias": attention.out_proj.bias.grad,
    }
    named |= {f"{x}_proj_weight": getattr(attention, f"{x}_proj").weight.grad for x in "qkv"}
    if attention.edge_weight is not None:
        named["pe_dist_proj"] = attention.edge_weight.grad[None]
    result = {f"{tag}/grad/encoder.layers.0.self_attn.{name}": grad for name, grad in named.items()}
    return result | {f"{tag}/grad/input_embeddings.weight": model.embedding.weight.grad.T}


def error(x, exact):
    return float(np.abs(x.detach().double().numpy() - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("dtype", "tol", "value_bound", "gradient_bound"),
    [(torch.float64, 1e-12, 1e-8, 1e-7), (torch.float32, 1e-7, 2e-5, 1e-4)],
    ids=["fp64", "fp32"],
)
def test_official_numbers(golden, tag, backend, dtype, tol, value_bound, gradient_bound):
    model, batch = load(golden, tag, backend, dtype, tol)
    features, output = model.encode(batch), model(batch)[:, 0]
    assert error(features, golden[f"{tag}/features"]) < value_bound
    assert error(output, golden[f"{tag}/output"]) < value_bound
    (output * torch.linspace(-1, 1, len(output), dtype=dtype)).sum().backward()
    found = official_gradients(model, tag)
    assert set(found) == {key for key in golden if key.startswith(f"{tag}/grad/")}
    for name, grad in found.items():
        assert error(grad, golden[name]) < gradient_bound, name


@pytest.mark.skipif(
    cf.available_backends()["triton"] is not True,
    reason="needs an NVIDIA GPU, or Triton's interpreter: test_interpreter.py",
)
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # interpreter of 3.6
@torch.no_grad()
@pytest.mark.parametrize("tag", TAGS)
def test_official_numbers_of_triton(golden, tag):
    """Of the two smallest crystals: the interpreter is slow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = load(golden, tag, "triton", torch.float32, 1e-7)
    small = golden["sizes"].argsort()[:2]
    atoms = np.concatenate([np.arange(*batch.ptr[i : i + 2].tolist()) for i in small])
    ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(golden["sizes"][small])]))
    batch = cf.CrystalBatch(batch.species[atoms], batch.positions[atoms], batch.lattice[small], ptr).to(device)
    model = model.to(device)
    assert error(model.encode(batch).cpu(), golden[f"{tag}/features"][atoms]) < 2e-5
    assert error(model(batch)[:, 0].cpu(), golden[f"{tag}/output"][small]) < 2e-5
