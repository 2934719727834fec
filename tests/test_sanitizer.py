"""The Triton kernels under NVIDIA's compute-sanitizer, on small cells: `make gpu`, at its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crystalformer as cf

pytestmark = [
    pytest.mark.skipif(cf.available_backends()["triton"] is not True, reason="needs an NVIDIA GPU, and triton"),
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit"
    ),
]
SCRIPT = """
import torch
from sums import MAIN, results
from ways import Way
for op in MAIN:
    results(op, op.problem(Way("triton", torch.float32, "cuda")), "triton")
print("all kernels ran")
"""
SECONDS = 40


def sanitized(*options: str) -> str:
    """What compute-sanitizer says of all kernels of the sums, forward and backward."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # Without a cache of memory, to see what is beyond a tensor's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(folders)}
    # Libraries ask the driver for what may not be there: such errors of the API are not ours.
    command = ["compute-sanitizer", "--report-api-errors", "no", *options, sys.executable, "-c", SCRIPT]
    run = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        out, _ = run.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)  # the program under the sanitizer, too
        pytest.fail(f"not at its end after {SECONDS} s: {run.communicate()[0][-2000:]}")
    if "Device not supported" in out:
        pytest.skip("compute-sanitizer does not serve this GPU")
    assert "all kernels ran" in out, out[-4000:]
    assert "SUMMARY" in out, out[-4000:]
    return out


def test_memory_is_in_bounds():
    out = sanitized("--tool", "memcheck")
    assert "ERROR SUMMARY: 0 errors" in out, out[-4000:]


def test_threads_wait_for_each_other():
    """No read of shared memory before or after its write. That lanes write one word at once is how Triton sums."""
    out = sanitized("--tool", "racecheck", "--racecheck-report", "hazard")
    assert not re.search(r"(RAW|WAR) hazard", out), out[-4000:]
