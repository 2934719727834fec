"""Which implementation of an op serves which tensors."""

import torch

from . import ops  # noqa: F401  defines the operators that _C implements

NAMES = ("triton", "cpu", "reference")
# The ops that are written for the reference alone.
REFERENCE_ONLY = ("reciprocal",)


def _load_cpu() -> bool | str:
    try:
        from . import _C  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        return (
            f"the compiled CPU kernels, crystalformer._C, cannot be loaded ({error}): install crystalformer with "
            "`pip install --no-build-isolation .`, with torch and a C++20 compiler there, or use 'reference'"
        )
    return True


_cpu = _load_cpu()


def available_backends() -> dict[str, bool | str]:
    """The backends, each with True or, where it is missing, the reason and what to do about it."""
    return {
        "triton": "this version of crystalformer has no Triton kernels yet: use 'reference' on the GPU",
        "cpu": _cpu,
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
