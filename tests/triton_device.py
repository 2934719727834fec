"""Where the tests of the Triton kernels run: on a GPU, or on the CPU, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from problems import Problem

import crystalformer as cf

MISSING = cf.available_backends()["triton"]
MARKS = [
    pytest.mark.skipif(MISSING is not True, reason=str(MISSING)),
    pytest.mark.usefixtures("poison"),
    # Of the interpreter in Triton 3.6.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(x: Problem, dtype: torch.dtype = torch.float32) -> Problem:
    """The problem where the kernels run."""
    x = x.to(dtype)
    names = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight", "ptr", "images")
    return replace(x, **{name: getattr(x, name).to(DEVICE) for name in names})
