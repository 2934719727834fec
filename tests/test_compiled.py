"""Why the compiled kernels are missing: the file is not there, is torn, or needs a later torch."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crystalformer import compiled
from crystalformer.common import backends, loading

PACKAGE = Path(compiled.__file__).parent


@pytest.mark.parametrize(
    ("file", "reason"),
    [(None, "there is no file _C.so in {folder}, so they have not been built"), ("_C.so", "{folder}/_C.so: ")],
)
def test_reasons(file, reason, tmp_path, monkeypatch):
    name = "torn" if file else "missing"
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


def test_a_torch_that_is_too_old(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "_C.so")
    compiled.LIBRARY.touch()
    reason = compiled._reason(OSError("_C.so: undefined symbol: torch_library_impl"))
    assert reason.startswith(f"they need torch 2.10 or later, and this is {torch.__version__} (_C.so: undefined symbol")


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
    assert f"there is no file _C.so in {tmp_path / 'crystalformer'}, so" in line
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
