"""Which implementation of an op serves which tensors."""

import torch

from .extension import LOADED
from .words import count

NAMES = ("triton", "cpu", "reference")
# On a GPU the reference's matrix products serve it.
NOT_IN_TRITON = ("reciprocal_sum",)


def _load_triton() -> bool | str:
    try:
        from . import kernels
    except ImportError as error:
        return (
            f"the Triton kernels, crystalformer.kernels, cannot be loaded ({error}): install triton, which is there "
            "for Linux, or use 'reference' on the GPU"
        )
    if torch.cuda.is_available() or kernels.INTERPRETED:
        return True
    return (
        "no CUDA device is there: use 'cpu' or 'reference', or set TRITON_INTERPRET=1 before Python starts to run the "
        "kernels slowly on the CPU"
    )


_TRITON = _load_triton()


def available_backends() -> dict[str, bool | str]:
    """The backends, each with True or, where it is missing, the reason and what to do about it."""
    return {
        "triton": _TRITON,
        "cpu": LOADED,
        "reference": True,
    }


def describe_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """One line: which backend `auto` takes for the attention on a device and, if it is the slow one, why."""
    backend = choose_backend("auto", device, "attention", dtype)
    threads = f", {count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    line = f"attention by the backend {backend!r} on {device.type}{threads}"
    if backend != "reference":
        return line
    reason = available_backends().get({"cuda": "triton"}.get(device.type, device.type), "there are no kernels for it")
    if reason is True:
        reason = f"the kernels for {device.type} do not compute in {dtype}"
    return f"{line}: plain PyTorch, many times slower than kernels, because {reason}"


def choose_backend(backend: str, device: torch.device, op: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend of an op that serves tensors on `device`.

    `auto` takes the fastest that is there: triton for fp32 CUDA tensors, cpu for CPU tensors, else the reference.

    Raises:
        ValueError: for a name that is no backend.
        RuntimeError: for a backend that is not there or has no such op, with the reason.
        TypeError: for a backend that does not compute in this dtype.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of 'auto', 'triton', 'cpu', 'reference', not {backend!r}")
    available = available_backends()
    if backend == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        serves = available[fast] is True and _device_type(fast) == device.type and _has(fast, op)
        return fast if serves and (fast == "cpu" or dtype == torch.float32) else "reference"
    if available[backend] is not True:
        raise RuntimeError(f"backend {backend!r} is not available: {available[backend]}")
    if not _has(backend, op):
        raise RuntimeError(f"backend {backend!r} has no {op} attention: use 'auto' or 'reference'")
    if backend != "reference" and _device_type(backend) != device.type:
        raise RuntimeError(
            f"backend {backend!r} takes tensors on {_device_type(backend)}, not on {device}: use 'auto' or 'reference'"
        )
    if backend == "triton" and dtype != torch.float32:
        raise TypeError(f"backend 'triton' takes torch.float32, not {dtype}: use 'auto' or 'reference'")
    return backend


def _has(backend: str, op: str) -> bool:
    return backend != "triton" or op not in NOT_IN_TRITON


def _device_type(backend: str) -> str:
    """Where the tensors are that a backend with kernels of its own takes."""
    if backend == "cpu":
        return "cpu"
    from .kernels import INTERPRETED

    return "cpu" if INTERPRETED else "cuda"
