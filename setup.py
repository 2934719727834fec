"""Build script: the packages are declared in pyproject.toml, this file only adds the compiled CPU kernels.

`crystalformer._C` (csrc/) is built when torch can be imported while installing, that is with
`pip install --no-build-isolation`. Without torch the package installs all the same and
`crystalformer.available_backends()` says what is missing.
"""

import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
# No -ffast-math: linked in, it would change the rounding of the whole process.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math"]
# Without the checks of every address that AddressSanitizer makes anyway: with them the kernels take minutes to compile.
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-sanitize=null,pointer-overflow,object-size,vptr"]
sanitized = bool(os.environ.get("CRYSTALFORMER_SANITIZE"))  # by `make sanitize`
FLAGS += SANITIZE if sanitized else []
# Compiled once more for each of these; csrc/kernels.cpp chooses at run time. Flags, because GCC makes poor code of
# vectors under `#pragma GCC target`.
LEVELS = {"csrc/kernels_v3.cpp": ["-march=x86-64-v3"], "csrc/kernels_v4.cpp": ["-march=x86-64-v4"]}
HAS_LEVELS = platform.machine() == "x86_64" and not sanitized
CSRC = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())
SOURCES = sorted({str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")} - set(LEVELS))


def extension() -> dict:
    """Arguments of `setup` that build `crystalformer._C`, or none of them with the reason on stderr."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"crystalformer: installing without crystalformer._C, the CPU kernels: {error}", file=sys.stderr)
        print("crystalformer: install torch first, then `pip install --no-build-isolation .`", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            for source, flags in LEVELS.items() if HAS_LEVELS else ():
                options: dict[str, Any] = {"output_dir": self.build_temp, "extra_postargs": FLAGS + flags}
                ext.extra_objects += self.compiler.compile([source], **options)
            super().build_extension(ext)

    flags = [*FLAGS, "-DCRYSTALFORMER_LEVELS"] if HAS_LEVELS else FLAGS
    options = {"extra_compile_args": flags, "extra_link_args": ["-fopenmp", *SANITIZE * sanitized], "depends": CSRC}
    module = CppExtension("crystalformer._C", SOURCES, **options)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
