"""Whatever stops a training, it loses at most the epoch under way, and goes on to the same bits."""

import errno
import io
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from small_training import EPOCHS, Stop, train

from crystalformer.common import storage
from crystalformer.training.checkpoints import LAST, PREVIOUS, CheckpointError, latest

HERE = Path(__file__).parent
IDENTITY = {"seed": 5}


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


def same(one, other):
    (rows, model), (other_rows, other_model) = one, other
    for row in rows + other_rows:
        row.pop("seconds", None)
    other_weights = other_model.state_dict()
    return rows == other_rows and all(torch.equal(x, other_weights[name]) for name, x in model.state_dict().items())


def epochs_done(folder):
    _, content = latest(folder, IDENTITY)
    return len(content["callbacks"]["History"]["rows"])


@pytest.mark.parametrize("epoch", [2, 5], ids=["while learning", "while averaging"])
def test_sigterm(epoch, tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        train(callbacks=[Stop(epoch, signal.SIGTERM)], checkpoints=tmp_path, identity=IDENTITY)
    assert epochs_done(tmp_path) == epoch
    assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)
    assert epochs_done(tmp_path) == EPOCHS
    # A training that is complete gives its result again.
    assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)


def test_kill_9(tmp_path, uninterrupted):
    code = f"""
import torch; torch.set_num_threads(1)
from pathlib import Path; from small_training import *
train(callbacks=[Stop(3, 9)], checkpoints=Path({str(tmp_path)!r}), identity={IDENTITY})
"""
    path = f"{HERE.parent}{os.pathsep}{HERE}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert epochs_done(tmp_path) == 3
    assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)


def test_full_disk(tmp_path, uninterrupted, monkeypatch):
    """The disk is full behind the second epoch, after a part of the checkpoint was written."""
    written = 0

    def fsync(descriptor):
        nonlocal written
        written += 1
        if written > 4:  # a file and its folder, twice
            os.ftruncate(descriptor, 1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            train(checkpoints=tmp_path, identity=IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    assert epochs_done(tmp_path) == 2
    assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)


def test_torn_and_foreign_checkpoints(tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        train(callbacks=[Stop(3, signal.SIGTERM)], checkpoints=tmp_path, identity=IDENTITY)
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"last\.ckpt is no whole checkpoint .* going on from .*previous\.ckpt"):
        assert epochs_done(tmp_path) == 2
    with pytest.warns(UserWarning, match="one epoch earlier"):
        assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)

    for name in (LAST, PREVIOUS):
        torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(CheckpointError, match="no whole checkpoint of this program"):
        latest(tmp_path, IDENTITY)

    content = torch.load(io.BytesIO(content), weights_only=True)
    del content["state_dict"]["model.embedding.weight"]
    torch.save(content, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"last\.ckpt must hold the weights of this model: .*embedding"):
        train(checkpoints=tmp_path, identity=IDENTITY)


def test_another_training_is_refused(tmp_path):
    train(epochs=1, checkpoints=tmp_path, identity=IDENTITY)
    with pytest.raises(CheckpointError, match=r"seed must be 5, as when the training in .* began, not 6"):
        train(epochs=1, checkpoints=tmp_path, identity={"seed": 6})
    with pytest.raises(CheckpointError, match=r"begun by this version to be resumed, .* \(bias_decay\): start anew"):
        train(epochs=1, checkpoints=tmp_path, identity={"seed": 5, "bias_decay": 0.01})
    assert latest(tmp_path / "nowhere", IDENTITY) is None


def test_a_flipped_bit_costs_an_epoch_and_no_weights(tmp_path):
    """last.ckpt with a bit flipped is what it was, or previous.ckpt takes its place, with a warning."""
    train(epochs=2, checkpoints=tmp_path, identity=IDENTITY)
    path = tmp_path / LAST
    weights, data = latest(tmp_path, IDENTITY)[1]["state_dict"], path.read_bytes()
    noticed, places = 0, [*range(0, 8 * len(data), len(data) // 5), *range(-8 * 72, 0, 23)]  # the checksum's own, too
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            taken, content = latest(tmp_path, IDENTITY)
        if taken == path:
            assert all(torch.equal(x, weights[name]) for name, x in content["state_dict"].items()), place
        else:
            assert "last.ckpt is no whole checkpoint" in str(found[-1].message)
            noticed += 1
    assert noticed > 0.8 * len(places)


def test_a_checkpoint_without_a_checksum_is_gone_on_with(tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        train(callbacks=[Stop(3, signal.SIGTERM)], checkpoints=tmp_path, identity=IDENTITY)
    path = tmp_path / LAST
    path.write_bytes(path.read_bytes()[:-72])
    assert same(train(checkpoints=tmp_path, identity=IDENTITY), uninterrupted)
