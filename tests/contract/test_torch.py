"""torch sees each op of every backend as one op: schema, fake and autograd; a model of any backend compiles whole."""

import pytest
import torch
from operators import NOT_IN_TRITON, OPS, inputs_of, operator, settings_of
from problems import problem
from sums import MAIN, RECIPROCAL

import crystalformer as cf


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, way):
    if way.backend == "triton" and name in NOT_IN_TRITON:
        way.skip("the reference serves this op on a GPU")
    dtypes = [way.dtype] + [torch.float16] * (name == "attention" and way.backend == "triton")
    for dtype in dtypes:
        x = way.problem(kinds=(("cubic", 1),), decay_min=2.0, every_pair=True)
        x = x if dtype == way.dtype else x.half(dtype)
        inputs, settings = list(inputs_of(name, x).values()), settings_of(name, x, way.backend)
        forward = operator(way.backend, name)
        torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in inputs), *settings))
        # The backward's own derivative goes through the reference, eagerly, so its inputs need no gradient here.
        outputs = forward(*inputs, *settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for geometry in (True, False) if dtype == way.dtype else (False,):
            grads = [torch.randn_like(y) for y in outputs[: len(OPS[name].outputs)]]
            arguments = (*grads, *inputs, *settings, *outputs, geometry)
            torch.library.opcheck(operator(way.backend, f"{name}_backward"), arguments)


@pytest.mark.parametrize(("cutoff", "every_pair"), [(None, False), (None, True), (2.0, False)])
def test_opcheck_of_lists(cutoff, every_pair, builder):
    if builder.backend == "reference":
        builder.skip("lists images with torch's own operations")
    x = builder.problem(kinds=(("cubic", 1),), decay_min=2.0)
    geometry = (x.positions.double(), x.lattice.double(), x.ptr)
    decay = torch.full((1,), 20.0, dtype=torch.float64, device=builder.device)
    settings = (decay, 1e-2, 0.0, 0.01, cutoff, every_pair, 1 << 20)
    torch.library.opcheck(operator(builder.backend, "images"), (*geometry, *settings))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, which change from release to release
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_compiles_whole(op, way):
    x = op.problem(way, kinds=(("cubic", 2), ("skewed", 1)), decay_min=1.0)
    given = [getattr(x, name) for name in op.inputs]
    options = {"backend": way.backend} | ({"waves": x.waves()} if op is RECIPROCAL else {})
    run = lambda *t: op.run(x, dict(zip(op.inputs, t, strict=True)), **options)
    expected = run(*given)
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("domain", ["real", "multihead"])
def test_model_of_any_backend(domain, kernels):
    """What a model gives, gradients of its weights too, does not depend on the backend."""
    config = cf.CrystalformerConfig(domain=domain, num_blocks=1, model_dim=16, num_heads=4, num_basis=8, ff_dim=16)
    x = problem(kinds=(("cubic", 2),))
    results = []
    for backend, device in (("reference", "cpu"), (kernels.backend, kernels.device)):
        torch.manual_seed(0)
        model = cf.Crystalformer(config, backend).to(device, kernels.dtype)
        batch = cf.CrystalBatch(torch.arange(1, 1 + len(x.positions)), x.positions, x.lattice, x.ptr)
        out = model(model.prepare(batch.to(kernels.dtype).to(device)))
        grads = torch.autograd.grad(out.sum(), list(model.parameters()), allow_unused=True)
        results.append([out.detach().cpu(), *(g.cpu() for g in grads if g is not None)])
    largest = max(float(g.abs().max()) for g in results[0])
    rtol, atol = (1e-9, 1e-9) if kernels.double else (1e-4, 1e-5)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * largest)
