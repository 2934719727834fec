"""The Triton kernels in Triton's interpreter, on the CPU: the contract of triton_contract.py.

In a process of its own: whether kernels are interpreted is decided when they are imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_contract_in_the_interpreter():
    contract = Path(__file__).with_name("triton_contract.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
