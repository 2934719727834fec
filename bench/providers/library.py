"""This library: each backend; `triton-tf32` in the precision of tensor cores, `triton-graph` as a CUDA graph.

`triton-bf16` rounds q, k and v to bf16, inside its time, and y back: its error is that of their rounding.

`cpu-slow-decay` is the sum alpha of decays from 0.002 Å⁻², over images and wave vectors, where `cpu` has the paper's
decays, from 0.1275 Å⁻², over images. `cpu-dual-space` is a training step of the model whose heads are half reciprocal.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import crystalformer as cf

from ..cases import (
    Absent,
    Case,
    Provider,
    Results,
    attention_case,
    encoding_case,
    library_attention,
    library_encoding,
    library_reciprocal,
    reciprocal_case,
    require_backend,
    seeded_model,
    training_case,
    truth,
)
from ..problems import CERTIFICATE, Problem
from ..truth import slow_alpha

FP32_BOUND, TF32_BOUND, BF16_BOUND = 1e-4, 1e-2, 5e-2
# One of the model's million ReLUs at its kink may take the other side in fp32: 1.1e-4 of a gradient on jarvis256.
STEP_BOUND = 1e-3
SLOW_DECAY = 0.002


def _instructions(forward: float, backward: float, geometry: float) -> dict[str, float]:
    """By direction, from those of `attention_fwd` and of all kernels of a backward without and with the geometry."""
    backward, geometry = forward + backward, forward + geometry
    return {"forward": forward, "forward and backward": backward, "with positions and lattice": geometry}


# docs/backends/triton.md, sm_90: the row kernel, the column kernel and geometry_rows (over images, not shells).
INSTRUCTIONS = {
    "triton": _instructions(23.6, 23.3 + 3.1, 44.9 + 3.1 + 4.8),
    "triton-tf32": _instructions(17.3, 17.6 + 3.1, 30.7 + 3.1 + 4.8),
    "triton-bf16": _instructions(23.9, 23.7 + 3.8, 46.1 + 3.8 + 4.8),
}


def require(backend: str, x: Problem) -> None:
    """Raises Absent for a backend that does not serve the problem's tensors."""
    require_backend(backend)
    where = {"cpu": "cpu", "triton": "cuda"}.get(backend, x.device.type)
    if where != x.device.type and not _interpreted(backend):
        raise Absent(f"for tensors on {where}")
    if backend == "triton" and x.dtype != torch.float32:
        raise Absent("for fp32")


def _interpreted(backend: str) -> bool:
    if backend != "triton":
        return False
    from crystalformer.kernels import INTERPRETED

    return INTERPRETED


def _attention(backend: str, **options: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        for name in options:
            if name not in inspect.signature(cf.periodic_attention).parameters:
                raise Absent(f"periodic_attention has no argument {name!r}")
        return attention_case(x, library_attention(x, backend, **options), geometry=True)

    return prepare


def _bf16(x: Problem) -> Case:
    require("triton", x)
    attend = library_attention(x, "triton")

    def rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return attend(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16(), **others).to(x.dtype)

    return attention_case(x, rounded, geometry=True)


def _encoding(backend: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        return encoding_case(x, library_encoding(x, backend), geometry=True)

    return prepare


def _reciprocal(backend: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        return reciprocal_case(x, library_reciprocal(x, backend), geometry=True)

    return prepare


def _alpha(backend: str, slow: bool = False) -> Callable[[Problem], Case]:
    """alpha alone, with the lists built beforehand or, in one direction, for each call."""

    def prepare(x: Problem) -> Case:
        require(backend, x)
        scale = SLOW_DECAY / CERTIFICATE["decay_min"] if slow else 1.0
        x = replace(x, inputs=x.inputs | {"decay": scale * x.inputs["decay"], "weight": None})
        certificate: dict[str, Any] = CERTIFICATE | {"decay_min": scale * CERTIFICATE["decay_min"]}
        batch = x.crystals

        def build() -> cf.ImageList:
            geometry = (batch.positions.double(), batch.lattice.double(), batch.ptr)
            return cf.build_images(*geometry, **certificate, every_pair=True, reciprocal=slow)

        images = build()
        encode = functools.partial(cf.periodic_encoding, backend=backend)
        case = encoding_case(x, functools.partial(encode, images=images), geometry=True)
        anew = encoding_case(x, lambda **inputs: encode(**inputs, images=build()))
        calls = case.calls | {"build, forward and backward": anew.calls["forward and backward"]}
        return Case(calls, case.results, _slow_truth(x) if slow else lambda: truth(x, "encoding"))

    return prepare


def _slow_truth(x: Problem) -> Callable[[], Results]:
    exact = replace(x, inputs={name: None if y is None else y.double() for name, y in x.inputs.items()})
    exact = replace(exact, upstream=x.upstream.double())
    function = functools.partial(slow_alpha, x.crystals.ptr)
    return lambda: encoding_case(exact, lambda **inputs: (function(**inputs), None), geometry=True).results()


def _training(backend: str, domain: str = "real") -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        model, batch = seeded_model(x, x.dtype, backend, domain), x.crystals.to(x.dtype)
        batch.images = x.images
        batch = model.prepare(batch)
        exact = None if domain == "real" else lambda: truth(x, "training", domain)
        return training_case(model, lambda: model(batch), exact)

    return prepare


PROVIDERS = [
    *(
        Provider(
            name, op, FP32_BOUND, prepare(name), instructions=INSTRUCTIONS.get(name, {}) if op == "attention" else {}
        )
        for op, prepare in (("attention", _attention), ("encoding", _encoding))
        for name in ("cpu", "triton", "reference")
    ),
    *(Provider(name, "training", STEP_BOUND, _training(name)) for name in ("cpu", "triton", "reference")),
    *(Provider(name, "reciprocal", FP32_BOUND, _reciprocal(name)) for name in ("cpu", "triton", "reference")),
    Provider("cpu", "alpha", FP32_BOUND, _alpha("cpu")),
    Provider("cpu-slow-decay", "alpha", FP32_BOUND, _alpha("cpu", slow=True)),
    Provider("cpu-dual-space", "training", STEP_BOUND, _training("cpu", "multihead")),
    Provider(
        "triton-tf32",
        "attention",
        TF32_BOUND,
        _attention("triton", precision="tf32"),
        False,
        INSTRUCTIONS["triton-tf32"],
    ),
    Provider("triton-bf16", "attention", BF16_BOUND, _bf16, False, INSTRUCTIONS["triton-bf16"]),
    Provider("triton-graph", "attention", FP32_BOUND, _attention("triton"), True, INSTRUCTIONS["triton"]),
]
