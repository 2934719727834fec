"""torch sees each op as one op: schema, fake, autograd; models compile whole and export."""

import pytest
import torch
from problems import problem

import crystalformer as cf
from crystalformer.attention import ops
from crystalformer.attention.dual_space import DUAL_SPACE


def arguments(op: ops.Op, backend: str):
    x = problem(every_pair=True)
    lists, settings = x.lists(backend, by_pair=op is ops.ENCODING), x.settings
    if op is ops.ENCODING:
        return (x.decay, x.edge_weight, x.positions, x.lattice), (*lists, x.images.num_pairs, settings)
    if op is ops.ATTENTION:
        return x.op_inputs, (*lists, settings)
    if op is DUAL_SPACE:
        q, k, v, decay, weight, *geometry = x.op_inputs
        inputs = (q, k, v, decay[:, :1].contiguous(), decay[:, 1:].contiguous(), weight[:1].contiguous(), *geometry)
        return inputs, (*lists, *x.wave_vectors(), settings)
    if op is ops.RECIPROCAL_SUM:
        return (x.decay, x.positions, x.lattice), (*x.wave_vectors(), x.images.num_pairs)
    return x.inputs[:6], x.wave_vectors()


CASES = [(op, name) for name in ("reference", "cpu") for op in (*ops.OPS, DUAL_SPACE)]


@pytest.mark.parametrize(("op", "name"), CASES, ids=[f"{name}-{op.name}" for op, name in CASES])
def test_opcheck(op, name):
    missing = cf.available_backends()[name]
    if missing is not True:
        pytest.skip(f"backend {name}: {missing}")
    inputs, settings = arguments(op, name)
    forward = getattr(torch.ops.crystalformer, f"{name}_{op.name}").default
    torch.library.opcheck(forward, ([t.requires_grad_() for t in inputs] + list(settings)))
    # The backward's own derivative goes through the reference, eagerly, so its inputs need no gradient here.
    inputs = [t.detach() for t in inputs]
    outputs = forward(*inputs, *settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    backward = getattr(torch.ops.crystalformer, f"{name}_{op.name}_backward").default
    for geometry in (True, False):
        grads = [torch.randn_like(y) for y in outputs[: len(op.outputs)]]
        torch.library.opcheck(backward, (*grads, *inputs, *settings, *outputs, geometry))


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
