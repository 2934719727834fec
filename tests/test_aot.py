"""Without a GPU: the kernels compile for the architectures they are written for, and keep to the registers.

In processes of their own: a kernel that runs in the interpreter cannot be compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
# Registers a thread that each kernel may take for the paper's model: 8 heads of 16, 64 basis functions, tiles of 4
# groups of 8 shells, without the gradients of the geometry. A multiprocessor has 65,536.
BUDGET = {
    "attention_fwd": 168,
    "attention_bwd_rows": 240,
    "attention_bwd_columns": 96,
    "encoding_fwd": 144,
    "encoding_bwd": 128,
    "geometry_rows": 80,
    "segment_sums": 80,
    "phases": 80,
    "reciprocal_fwd": 168,
    "reciprocal_bwd_rows": 208,
    "reciprocal_bwd_sums": 208,
    "reciprocal_forces": 248,
    "reciprocal_positions": 64,
    "row_cutoffs": 128,
    "list_rows": 160,
}
# Where rows are orbits and a kernel takes more; as many warps fit.
ORBITS = {"reciprocal_bwd_sums": 224}


# The whole range of shapes for one architecture, its ends for the others: the others' compilers allot alike.
ARCHITECTURES = {80: ["--few", "--loops=none"], 90: ["--loops=attention"], 100: ["--few", "--loops=none"]}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """What each kernel takes on an architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT, str(request.param), *ARCHITECTURES[request.param]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_is_there(compiled):
    assert {x["kernel"] for x in compiled} == set(BUDGET)
    assert len({x["arch"] for x in compiled}) == 1


def test_nothing_spills(compiled):
    assert [x for x in compiled if x["spilled"]] == []


@pytest.mark.skipif(not version("triton").startswith("3.7."), reason="counted with the Triton of constraints.txt")
def test_instructions_are_what_the_bench_says(compiled):
    from bench.providers.library import INSTRUCTIONS

    if compiled[0]["arch"] != 90:
        pytest.skip("the bench has the instructions of sm_90")
    tile = dict(H=8, D=16, DV=16, K=64, G=8, BG=4)
    for name, dtype, tf32 in (("triton", "fp32", False), ("triton-tf32", "fp32", True), ("triton-bf16", "bf16", False)):
        found = {}
        for x in compiled:
            same = x["inputs"] == dtype and x.get("TF32", tf32) == tf32
            if same and all(x.get(key, size) == size for key, size in tile.items()) and "G" in x:
                found[x["kernel"], x.get("GEOMETRY")] = x["loop"] * x["warps"] / 32
        forward, columns = found["attention_fwd", None], found["attention_bwd_columns", None]
        backward = forward + columns + found["attention_bwd_rows", False]
        assert INSTRUCTIONS[name]["forward"] == pytest.approx(forward, rel=0.02)
        assert INSTRUCTIONS[name]["forward and backward"] == pytest.approx(backward, rel=0.02)


def test_large_arrays_have_wide_offsets(compiled):
    """Indices beyond int32 are right: no offset of 32 bits comes from an atom, a pair, a tile or an image."""
    assert [x for x in compiled if x["narrow"]] == []


@pytest.mark.skipif(not version("triton").startswith("3.7."), reason="the budget is for the Triton of constraints.txt")
def test_registers(compiled):
    paper = dict(H=8, D=16, DV=16, K=64, G=8, BG=4)
    for x in compiled:
        if all(x.get(name, size) == size for name, size in paper.items()):
            budget = BUDGET | (ORBITS if x.get("ORBITS") else {})
            limit = 255 if x.get("GEOMETRY") else budget[x["kernel"]]
            assert x["registers"] <= limit, x
