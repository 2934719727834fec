"""What an image list costs: time and memory."""

import subprocess
import sys
import time

import pytest
import torch
from crystals import pack, random_crystal

import crystalformer as cf


def test_thirty_two_small_crystals_take_well_under_a_second() -> None:
    batch = pack([random_crystal(("cubic", "left_handed")[seed % 2], seed, 4 + seed % 5) for seed in range(32)])
    # Processor time of one thread: others on the machine, and threads that wait for a core, do not count.
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = time.process_time()
            images = cf.build_images(*batch, cutoff=12.0)
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert images.num_images > 32 * 4 * 100
    assert min(seconds) < 1.0, seconds


def test_a_thousand_atoms_fit_in_four_gib() -> None:
    resource = pytest.importorskip("resource", reason="peak memory is measured with the resource module")
    del resource
    program = """
import resource, sys, torch
import crystalformer as cf
torch.manual_seed(0)
grid = torch.cartesian_prod(*[torch.arange(10.0, dtype=torch.float64)] * 3)
positions = 2.5 * grid + 0.2 * torch.randn(1000, 3, dtype=torch.float64)
geometry = positions, 25.0 * torch.eye(3, dtype=torch.float64)[None], torch.tensor([0, 1000])
images = cf.build_images(*geometry)
n = torch.randn(3, 1000, 8, 16, dtype=torch.float64)
inputs = [*n, torch.full((1000, 8), 0.2).double(), *geometry[:2], torch.randn(8, 16, 64).double()]
inputs = [x.requires_grad_() for x in inputs]
y = cf.periodic_attention(*inputs[:6], images, inputs[6], cf.RadialBasis(), "reference")
assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), inputs))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(images.num_images, peak // (1024 if sys.platform == "darwin" else 1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_images, kib = map(int, done.stdout.split())
    # A sphere of the certified radius, 12.5 Å, holds some 500 atoms of this density.
    assert num_images > 400_000
    assert kib < 4 << 20
