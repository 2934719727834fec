"""Build script: the packages are declared in pyproject.toml, this file only adds the compiled CPU kernels.

The library `crystalformer/_C.so` (csrc/) is built when torch can be imported while installing, that is with
`pip install --no-build-isolation`, and a C++20 compiler is there. Without them the package installs all the same and
`crystalformer.available_backends()` says what is missing. The library, and so the wheel, is for every Python and every
torch from 2.10 on.
"""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
# No -ffast-math: linked in, it would change the rounding of the whole process.
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# The oldest torch: headers and functions of later ones are hidden. Debug information would be nine tenths of the file.
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-g0"]
LINK = ["-s"]
# Without the checks of every address that AddressSanitizer makes anyway: with them the kernels take minutes to compile.
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SANITIZE += ["-fno-sanitize=null,pointer-overflow,object-size,vptr"]
sanitized = bool(os.environ.get("CRYSTALFORMER_SANITIZE"))  # by `make sanitize`
if sanitized:
    FLAGS, LINK = FLAGS + SANITIZE, SANITIZE
# Compiled once more for each of these; csrc/kernels.cpp chooses at run time. Flags, because GCC makes poor code of
# vectors under `#pragma GCC target`.
LEVELS = {"csrc/kernels_v3.cpp": ["-march=x86-64-v3"], "csrc/kernels_v4.cpp": ["-march=x86-64-v4"]}
HAS_LEVELS = platform.machine() == "x86_64" and not sanitized
CSRC = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())
SOURCES = sorted({str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")} - set(LEVELS))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def without_kernels(reason: object, remedy: str) -> dict:
    print(
        "crystalformer: installing without the CPU kernels, so attention on the CPU will be many times slower: "
        f"{reason}; {remedy}, then `pip install --no-build-isolation .`",
        file=sys.stderr,
    )
    return {}


def extension() -> dict:
    """Arguments of `setup` that build the library, or none of them with the reason on stderr."""
    try:
        from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths
    except ImportError as error:
        return without_kernels(error, "install torch first")
    if shutil.which(get_cxx_compiler().split()[0]) is None:
        return without_kernels(f"there is no compiler {get_cxx_compiler()}", "install one of C++20, as Debian's g++")

    class Build(BuildExtension):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, no_python_abi_suffix=True)

        def build_extension(self, ext: Extension) -> None:
            ext.extra_objects = []  # setuptools may come here twice
            for source, flags in LEVELS.items() if HAS_LEVELS else ():
                options: dict[str, Any] = {"output_dir": self.build_temp, "extra_postargs": FLAGS + flags}
                ext.extra_objects += self.compiler.compile([source], **options)
            super().build_extension(ext)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if "build_ext" in sys.argv:  # asked for, not a part of an installation
                    raise
                self.extensions.clear()  # which the distribution has, too
                if self.editable_mode:  # where the library of older sources would stay
                    (ROOT / "crystalformer" / "_C.so").unlink(missing_ok=True)
                without_kernels(error, "see what the compiler said")

    flags = [*FLAGS, "-DCRYSTALFORMER_LEVELS"] if HAS_LEVELS else FLAGS
    options = {"include_dirs": include_paths(), "library_dirs": library_paths(), "libraries": ["torch_cpu", "dl"]}
    options |= {"extra_compile_args": flags, "extra_link_args": LINK, "depends": CSRC, "language": "c++"}
    return {
        "ext_modules": [Extension("crystalformer._C", SOURCES, **options)],
        "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel},
    }


setup(**extension())
