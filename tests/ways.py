"""The ways in which an op is computed, a backend, a dtype and a device: the contract binds each that is here.

Triton's kernels run on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1 when they are imported: a
process of its own, test_interpreter.py), or as compiled code that `make ptx` executes there.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from problems import Problem, problem

import crystalformer as cf

AVAILABLE = cf.available_backends()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # of the Triton kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = {torch.float64: "fp64", torch.float32: "fp32"}


@dataclass(frozen=True)
class Way:
    backend: str
    dtype: torch.dtype
    device: str = "cpu"

    def __str__(self) -> str:
        return "-".join((self.backend, NAMES[self.dtype], *(["cuda"] if self.device == "cuda" else [])))

    @property
    def double(self) -> bool:
        return self.dtype == torch.float64

    def place(self, x: Problem) -> Problem:
        """The problem in this dtype, on this device."""
        return x.to(self.dtype, self.device)

    def problem(self, *args, **options) -> Problem:
        return self.place(problem(*args, **options))

    def skip(self, reason: str) -> None:
        """Names an exception to the contract."""
        pytest.skip(f"{self}: {reason}")


def ways(backends: list[str]) -> list[Way]:
    """All that can be asked for; what is missing here is among them if it is the CPU's."""
    found = [Way(name, dtype) for name in ("reference", "cpu") for dtype in NAMES]
    found += [Way("reference", dtype, "cuda") for dtype in NAMES if GPU]
    found += [Way("triton", torch.float32, DEVICE)] if AVAILABLE["triton"] is True else []
    return [way for way in found if way.backend in backends]


def parameters(found: list[Way], by_name: bool = False) -> list:
    """For `parametrize`, with the reason where a backend is missing; `by_name`: the names of the backends alone."""
    parameters = []
    for way in found:
        missing = AVAILABLE[way.backend]
        marks = [] if missing is True else [pytest.mark.skip(reason=f"backend {way.backend}: {missing}")]
        value = way.backend if by_name else way
        parameters.append(pytest.param(value, id=str(value), marks=marks))
    return parameters
