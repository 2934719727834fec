"""Loads the compiled kernels: `crystalformer._C` and `crystalformer.kernels`.

Importing them implements the operators `crystalformer::cpu_...` and `crystalformer::triton_...`.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from .common.backends import AVAILABLE, DEVICE_TYPE


def _load_cpu() -> bool | str:
    try:
        from . import _C  # type: ignore[attr-defined]  # noqa: F401
    except ImportError as error:
        return (
            f"the compiled CPU kernels cannot be loaded: {_reason(Path(__file__).parent, error)}: install "
            "crystalformer with `pip install --no-build-isolation .`, with torch and a C++20 compiler there, or use "
            "'reference'"
        )
    return True


def _reason(folder: Path, error: ImportError) -> str:
    """What is wrong with the file. Python's own message speaks of a circular import, which is not the cause."""
    files = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if not files:
        return f"there is no file _C{EXTENSION_SUFFIXES[0]} in {folder}, so they have not been built"
    if not any(f"_C{suffix}" in files for suffix in EXTENSION_SUFFIXES):
        return f"{files[0]} in {folder} was built for another Python than this, which needs _C{EXTENSION_SUFFIXES[0]}"
    if "symbol" in str(error).lower():
        return f"they were built for another torch than this, {torch.__version__} ({error})"
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
