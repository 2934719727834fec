"""This library: each backend; `triton-tf32` in the precision of tensor cores, `triton-graph` as a CUDA graph."""

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

FP32_BOUND, TF32_BOUND = 1e-4, 1e-2


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
        Provider(name, op, FP32_BOUND, prepare(name))
        for op, prepare in (("attention", _attention), ("encoding", _encoding), ("training", _training))
        for name in ("cpu", "triton", "reference")
    ),
    Provider("triton-tf32", "attention", TF32_BOUND, _attention("triton", precision="tf32")),
    Provider("triton-graph", "attention", FP32_BOUND, _attention("triton"), graph=True),
]
