"""Models compile whole and export, lists and layouts are operators, and backends say what is missing."""

import pytest
import torch
from problems import problem

import crystalformer as cf


@pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")
def test_opcheck_of_lists_and_layouts():
    x = problem()
    geometry = (x.positions, x.lattice)
    for cutoff, every_pair in ((None, False), (None, True), (5.0, False)):
        settings = (torch.full((3,), 0.5).double(), 1e-6, 4.0, 0.01, cutoff, every_pair, 1 << 20)
        torch.library.opcheck(torch.ops.crystalformer.cpu_images.default, (*geometry, x.ptr, *settings))
    for by_pair, merge in ((False, True), (False, False), (True, True)):
        arguments = (*geometry, x.images.packed(), x.basis.num, x.settings._replace(tol=1e-6), by_pair, merge)
        # Some bytes of a layout are never written, so that two of them are not equal.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.crystalformer.cpu_layout.default, arguments, test_utils=tests)


def small_model(domain: str):
    torch.manual_seed(0)
    model = cf.Crystalformer(cf.CrystalformerConfig(domain=domain, num_blocks=2, model_dim=32, num_heads=4, ff_dim=32))
    x = problem()
    batch = cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr).to(torch.float32)
    batch = model.prepare(batch)
    model.calibrate(batch)
    return model, batch


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("domain", ["real", "multihead"])
@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which change from release to release
def test_compiled_model_is_the_eager_model(domain, compiler):
    model, batch = small_model(domain)
    weights = list(model.parameters())
    eager = model(batch)
    exact = torch.autograd.grad(eager.sum(), weights)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    out = compiled(batch)
    torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-6)
    # The key bias shifts all scores of an atom alike: its gradient is rounding, hence the scale of all of them.
    largest = max(float(g.abs().max()) for g in exact)
    for one, other in zip(torch.autograd.grad(out.sum(), weights), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("domain", "name"), [("real", "images"), ("reciprocal", "wave_vectors")])
def test_compiling_without_lists_says_what_to_do(domain, name):
    model, batch = small_model(domain)
    setattr(batch, name, None)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=rf"batch\.{name} must be built before the model is compiled"):
        torch.compile(model, fullgraph=True, backend="eager")(batch)


@pytest.mark.filterwarnings("ignore")
def test_export_holds_the_op():
    x = problem()

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, decay, positions, lattice, edge_weight):
            return x.attention(q, k, v, decay, positions, lattice, edge_weight)

    exported = torch.export.export(Attend(), x.inputs)
    assert "crystalformer.reference_attention" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*x.inputs), x.attention())


def test_backends_say_what_is_missing():
    backends = cf.available_backends()
    assert set(backends) == {"triton", "cpu", "reference"}
    assert backends["reference"] is True
    x = problem()
    for name, reason in backends.items():
        if reason is not True:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
                x.attention(backend=name)
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'cpu', 'reference', not 'cuda'"):
        x.attention(backend="cuda")
    torch.testing.assert_close(x.attention(backend="auto"), x.attention())
