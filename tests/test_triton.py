"""The Triton kernels in Triton's interpreter, on the CPU: triton_contract.py and triton_images.py.

In a process of its own: whether kernels are interpreted is decided when they are imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_golden import FILE as GOLDEN

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_in_the_interpreter(names, *options):
    files = [Path(__file__).with_name(name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


def test_contract():
    run_in_the_interpreter(["triton_contract.py", "triton_images.py"])


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"the golden numbers are not here: {GOLDEN.name}")
def test_numbers_of_the_paper():
    run_in_the_interpreter(["test_golden.py"], "-k", "triton")
