"""Triton kernels, one file per op, named as in `crystalformer`. Installed as `crystalformer.kernels`.

Importing this implements the operators `crystalformer::triton_*` for CUDA tensors, and for CPU tensors where the
kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Python starts). A kernel's file, and with it triton, is
imported when its operator is called first: most of the time that this package took to import was triton's.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def _interpreted() -> bool:
    """Whether the kernels run on the CPU: as Triton has made them, where it is imported already, else as it will."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it
    from triton.runtime import JITFunction

    from .attention_fwd import attention_fwd

    return not isinstance(attention_fwd, JITFunction)


INTERPRETED = _interpreted()


def _operator(file: str, function: str) -> Callable[..., Any]:
    return lambda *args: getattr(import_module(f".{file}", __name__), function)(*args)


OPERATORS = {
    "images": _operator("images", "build"),
    "layout": _operator("layout", "pack"),
    "attention": _operator("attention_fwd", "attention"),
    "attention_backward": _operator("attention_bwd", "attention_backward"),
    "encoding": _operator("encoding", "encoding"),
    "encoding_backward": _operator("encoding", "encoding_backward"),
    "reciprocal": _operator("reciprocal_fwd", "reciprocal"),
    "reciprocal_backward": _operator("reciprocal_bwd", "reciprocal_backward"),
}

for _name, _function in OPERATORS.items():
    torch.library.impl(f"crystalformer::triton_{_name}", ("cuda", "cpu") if INTERPRETED else "cuda")(_function)
