"""The contract of the Triton kernels in Triton's interpreter, on the CPU: tests/contract and tests/triton_kernels.

In processes of their own: whether kernels are interpreted is decided when they are imported. One a part, so that they
share the cores, and a failure says where.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import FILE as GOLDEN

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
HERE = Path(__file__).parent
# What is not here is in one process: each costs some seconds to start.
ALONE = ("contract/test_sums.py", "contract/test_torch.py", "contract/test_list_builders.py")
FILES = [
    str(path.relative_to(HERE))
    for folder in ("contract", "triton_kernels")
    for path in (HERE / folder).glob("test_*.py")
]
PARTS = {Path(name).stem: [name] for name in ALONE} | {"the rest": [name for name in FILES if name not in ALONE]}
# Of the interpreter in Triton 3.6.
WARNINGS = ("-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def run_in_the_interpreter(names: list[str], *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backends=triton", *WARNINGS, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, *(HERE / name for name in names)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("part", PARTS)
def test_contract(part):
    run_in_the_interpreter(PARTS[part])


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"the golden numbers are not here: {GOLDEN.name}")
def test_numbers_of_the_paper():
    run_in_the_interpreter(["test_golden.py"], "-k", "triton")
