"""Speed of the main functions on workload W32, of bench/w32.py: `make bench`. Compare rows of one run only."""

import pytest
import torch

import crystalformer as cf
from bench.w32 import w32

BACKENDS = [name for name, there in cf.available_backends().items() if there is True and name != "triton"]


@pytest.fixture(scope="module")
def crystals() -> cf.CrystalBatch:
    return w32()


def test_build_images(benchmark, crystals):
    images = benchmark(cf.build_images, crystals.positions, crystals.lattice, crystals.ptr)
    benchmark.extra_info["images"] = images.num_images


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_attention(benchmark, crystals, direction, backend):
    torch.manual_seed(0)
    n, batch = crystals.num_atoms, crystals.to(torch.float32)
    q, k, v = (torch.randn(n, 8, 16, requires_grad=direction != "forward") for _ in range(3))
    decay = 0.1276 + 0.3 * torch.rand(n, 8)
    edge_weight = 0.1 * torch.randn(8, 16, 64)
    images = cf.build_images(crystals.positions, crystals.lattice, crystals.ptr)

    def run():
        y = cf.periodic_attention(
            q, k, v, decay, batch.positions, batch.lattice, images, edge_weight, cf.RadialBasis(), backend
        )
        if direction != "forward":
            torch.autograd.grad(y.sum(), (q, k, v))

    benchmark(run)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step(benchmark, crystals, backend):
    torch.manual_seed(0)
    model = cf.Crystalformer(backend=backend)
    batch = crystals.to(torch.float32)
    batch.images = model.build_images(crystals)
    model.calibrate(batch)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        model(batch).abs().mean().backward()
        optimizer.step()

    benchmark(step)
