"""Loads the compiled kernels, `crystalformer._C` and `crystalformer.kernels`, and says why they are missing.

Importing them implements the operators `crystalformer::cpu_...` and `crystalformer::triton_...`. This file comes
without torch: the command line begins so.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from .common.loading import LOADERS


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
        import torch

        return f"they were built for another torch than this, {torch.__version__} ({error})"
    return str(error)


def _load_triton() -> bool | str:
    import torch

    from . import kernels
    from .common.backends import DEVICE_TYPE

    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return (
            "no CUDA device is there: use 'cpu' or 'reference', or set TRITON_INTERPRET=1 before Python starts to run "
            "the kernels slowly on the CPU"
        )
    try:
        from .kernels import attention_fwd  # noqa: F401  # and triton
    except ImportError as error:
        return (
            f"the Triton kernels, crystalformer.kernels, cannot be loaded ({error}): install triton, which is there "
            "for Linux, or use 'reference' on the GPU"
        )
    if kernels.INTERPRETED:
        DEVICE_TYPE["triton"] = "cpu"
    return True


LOADERS.update(triton=_load_triton, cpu=_load_cpu)
