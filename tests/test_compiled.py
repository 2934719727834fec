"""Why the compiled kernels are missing: the file is not there, or was built for something else."""

import importlib
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from crystalformer import compiled
from crystalformer.common import backends, loading

PACKAGE = Path(compiled.__file__).parent


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [
        ("missing", None, f"there is no file _C{EXTENSION_SUFFIXES[0]} in {{folder}}, so they have not been built"),
        (
            "other",
            "_C.cpython-27-riscv.so",
            "_C.cpython-27-riscv.so in {folder} was built for another Python than this",
        ),
        ("torn", f"_C{EXTENSION_SUFFIXES[0]}", "{folder}/_C"),
    ],
)
def test_reasons(name, file, reason, tmp_path, monkeypatch):
    folder = tmp_path / f"package_{name}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(compiled.__file__, folder)
    shutil.copytree(PACKAGE / "common", folder / "common")
    if file is not None:
        (folder / file).write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = importlib.import_module(f"package_{name}.compiled").LOADERS["cpu"]()
    assert loaded.startswith("the compiled CPU kernels cannot be loaded: " + reason.format(folder=folder))
    assert "pip install --no-build-isolation ." in loaded
    assert "circular" not in loaded


def test_built_for_another_torch(tmp_path):
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    reason = compiled._reason(tmp_path, ImportError("_C.so: undefined symbol: _ZN3c106detail"))
    assert reason.startswith(f"they were built for another torch than this, {torch.__version__} (_C.so: undefined")


def test_a_copy_without_the_file_says_so_in_its_first_lines(tmp_path):
    ignored = shutil.ignore_patterns("_C*", "__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, tmp_path / "crystalformer", ignore=ignored)
    # The finder of an editable install would find the file of its checkout.
    code = """
import sys
sys.meta_path[:] = [x for x in sys.meta_path if "Editable" not in str(x)]
from crystalformer.app import cli
cli.main(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    line = done.stdout.splitlines()[2]
    assert line.startswith("attention by the backend 'reference' on cpu, ")
    assert f"there is no file _C{EXTENSION_SUFFIXES[0]} in {tmp_path / 'crystalformer'}, so" in line
    assert "many times slower" in line


def test_the_backend_in_one_line(monkeypatch):
    monkeypatch.setitem(loading.AVAILABLE, "cpu", True)
    monkeypatch.setitem(loading.AVAILABLE, "triton", "no CUDA device is there")
    describe = backends.describe_backend
    threads = backends.count(torch.get_num_threads(), "thread")
    assert describe(torch.device("cpu")) == f"attention by the backend 'cpu' on cpu, {threads}"
    assert describe(torch.device("cuda")).endswith("slower than kernels, because no CUDA device is there")
    assert describe(torch.device("mps")).endswith("slower than kernels, because there are no kernels for it")
    monkeypatch.setitem(loading.AVAILABLE, "triton", True)
    monkeypatch.setitem(backends.DEVICE_TYPE, "triton", "cuda")
    assert describe(torch.device("cuda")) == "attention by the backend 'triton' on cuda"
    assert "the kernels for cuda do not compute in torch.float64" in describe(torch.device("cuda"), torch.float64)
