"""Build script: the packages are declared in pyproject.toml, this file only adds the compiled CPU kernels.

`crystalformer._C` (csrc/) is built when torch can be imported while installing, that is with
`pip install --no-build-isolation`. Without torch, or without C++ sources, the package installs all the same and
`crystalformer.available_backends()` says what is missing.
"""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))


def extension() -> dict:
    """Arguments of `setup` that build `crystalformer._C`, or none of them with the reason on stderr."""
    if not SOURCES:
        print("crystalformer: no C++ sources in csrc/, installing without crystalformer._C", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"crystalformer: installing without crystalformer._C, the CPU kernels: {error}", file=sys.stderr)
        print("crystalformer: install torch first, then `pip install --no-build-isolation .`", file=sys.stderr)
        return {}
    # Instruction sets are chosen at run time, csrc/kernels.cpp. No -ffast-math: it would change the host's rounding.
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    module = CppExtension("crystalformer._C", SOURCES, extra_compile_args=flags, extra_link_args=["-fopenmp"])
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
