"""Every op is differentiable in every floating-point input, to any order, and exactly, by every backend."""

from dataclasses import replace

import pytest
import torch
from problems import problem, relative_error
from sums import ATTENTION, DUAL_SPACE, GEOMETRY, MAIN, RECIPROCAL, SUMS, exact, results, weights

import crystalformer as cf

# All inputs of a small problem, with few images: finite differences go through each number.
TINY = dict(kinds=(("cubic", 2), ("left_handed", 2)), heads=2, dim=2, value_dim=2, num_basis=2, decay_min=1.0, tol=1e-3)


def function(op, x, backend):
    """The outputs as a function of the inputs in their order, and the inputs."""
    given = [getattr(x, name).clone().requires_grad_() for name in op.inputs]
    return lambda *t: op.run(x, dict(zip(op.inputs, t, strict=True)), backend=backend), given


def one_number(op, x, backend):
    """A smooth function of all outputs, and the inputs."""
    run, given = function(op, x, backend)
    return sum(y.square().sum() for y in run(*given)), given


@pytest.mark.parametrize("op", SUMS, ids=str)
def test_first_and_second_derivatives(op, way):
    """In fp64 against finite differences; in fp32, where those say little, against the reference in fp64."""
    x = op.problem(**TINY)
    if way.double:
        run, given = function(op, way.place(x), way.backend)
        assert torch.autograd.gradcheck(run, given)
        # Along random directions where an op is made of others, or without a part: number by number is slow.
        assert torch.autograd.gradgradcheck(run, given, fast_mode=op not in MAIN)
        return

    def curvature(x, backend):
        y, given = one_number(op, x, backend)
        first = torch.autograd.grad(y, given, create_graph=True)
        return (*first, *torch.autograd.grad(sum((g * g).sum() for g in first), given))

    for found, best in zip(curvature(way.place(x), way.backend), curvature(x, "reference"), strict=True):
        assert relative_error(found.detach().cpu(), best.detach()) < 5e-4


@pytest.mark.parametrize("op", [*MAIN, DUAL_SPACE], ids=str)
def test_second_derivatives_in_fp32_are_as_exact_as_fp32(op, single):
    """By the outputs' gradients and by all inputs: errors of some times those that the reference has in fp32."""
    x = op.problem(num_basis=16, heads=3)

    def second(x, backend):
        run, given = function(op, x, backend)
        outputs = run(*given)
        cotangents = [y.requires_grad_() for y in weights(outputs)]
        first = torch.autograd.grad(outputs, given, cotangents, create_graph=True)
        return torch.autograd.grad(first, [*cotangents, *given], weights(first, seed=2))

    best, plain = second(x, "reference"), second(x.to(torch.float32), "reference")
    for found, rough, known in zip(second(single.place(x), single.backend), plain, best, strict=True):
        assert relative_error(found.cpu(), known) < 3 * relative_error(rough, known) + 2e-6


def test_third_derivative(backend):
    """A gradient of a gradient of a gradient, against a difference of second derivatives, which takes fp64."""
    x = problem(**TINY)
    _, inputs = function(ATTENTION, x, backend)
    rng = torch.Generator().manual_seed(2)
    direction = torch.randn(x.positions.shape, generator=rng).to(x.q)

    def curvature(decay):
        arguments = [*inputs[:3], decay, *inputs[4:]]
        y = x.attention(*arguments, backend=backend).square().sum()
        (first,) = torch.autograd.grad(y, inputs[4], create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), inputs[4], create_graph=True)
        return (second * direction).sum()

    (third,) = torch.autograd.grad(curvature(inputs[3]), inputs[3])
    step, along = 1e-5, torch.randn(x.decay.shape, generator=rng).to(x.q)
    difference = (curvature(inputs[3] + step * along) - curvature(inputs[3] - step * along)) / (2 * step)
    torch.testing.assert_close((third * along).sum(), difference, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("op", [ATTENTION, RECIPROCAL, DUAL_SPACE], ids=str)
def test_only_what_is_asked_for_is_differentiated(op, way):
    x = exact(op.problem(way, **TINY))
    expected = results(op, x, way.backend)
    run, given = function(op, x, way.backend)
    for k, name in enumerate(op.inputs):
        if way.backend == "triton" and name in ("k", "v", "lattice"):
            continue  # as q and positions; the interpreter is slow
        leaves = [t.detach().requires_grad_(n == k) for n, t in enumerate(given)]
        outputs = run(*leaves)
        torch.autograd.backward(outputs, weights(outputs))
        # Compiled apart where the gradients of the geometry are not asked for: other roundings.
        bound = 1e-12 if way.double else 1e-4
        assert relative_error(leaves[k].grad.cpu(), expected[f"d {name}"].cpu()) < bound, name
        assert all(t.grad is None for n, t in enumerate(leaves) if n != k)


def test_clamped_reciprocal_pairs_have_no_gradient(way):
    x = problem(kinds=(("needle", 4),), dim=2, value_dim=2, decay_min=2.0)
    sums = torch.ops.crystalformer.reference_reciprocal_sum(*x.inputs[3:6], *x.wave_vectors(2.0), 16)
    assert (sums < 1e-6).any()
    if way.double:
        run, given = function(RECIPROCAL, way.place(x), way.backend)
        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        return
    found, best = results(RECIPROCAL, way.place(x), way.backend), results(RECIPROCAL, x, "reference")
    for name, y in best.items():
        assert relative_error(found[name].cpu(), y) < 1e-4, name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in Triton's interpreter
def test_atoms_at_one_place_have_finite_gradients(way):
    """At d = 0 the distance has no derivative; the gradient is finite, at all orders."""
    x = problem(**TINY)
    positions = x.positions.clone()
    positions[1] = positions[0]
    images = cf.build_images(positions, x.lattice, x.ptr, decay_min=TINY["decay_min"])
    x = way.place(replace(x, positions=positions, images=images))
    y, given = one_number(ATTENTION, x, way.backend)
    first = torch.autograd.grad(y, given, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    assert all(g.abs().max() > 0 for g in (*first, *second))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_forward_mode_is_refused_not_dropped(op, way):
    x = op.problem(way, **TINY)
    run, given = function(op, x, way.backend)
    place = op.inputs.index(GEOMETRY[0])
    along = lambda p: run(*given[:place], p, *given[place + 1 :])
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(along, (x.positions,), (x.positions,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.positions, x.positions)
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            along(dual)
