"""Which implementation of an op serves which tensors."""

import torch

from .extension import LOADED

NAMES = ("triton", "cpu", "reference")
# The ops that are written for the reference alone.
REFERENCE_ONLY = ("reciprocal",)


def available_backends() -> dict[str, bool | str]:
    """The backends, each with True or, where it is missing, the reason and what to do about it."""
    return {
        "triton": "this version of crystalformer has no Triton kernels yet: use 'reference' on the GPU",
        "cpu": LOADED,
        "reference": True,
    }


def choose_backend(backend: str, device: torch.device, op: str) -> str:
    """The backend of an op that serves tensors on `device`.

    `auto` takes the fastest that is there: triton for CUDA tensors, cpu for CPU tensors, else the reference.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: for a backend that is not there or has no such op, with the reason.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of 'auto', 'triton', 'cpu', 'reference', not {backend!r}")
    available = available_backends()
    if backend == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        return fast if available[fast] is True and op not in REFERENCE_ONLY else "reference"
    if available[backend] is not True:
        raise RuntimeError(f"backend {backend!r} is not available: {available[backend]}")
    if op in REFERENCE_ONLY and backend != "reference":
        raise RuntimeError(f"backend {backend!r} has no {op} attention: use 'auto' or 'reference'")
    return backend
