"""Which implementation of an op serves which tensors."""

import torch

from .loading import BACKENDS, load_backend
from .words import count

# On a GPU the reference's matrix products serve it.
NOT_IN_TRITON = ("reciprocal_sum",)
# Where the tensors are that a backend with kernels of its own takes; Triton's interpreter takes those of the CPU.
DEVICE_TYPE = {"triton": "cuda", "cpu": "cpu"}


def describe_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """One line: which backend `auto` takes for the attention on a device and, if it is the slow one, why."""
    backend = choose_backend("auto", device, "attention", dtype)
    threads = f", {count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    line = f"attention by the backend {backend!r} on {device.type}{threads}"
    if backend != "reference":
        return line
    kernels = {"cuda": "triton", "cpu": "cpu"}.get(device.type)
    reason = load_backend(kernels) if kernels else "there are no kernels for it"
    if reason is True:
        reason = f"the kernels for {device.type} do not compute in {dtype}"
    return f"{line}: plain PyTorch, many times slower than kernels, because {reason}"


def check_backend(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of 'auto', 'triton', 'cpu', 'reference', not {backend!r}")


def choose_backend(backend: str, device: torch.device, op: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend of an op that serves tensors on `device`.

    `auto` takes the fastest that is there: triton for fp32 CUDA tensors, cpu for CPU tensors, else the reference.

    Raises:
        ValueError: for a name that is not a backend's.
        RuntimeError: for a backend that is not there or has no such op, with the reason.
        TypeError: for a backend that does not compute in this dtype.
    """
    check_backend(backend)
    if backend == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        serves = load_backend(fast) is True and DEVICE_TYPE[fast] == device.type and _has(fast, op)
        return fast if serves and (fast == "cpu" or dtype == torch.float32) else "reference"
    if (state := load_backend(backend)) is not True:
        raise RuntimeError(f"backend {backend!r} is not available: {state}")
    if not _has(backend, op):
        raise RuntimeError(f"backend {backend!r} has no {op} attention: use 'auto' or 'reference'")
    if backend != "reference" and DEVICE_TYPE[backend] != device.type:
        raise RuntimeError(
            f"backend {backend!r} takes tensors on {DEVICE_TYPE[backend]}, not on {device}: use 'auto' or 'reference'"
        )
    if backend == "triton" and dtype != torch.float32:
        raise TypeError(f"backend 'triton' takes torch.float32, not {dtype}: use 'auto' or 'reference'")
    return backend


def _has(backend: str, op: str) -> bool:
    return backend != "triton" or op not in NOT_IN_TRITON
