"""Which dtypes go in, in which the sums are made, and what a permission to be less exact may cost."""

import pytest
import torch
from problems import problem, relative_error
from sums import ATTENTION, DUAL_SPACE, ENCODING, MAIN, results, weights
from ways import INTERPRETED

HALF = (torch.bfloat16, torch.float16)
SMALL = dict(kinds=(("cubic", 2), ("skewed", 1)), decay_min=1.0)


@pytest.mark.parametrize("op", [ATTENTION, DUAL_SPACE], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once(op, dtype, single):
    """Of the same rounded q, k, v: the sums are in fp32, y and the gradients of q, k and v are rounded at the end."""
    x = op.problem(heads=3, dim=5, value_dim=9, num_basis=20, **SMALL).half(dtype)
    rounded, plain = (results(op, single.place(x).half(of), single.backend) for of in (dtype, torch.float32))
    # Triton's interpreter cuts bf16 off where others round.
    rounding = torch.finfo(dtype).eps / (1 if INTERPRETED and single.backend == "triton" else 2)
    for name, y in rounded.items():
        of_half = name in ("y", "d q", "d k", "d v")
        assert y.dtype == (dtype if of_half else torch.float32), name
        assert relative_error(y, plain[name]) < 1.01 * (rounding if of_half else 0) + 1e-6, name
        assert not of_half or not torch.equal(y.float(), plain[name]), name
        assert single.backend == "triton" or torch.equal(y, plain[name].to(y.dtype)), name


def test_second_derivatives_in_half_precision(single):
    """A loss on forces, of q, k, v in bf16."""

    def gradients(x, backend):
        inputs = [t.clone().requires_grad_() for t in x.inputs]
        y = x.attention(*inputs, backend=backend)
        (force,) = torch.autograd.grad(y, inputs[4], weights([y])[0], create_graph=True)
        return torch.autograd.grad(force.square().sum(), inputs)

    x = problem(kinds=(("skewed", 2),)).half(torch.bfloat16)
    found = gradients(single.place(x).half(torch.bfloat16), single.backend)
    for one, other in zip(found, gradients(x.to(torch.float64), "reference"), strict=True):
        assert relative_error(one.cpu(), other) < (2**-8 if one.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("op", [ATTENTION, ENCODING], ids=str)
def test_tf32(op, single):
    """A permission. Triton's kernels use it: within a few roundings of tf32, and not exact, or it would do nothing."""
    x = op.problem(heads=4, dim=8, value_dim=8, num_basis=16)
    found = results(op, single.place(x), single.backend, precision="tf32")
    if single.backend != "triton":
        exact = results(op, single.place(x), single.backend)
        assert all(torch.equal(y, exact[name]) for name, y in found.items())
        return
    exact = results(op, x, "reference")
    errors = {name: relative_error(y.cpu(), exact[name]) for name, y in found.items()}
    assert max(errors.values()) < 5 * 2**-11, errors
    assert errors[op.outputs[0] if op is ATTENTION else "beta"] > 2**-17


@pytest.mark.parametrize("op", [*MAIN, DUAL_SPACE], ids=str)
def test_autocast_does_not_reach_the_sums(op, single):
    """Nor the derivatives of derivatives."""

    def run():
        given = {name: getattr(x, name).clone().requires_grad_() for name in op.inputs}
        outputs, leaves = op.run(x, given, backend=single.backend), list(given.values())
        first = torch.autograd.grad(outputs, leaves, weights(outputs), create_graph=True)
        # Not through square or sum of y, which autocast may do in half precision.
        second = torch.autograd.grad(first[0], leaves[1:], torch.ones_like(first[0]))
        return *(y.detach() for y in outputs), *(g.detach() for g in first), *second

    x = op.problem(single, **SMALL)
    expected = run()
    with torch.autocast(single.device, dtype=torch.bfloat16):
        for one, other in zip(run(), expected, strict=True):
            assert torch.equal(one, other)
