"""Heads in both spaces in one call: what the two ops of one space give, and its own gradients and errors."""

from dataclasses import dataclass

import pytest
import torch
from problems import Problem, problem, relative_error

import crystalformer as cf


@dataclass(frozen=True)
class Both:
    """A problem whose first `real` heads decay in real space and the rest in reciprocal space."""

    x: Problem
    waves: cf.WaveVectors
    real: int

    @property
    def inputs(self):
        q, k, v, decay, positions, lattice, edge_weight = self.x.inputs
        return q, k, v, decay[:, : self.real], decay[:, self.real :], positions, lattice, edge_weight[: self.real]

    def together(self, *inputs, backend, images=None, waves=None, **options):
        *inputs, edge_weight = inputs or self.inputs
        lists = (images or self.x.images, waves or self.waves)
        basis = None if edge_weight is None else self.x.basis
        return cf.dual_space_attention(*inputs, *lists, edge_weight, basis, backend, **options)

    def one_by_one(self, *inputs, backend):
        q, k, v, decay, decay_reciprocal, positions, lattice, edge_weight = inputs
        first, rest = ([t[:, half] for t in (q, k, v)] for half in (slice(0, self.real), slice(self.real, None)))
        images, basis, waves = self.x.images, None if edge_weight is None else self.x.basis, self.waves
        y = cf.periodic_attention(*first, decay, positions, lattice, images, edge_weight, basis, backend)
        other = cf.reciprocal_attention(
            *rest, decay_reciprocal, positions, lattice, self.x.ptr, backend=backend, wave_vectors=waves
        )
        return torch.cat((y, other), 1)


def both(real=1, heads=3, **options):
    x = problem(heads=heads, decay_min=1.0, **options)
    return Both(x, cf.build_wave_vectors(x.lattice, x.ptr, 1.0), real)


@pytest.mark.parametrize("real", [1, 2])
@pytest.mark.parametrize("encoded", [True, False])
def test_is_the_two_ops(backend, real, encoded):
    x = both(real)
    names = 8 if encoded else 7
    inputs = [t.detach().clone().requires_grad_() for t in x.inputs[:names]] + [None] * (8 - names)
    weight = torch.randn_like(x.x.v)
    found, exact = [], []
    for function, results in ((x.together, found), (x.one_by_one, exact)):
        y = function(*inputs, backend=backend)
        results += [y.detach(), *torch.autograd.grad(y, inputs[:names], weight)]
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-14


def test_gradients(backend):
    x = both(kinds=(("cubic", 2), ("left_handed", 2)), dim=2, value_dim=2, num_basis=3, tol=1e-3)
    inputs = [t.detach().clone().requires_grad_() for t in x.inputs]
    run = lambda *t: x.together(*t, backend=backend)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_only_what_is_asked_for_is_differentiated(backend):
    x = both()
    inputs = [t.detach().clone().requires_grad_() for t in x.inputs]
    (exact,) = torch.autograd.grad(x.together(*inputs, backend=backend).square().sum(), inputs[4])
    others = [t.detach() for t in inputs]
    y = x.together(*others[:4], inputs[4], *others[5:], backend=backend)
    y.square().sum().backward()
    assert relative_error(inputs[4].grad, exact) < 1e-14
    assert all(t.grad is None for k, t in enumerate(inputs) if k != 4)


def test_half_precision_beside_fp32(backend):
    """q, k and v in bf16: the sums are in fp32, y and the gradients of q, k and v are rounded once."""
    x = both()
    x = Both(x.x.to(torch.float32).half(torch.bfloat16), x.waves, x.real)
    inputs = [t.detach().requires_grad_() for t in x.inputs]
    found, exact = x.together(*inputs, backend=backend), x.one_by_one(*inputs, backend=backend)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.detach(), exact.detach()) < 2**-8
    grads = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (found, exact)]
    for one, other in zip(*grads, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < 2**-6


def test_no_atoms(backend):
    x = both(kinds=())
    inputs = [t.detach().clone().requires_grad_() for t in x.inputs]
    y = x.together(*inputs, backend=backend)
    assert y.shape == (0, 3, 4)
    grads = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_errors():
    x = both()
    q, k, v, decay, decay_reciprocal, positions, lattice, edge_weight = x.inputs
    geometry = (positions, lattice, edge_weight)
    cases = (
        ((q, k, v, x.x.decay, decay_reciprocal), {}, r"decay must have from 1 to H-1=2 heads, .*, not 3"),
        ((q, k, v, decay, decay), {}, r"decay_reciprocal must have shape \(N=6, H=2\), not \(6, 1\)"),
        ((q, k, v, decay, -decay_reciprocal), {}, "decay_reciprocal must be positive, but its smallest value is -"),
        ((q, k, v, decay, 0.1 * decay_reciprocal), {}, r"decay_reciprocal must be at least 1, the decay_min that wave"),
        ((q, k, v, 0.1 * decay, decay_reciprocal), {}, r"decay must be at least 1, the decay_min that images were"),
        (x.inputs[:5], {"precision": "fast"}, "precision must be 'exact' or 'tf32', not 'fast'"),
        (
            x.inputs[:5],
            {"waves": cf.build_wave_vectors(lattice[:1], torch.tensor([0, 1]), 1.0)},
            r"wave_vectors must be of the crystals of images, \[0, 1, 4, 6\], not of \[0, 1\]",
        ),
    )
    for inputs, options, message in cases:
        with pytest.raises(ValueError, match=message):
            x.together(*inputs, *geometry, backend="reference", **options)
