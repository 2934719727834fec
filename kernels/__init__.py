"""Triton kernels, one file per op, named as in `crystalformer`. Installed as `crystalformer.kernels`.

Importing this implements the operators `crystalformer::triton_*` for CUDA tensors, and for CPU tensors where the
kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported).
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import JITFunction

from . import attention_bwd, attention_fwd, encoding, images, layout, reciprocal_bwd, reciprocal_fwd

INTERPRETED = not isinstance(attention_fwd.attention_fwd, JITFunction)
OPERATORS: dict[str, Callable[..., Any]] = {
    "images": images.build,
    "layout": layout.pack,
    "attention": attention_fwd.attention,
    "attention_backward": attention_bwd.attention_backward,
    "encoding": encoding.encoding,
    "encoding_backward": encoding.encoding_backward,
    "reciprocal": reciprocal_fwd.reciprocal,
    "reciprocal_backward": reciprocal_bwd.reciprocal_backward,
}

for _name, _function in OPERATORS.items():
    torch.library.impl(f"crystalformer::triton_{_name}", ("cuda", "cpu") if INTERPRETED else "cuda")(_function)
