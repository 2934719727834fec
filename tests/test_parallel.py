"""Batches: every crystal once an epoch, bounded, shared out; two processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import main

from crystalformer.data.dataset import BoundedBatches

HERE = Path(__file__).parent
SIZES = np.random.default_rng(0).integers(1, 1000, 57).tolist()
SIZES[11] = 5000


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("max_images", [None, 3000])
def test_every_crystal_once_in_bounded_batches(seed, max_images):
    batches = BoundedBatches(SIZES, 8, max_images, seed)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        order = [index for shard in batches for index in shard.indices]
        assert sorted(order) == list(range(len(SIZES)))
        for shard in batches:
            assert 1 <= len(shard.indices) <= 8
            images = sum(SIZES[index] for index in shard.indices)
            assert max_images is None or images <= max_images or len(shard.indices) == 1
            assert sum(shard.weights) == pytest.approx(1)
        orders.append(order)
    assert (orders[0] == orders[1]) == (seed is None)
    assert (orders[0] == list(range(len(SIZES)))) == (seed is None)
    if max_images:
        assert any(shard.indices == (11,) for shard in batches)
    again = BoundedBatches(SIZES, 8, max_images, seed)
    again.set_epoch(1)
    assert again.batches == batches.batches


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_each_batch_out(world):
    for batch in BoundedBatches(SIZES, 8, 3000, 3).batches:
        shards = [BoundedBatches(SIZES, 8).shard(batch, rank, world) for rank in range(world)]
        counted = [i for shard in shards for i, w in zip(shard.indices, shard.weights, strict=True) if w > 0]
        assert sorted(counted) == sorted(batch)
        # The mean of the processes' gradients is that of the mean loss of the batch.
        assert sum(sum(shard.weights) for shard in shards) / world == pytest.approx(1)
        for shard in shards:
            assert shard.indices
            assert len(set(shard.weights)) == 1
            assert shard.weights[0] in (0, world / len(batch))
        loads = [sum(SIZES[i] for i in shard.indices) for shard in shards if shard.weights[0]]
        assert max(loads) - min(loads) <= max(SIZES[i] for i in batch)


def test_two_processes_train_as_one(tmp_path):
    """In fp64, where only the order of the sums differs: 1e-10, far below what a wrong weight of one crystal makes."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rendezvous = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # any free port
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", *rendezvous]
    script = [str(HERE / "small_training.py"), str(tmp_path / "two.json")]
    process = subprocess.Popen([sys.executable, *launcher, *script], env=environment)
    torch.set_default_dtype(torch.float64)
    try:
        main(tmp_path / "one.json")
    finally:
        torch.set_default_dtype(torch.float32)
        assert process.wait(timeout=300) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len({row["step"] - 5 * row["epoch"] for row in one["rows"]}) > 1, "the number of batches must vary"
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a == pytest.approx(b | {"seconds": a["seconds"]}, rel=1e-10)
    np.testing.assert_allclose(two["predictions"], one["predictions"], rtol=1e-10)
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(two["weights"][name], weight, rtol=0, atol=1e-10, err_msg=name)
    assert one["rows"][-1]["train_loss"] < 0.5 * one["rows"][0]["train_loss"]
