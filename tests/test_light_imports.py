"""The package comes light, and the command line without what is missing. Each in a Python of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import crystalformer

PACKAGE = Path(crystalformer.__file__).parent
# Refuses to import packages, as where they are not installed.
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def run(code: str, missing: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    code = REFUSE.replace("MISSING", repr(missing)) + code
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path.cwd())


def program(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m crystalformer` in a Python that has its standard library alone."""
    (tmp_path / "crystalformer").symlink_to(PACKAGE)
    command = [sys.executable, "-S", "-B", "-m", "crystalformer", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_importing_brings_nothing_that_is_used_later():
    done = run("""
from time import process_time
begin = process_time()
import torch
before, torch_took = set(sys.modules), process_time() - begin
import crystalformer as cf
took = process_time() - begin - torch_took
others = sorted({x.partition(".")[0] for x in set(sys.modules) - before} - sys.stdlib_module_names)
print(*others)
assert took < torch_took, (took, torch_took)  # a fifth of it
assert cf.available_backends()["reference"] is True
assert torch.cuda.is_available() or "triton" not in sys.modules
""")
    assert done.stdout.split() == ["crystalformer"], done.stderr
    assert done.returncode == 0, done.stderr


def test_operators_are_there_before_anything_is_called():
    """Exported programs call them by their names."""
    done = run("""
import torch, crystalformer
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([has(f"crystalformer::{name}", "CPU") for name in ("cpu_attention", "cpu_images", "cpu_layout")])
for name in crystalformer.kernels.OPERATORS:
    assert has(f"crystalformer::triton_{name}", "CUDA"), name
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([crystalformer.available_backends()["cpu"] is True] * 3)


def test_a_script_that_is_only_called_so_has_the_library():
    done = run("import sys; sys.argv = ['crystalformer', 'train']\nimport crystalformer as cf; cf.build_images")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_interpreter_is_asked_for_as_triton_reads_it(value):
    done = run("import crystalformer as cf; print(cf.kernels.INTERPRETED)", TRITON_INTERPRET=value)
    assert done.stdout.strip() == "True", done.stderr


def test_without_triton():
    """In Triton's interpreter, so that it is not a missing GPU that is told."""
    done = run("import crystalformer; print(crystalformer.available_backends())", ("triton",), TRITON_INTERPRET="1")
    assert "cannot be loaded (No module named 'triton'): install triton" in done.stdout, done.stderr
    assert done.stdout.count("cannot be loaded") == 1 + (crystalformer.available_backends()["cpu"] is not True)


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_the_library_says_what_it_needs(name):
    done = run("import crystalformer", (name,))
    *lines, last = done.stderr.splitlines()
    assert last.startswith("ModuleNotFoundError: crystalformer needs torch and numpy, and there is No module named '")
    assert last.endswith("pip install torch numpy")
    assert len([x for x in lines if x.lstrip().startswith("File ")]) == 2, lines  # the caller's, and ours


def test_help_and_version_need_no_library(tmp_path):
    from crystalformer.app.cli import COMMANDS

    done = program(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_doctor_needs_no_library_and_says_what_each_missing_one_costs(tmp_path):
    from crystalformer.app.doctor import EXTRAS, REQUIRED

    done = program(tmp_path, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for extra in (REQUIRED, *EXTRAS.values()):
        assert f"pip install {' '.join(extra.packages)}" in done.stdout
        for package, cost in extra.packages.items():
            assert f"  {package:14}missing: {cost}\n" in done.stdout


@pytest.mark.parametrize(("command", "name"), [("train", "torch"), ("predict", "jsonargparse")])
def test_a_command_says_in_one_line_what_it_needs(tmp_path, command, name):
    done = program(tmp_path, command, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"crystalformer: {name} is missing: pip install ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"]])
def test_help_and_version_do_not_wait_for_torch(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "crystalformer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=True)
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "crystalformer.app.cli" in modules
    assert not {"torch", "numpy"} & set(modules)
