"""Loads the compiled kernels, the library `_C.so` and `crystalformer.kernels`, and says why they are missing.

Loading them implements the operators `crystalformer::cpu_...` and `crystalformer::triton_...`. This file comes without
torch: the command line begins so.
"""

from pathlib import Path

from .common.loading import LOADERS

LIBRARY = Path(__file__).with_name("_C.so")


def _load_cpu() -> bool | str:
    import torch

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
        import torch

        return f"they need torch 2.10 or later, and this is {torch.__version__} ({error})"
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
