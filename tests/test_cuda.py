"""On an NVIDIA GPU: `make gpu`. The reference and the image lists give there what they give on the CPU."""

import warnings
from dataclasses import replace

import pytest
import torch
from problems import problem, relative_error

import crystalformer as cf
from bench.cases import attention_case, library_attention
from bench.measure import peak_memory
from bench.problems import make
from crystalformer.common.backends import choose_backend
from crystalformer.geometry import images as images_module

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


BUILDERS = [name for name in ("triton", "reference") if cf.available_backends()[name] is True]


@pytest.mark.parametrize("backend", BUILDERS)
def test_images_are_the_same(backend, monkeypatch):
    x = problem(every_pair=True)
    for options in ({}, {"cutoff": 7.3}, {"every_pair": True}):
        here = cf.build_images(x.positions, x.lattice, x.ptr, **options)
        with monkeypatch.context() as patch:
            patch.setattr(images_module, "choose_backend", lambda *_: backend)
            there = cf.build_images(x.positions.cuda(), x.lattice.cuda(), x.ptr.cuda(), **options)
        for name in ("row_ptr", "col", "shift", "ptr"):
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BUILDERS)
def test_lists_wait_for_sizes_alone(backend, monkeypatch):
    """As test_waits.py and test_triton_layout.py count on the CPU; here PyTorch counts."""
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: backend)
    x = problem()
    geometry = (x.positions.cuda(), x.lattice.cuda(), x.ptr.cuda())
    cf.build_images(*geometry)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            cf.build_images(*geometry)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) <= (1 if backend == "triton" else 5)


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


needs_triton = pytest.mark.skipif(
    cf.available_backends()["triton"] is not True, reason="needs an NVIDIA GPU, and triton"
)


def on_gpu():
    x = problem(heads=8, dim=16, value_dim=16, num_basis=64).to(torch.float32)
    names = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight", "ptr", "images")
    return replace(x, **{name: getattr(x, name).to("cuda") for name in names})


def attend(x, name):
    """A Triton op as a function of a problem's inputs, and how many of them; its lists are ready."""
    if name == "attention":
        return lambda *t: x.attention(*t, backend="triton"), 7
    waves = cf.build_wave_vectors(x.lattice, x.ptr, 0.5)
    if name == "reciprocal":
        return lambda *t: x.reciprocal(*t, backend="triton", wave_vectors=waves), 6

    def both(q, k, v, decay, positions, lattice, edge_weight):
        halves = (decay[:, :3], decay[:, 3:])
        lists, encoding = (x.images, waves), (edge_weight[:3], x.basis)
        return cf.dual_space_attention(q, k, v, *halves, positions, lattice, *lists, *encoding, backend="triton")

    return both, 7


@needs_triton
@pytest.mark.parametrize("name", ["attention", "reciprocal"])
def test_auto_is_triton_for_fp32(name):
    x = on_gpu()
    run = getattr(x, name)
    assert torch.equal(run(backend="auto"), run(backend="triton"))
    assert choose_backend("auto", x.q.device, name, torch.float64) == "reference"


@needs_triton
def test_model_under_autocast():
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(num_blocks=2)).cuda()
    x = problem()
    batch = cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)
    expected = model(batch.to("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(batch.to("cuda"))
    assert relative_error(out.detach(), expected.detach()) < 0.1
    out.float().abs().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@needs_triton
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["attention", "reciprocal", "dual_space"])
def test_nothing_waits_for_the_gpu(name):
    x = on_gpu()
    run, number = attend(x, name)
    inputs = [t.clone().requires_grad_() for t in x.inputs[:number]]
    for sync in ("default", "error"):
        x.images.layouts.clear()  # packing the list, too
        torch.cuda.set_sync_debug_mode(sync)
        try:
            torch.autograd.grad(run(*inputs).sum(), inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_triton
@pytest.mark.parametrize("name", ["attention", "reciprocal", "dual_space"])
def test_in_a_graph_and_on_another_stream(name):
    x = on_gpu()
    run, number = attend(x, name)
    grad = torch.randn_like(x.v)

    def step():
        inputs = [t.detach().requires_grad_(k not in (4, 5)) for k, t in enumerate(x.inputs[:number])]
        y = run(*inputs)
        return y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], grad)

    exact = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    for one, two, other in zip(recorded, there, exact, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(two, other)


@needs_triton
def test_layouts_follow_writes_to_the_positions():
    x = on_gpu()
    before = x.attention(backend="triton")
    x.positions.mul_(1.01)
    after = x.attention(backend="triton")
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, x.attention()) < 1e-5


@needs_triton
def test_a_cell_of_4000_atoms_fits_in_a_gib():
    """Packing the list, forward and backward, with the gradients of positions and lattice."""
    x = make("bigcell-4000", device="cuda")
    case = attention_case(x, library_attention(x, "triton"), geometry=True)
    assert peak_memory(case.calls["with positions and lattice"], x.device) < 1024


@needs_triton
def test_large_cell():
    x = problem(kinds=(("cubic", 400), ("cubic", 1)), heads=4, dim=8, value_dim=8, num_basis=16)
    inputs = [t.to("cuda", torch.float32).requires_grad_() for t in x.inputs]
    there = replace(x.to(torch.float32), images=x.images.to("cuda"))
    found = torch.autograd.grad(there.attention(*inputs, backend="triton").square().sum(), inputs)
    exact_inputs = [t.to("cuda").requires_grad_() for t in x.inputs]
    exact = torch.autograd.grad(there.attention(*exact_inputs).square().sum(), exact_inputs)
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 2e-4
