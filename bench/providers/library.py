"""This library: each backend; `triton-tf32` in the precision of tensor cores, `triton-graph` as a CUDA graph.

`triton-bf16` rounds q, k and v to bf16, inside its time, and y back: its error is that of their rounding.
"""

import inspect
from collections.abc import Callable

import torch

import crystalformer as cf

from ..cases import (
    Absent,
    Case,
    Provider,
    attention_case,
    encoding_case,
    library_attention,
    library_encoding,
    require_backend,
    seeded_model,
    training_case,
)
from ..problems import Problem

FP32_BOUND, TF32_BOUND, BF16_BOUND = 1e-4, 1e-2, 5e-2


def _instructions(forward: float, backward: float, geometry: float) -> dict[str, float]:
    """By direction, from those of `attention_fwd` and of all kernels of a backward without and with the geometry."""
    backward, geometry = forward + backward, forward + geometry
    return {"forward": forward, "forward and backward": backward, "with positions and lattice": geometry}


# docs/kernels.md, sm_90: the row kernel, the column kernel and geometry_rows.
INSTRUCTIONS = {
    "triton": _instructions(22.7, 22.5 + 3.1, 42.8 + 3.1 + 4.8),
    "triton-tf32": _instructions(16.5, 16.9 + 3.1, 29.6 + 3.1 + 4.8),
    "triton-bf16": _instructions(22.9, 23.0 + 3.8, 44.4 + 3.8 + 4.8),
}


def _require(backend: str, x: Problem) -> None:
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
        _require(backend, x)
        for name in options:
            if name not in inspect.signature(cf.periodic_attention).parameters:
                raise Absent(f"periodic_attention has no argument {name!r}")
        return attention_case(x, library_attention(x, backend, **options), geometry=True)

    return prepare


def _bf16(x: Problem) -> Case:
    _require("triton", x)
    attend = library_attention(x, "triton")

    def rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return attend(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16(), **others).to(x.dtype)

    return attention_case(x, rounded, geometry=True)


def _encoding(backend: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        _require(backend, x)
        return encoding_case(x, library_encoding(x, backend), geometry=True)

    return prepare


def _training(backend: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        _require(backend, x)
        model, batch = seeded_model(x, x.dtype, backend), x.crystals.to(x.dtype)
        batch.images = x.images
        return training_case(model, lambda: model(batch))

    return prepare


PROVIDERS = [
    *(
        Provider(
            name, op, FP32_BOUND, prepare(name), instructions=INSTRUCTIONS.get(name, {}) if op == "attention" else {}
        )
        for op, prepare in (("attention", _attention), ("encoding", _encoding), ("training", _training))
        for name in ("cpu", "triton", "reference")
    ),
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
