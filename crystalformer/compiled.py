"""Loads the compiled kernels: the library `_C.so` and `crystalformer.kernels`.

Loading them implements the operators `crystalformer::cpu_...` and `crystalformer::triton_...`.
"""

from pathlib import Path

import torch

from .common.backends import AVAILABLE, DEVICE_TYPE

LIBRARY = Path(__file__).with_name("_C.so")


def _load_cpu() -> bool | str:
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = _reason(error.__cause__ or error)  # torch's own names the file alone
        return (
            f"the compiled CPU kernels cannot be loaded: {reason}: install crystalformer with `pip install "
            "--no-build-isolation .`, with torch and a C++20 compiler there, or use 'reference'"
        )
    return True


def _reason(error: BaseException) -> str:
    """What is wrong with the file."""
    if not LIBRARY.exists():
        return f"there is no file {LIBRARY.name} in {LIBRARY.parent}, so they have not been built"
    if "undefined symbol" in str(error):
        return f"they need torch 2.10 or later, and this is {torch.__version__} ({error})"
    return str(error)


def _load_triton() -> bool | str:
    try:
        from . import kernels
    except ImportError as error:
        return (
            f"the Triton kernels, crystalformer.kernels, cannot be loaded ({error}): install triton, which is there "
            "for Linux, or use 'reference' on the GPU"
        )
    if kernels.INTERPRETED:
        DEVICE_TYPE["triton"] = "cpu"
    if torch.cuda.is_available() or kernels.INTERPRETED:
        return True
    return (
        "no CUDA device is there: use 'cpu' or 'reference', or set TRITON_INTERPRET=1 before Python starts to run the "
        "kernels slowly on the CPU"
    )


AVAILABLE.update(triton=_load_triton(), cpu=_load_cpu())
