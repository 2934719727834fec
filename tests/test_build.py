"""The package builds without torch or a compiler, imports with nothing but torch and numpy, and holds what it must."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import crystalformer as cf
from crystalformer.compiled import LIBRARY

ROOT = Path(__file__).parents[1]


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_imports_with_only_torch_and_numpy():
    """Extras and triton hidden: everything that does not need them works."""
    code = """
import sys
class Hide:
    hidden = {"triton", "pymatgen", "ase", "lightning", "safetensors", "matplotlib", "tqdm", "scipy", "pandas"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import torch, crystalformer as cf
model = cf.Crystalformer(cf.CrystalformerConfig(num_blocks=1, model_dim=16, num_heads=2, ff_dim=16))
ptr = torch.tensor([0, 2])
batch = cf.CrystalBatch(torch.tensor([11, 17]), torch.tensor([[0.0, 0, 0], [2.8, 0, 0]]), 4.0 * torch.eye(3)[None], ptr)
model(batch).sum().backward()
print(cf.available_backends()["reference"])
"""
    result = run(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("sys.modules['torch'] = None", "install torch first"),
        ("os.environ['CXX'] = 'no-compiler'", "there is no compiler no-compiler; install one of C++20"),
        ("os.environ['CXX'] = 'false'", "see what the compiler said"),
    ],
)
def test_wheel_without_the_kernels(missing, reason, tmp_path):
    """Without torch or a compiler that works the package installs all the same, and says in one line what is missing.

    `kernels` never becomes a top-level name.
    """
    pytest.importorskip("wheel", reason="building a wheel offline needs it")
    code = f"""
import os, sys
{missing}
sys.argv = ["setup.py", "-q", "build", "-b", {str(tmp_path / "b")!r}, "egg_info", "-e", {str(tmp_path)!r},
            "bdist_wheel", "-b", {str(tmp_path / "w")!r}, "-d", {str(tmp_path)!r}]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__file__": "setup.py", "__name__": "__main__"}})
"""
    result = run(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("crystalformer: ")]
    assert line.startswith(
        "crystalformer: installing without the CPU kernels, so attention on the CPU will be many times"
    )
    assert reason in line
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "crystalformer/kernels/__init__.py" in names
    assert "crystalformer/model/batch.py" in names
    assert "crystalformer/py.typed" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/")) or name.endswith(".so")]


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_the_library_is_of_no_python_and_of_any_torch():
    """It needs no symbol of Python and none of torch's C++: only of its stable C interface."""
    command = ["nm", "-D", "-C", "--undefined-only", str(LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [re.sub(r"^ *[Uvw] ", "", line) for line in lines]
    assert "torch_library_impl" in names
    bound = [name for name in names if re.search(r"\b(torch|c10|at|pybind11)::", name) or re.match("_?Py", name)]
    assert not bound


def test_kernels_are_part_of_the_package():
    """As installed: `crystalformer.kernels`, from a folder outside any checkout."""
    result = run("import crystalformer.kernels as k; print(k.__name__)", cwd="/")
    if "No module named 'crystalformer'" in result.stderr:
        pytest.skip("crystalformer is not installed here, only importable from the checkout")
    assert result.stdout.strip() == "crystalformer.kernels", result.stderr
