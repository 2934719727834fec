"""On an NVIDIA GPU: `make gpu`. The reference and the image lists give there what they give on the CPU."""

import pytest
import torch
from problems import problem, relative_error

import crystalformer as cf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_images_are_the_same():
    x = problem(every_pair=True)
    for options in ({}, {"cutoff": 7.3}, {"every_pair": True}):
        here = cf.build_images(x.positions, x.lattice, x.ptr, **options)
        there = cf.build_images(x.positions.cuda(), x.lattice.cuda(), x.ptr.cuda(), **options)
        for name in ("row_ptr", "col", "shift", "ptr"):
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_and_gradients_are_the_same(dtype):
    x = problem(heads=4, dim=8, value_dim=8, num_basis=16)
    inputs = [t.clone().requires_grad_() for t in x.inputs]
    exact = torch.autograd.grad(x.attention(*inputs).square().sum(), inputs)
    there = [t.detach().to("cuda", dtype).requires_grad_() for t in inputs]
    q, k, v, decay, positions, lattice, edge_weight = there
    y = cf.periodic_attention(
        q, k, v, decay, positions, lattice, x.images.to("cuda"), edge_weight, x.basis, backend="reference"
    )
    bound = 1e-10 if dtype == torch.float64 else 2e-4
    for one, other in zip(torch.autograd.grad(y.square().sum(), there), exact, strict=True):
        assert relative_error(one.cpu(), other) < bound


def test_model_on_the_gpu():
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(domain="multihead", num_blocks=2))
    x = problem()
    batch = cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)
    expected = model(batch)
    torch.testing.assert_close(model.cuda()(batch.to("cuda")).cpu(), expected, rtol=1e-4, atol=1e-5)
