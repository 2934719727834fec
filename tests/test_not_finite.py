"""Values are looked at before an op runs, but not in compiled code or where an op is called by itself: there, what is
not a number must show in all that it belongs to, in every backend."""

import pytest
import torch
from problems import Problem, problem
from torch import Tensor

import crystalformer as cf
from crystalformer.attention import ops
from crystalformer.attention.dual_space import DUAL_SPACE

NAN, INF = float("nan"), float("inf")
needs_cpu = pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="needs the CPU kernels")
# The atoms of the needle are too far apart to have images of each other in the list.
KINDS = (("needle", 3), ("skewed", 3), ("cubic", 1))
OPS = {op.name: op for op in (ops.ATTENTION, ops.ENCODING, ops.RECIPROCAL, ops.RECIPROCAL_SUM, DUAL_SPACE)}


def example(op: ops.Op, dtype: torch.dtype) -> Problem:
    every_pair = op is ops.ENCODING
    return problem(KINDS, decay_min=1.0, tol=1e-3, every_pair=every_pair, num_basis=40).to(dtype)


def inputs_of(op: ops.Op, x: Problem) -> dict[str, Tensor]:
    known = dict(q=x.q, k=x.k, v=x.v, decay=x.decay, edge_weight=x.edge_weight, positions=x.positions)
    known |= dict(lattice=x.lattice, decay_reciprocal=x.decay)
    if op is DUAL_SPACE:
        known |= dict(decay=x.decay[:, :1], decay_reciprocal=x.decay[:, 1:], edge_weight=x.edge_weight[:1])
    return {name: known[name].clone() for name in op.inputs}


def results(op: ops.Op, x: Problem, backend: str, inputs: dict[str, Tensor], spoil=lambda grads: None) -> dict:
    """Outputs and gradients by name, of a list made for the finite geometry, as compiled code has it."""
    packed, told = x.images.packed(), x.settings._replace(tol=1e-3)
    waves, pairs, by_pair = x.wave_vectors(1.0, 1e-3), x.images.num_pairs, op is ops.ENCODING
    layout = x.ptr.new_empty(0, dtype=torch.uint8)
    if backend != "reference":
        of_backend = {"cpu": (x.basis.num, told, by_pair, False), "triton": (pairs, x.basis.num, told, by_pair)}
        make = getattr(torch.ops.crystalformer, f"{backend}_layout")
        layout = make(inputs["positions"], inputs["lattice"], packed, *of_backend[backend])
    settings = {
        "attention": (packed, layout, told),
        "encoding": (packed, layout, pairs, told),
        "reciprocal": waves,
        "reciprocal_sum": (*waves, pairs),
        "dual_space": (packed, layout, *waves, told),
    }[op.name]
    arguments = (*inputs.values(), *settings)
    outputs = getattr(torch.ops.crystalformer, f"{backend}_{op.name}")(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in outputs[: len(op.outputs)]]
    spoil(grads)
    backward = getattr(torch.ops.crystalformer, f"{backend}_{op.name}_backward")
    gradients = backward(*grads, *arguments, *outputs, True)
    found = dict(zip(op.outputs, outputs, strict=False))
    return found | {f"d {name}": grad for name, grad in zip(op.inputs, gradients, strict=True)}


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPS)
def test_one_nan_shows_in_all_that_the_reference_shows_it_in(name, dtype):
    op = OPS[name]
    x = example(op, dtype)
    for spoiled, tensor in inputs_of(op, x).items():
        for place in (0, tensor[: 1 if spoiled == "lattice" else 4].numel() - 1):
            inputs = inputs_of(op, x)
            inputs[spoiled].view(-1)[place] = NAN
            found, wanted = (results(op, x, backend, inputs) for backend in ("cpu", "reference"))
            assert any(wanted[key].isnan().any() for key in op.outputs)
            for key, value in wanted.items():
                assert torch.equal(found[key].isnan(), value.isnan()), f"{spoiled}[{place}]: {key}"


@needs_cpu
@pytest.mark.parametrize("name", OPS)
def test_one_nan_in_a_gradient_shows_too(name):
    op = OPS[name]
    x = example(op, torch.float32)
    for k in range(len(op.outputs)):
        spoil = lambda grads: grads[k].view(-1)[2:3].fill_(NAN)  # noqa: B023, E731
        found, wanted = (results(op, x, backend, inputs_of(op, x), spoil) for backend in ("cpu", "reference"))
        assert any(value.isnan().any() for value in wanted.values())
        for key, value in wanted.items():
            assert torch.equal(found[key].isnan(), value.isnan()), f"{op.outputs[k]}: {key}"


@needs_cpu
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("name", OPS)
def test_what_is_infinite_spoils_no_more_than_in_the_reference(name, value):
    """A score of minus infinity is a weight of zero. No cell has an infinite edge."""
    op = OPS[name]
    x = example(op, torch.float32)
    for spoiled in op.inputs:
        if spoiled == "lattice":
            continue
        inputs = inputs_of(op, x)
        inputs[spoiled].view(-1)[1] = value
        found, wanted = (results(op, x, backend, inputs) for backend in ("cpu", "reference"))
        for key, there in wanted.items():
            finite = there.isfinite()
            if not key.startswith("d "):
                assert torch.equal(found[key].isfinite(), finite), f"{spoiled}: {key}"
            torch.testing.assert_close(found[key][finite], there[finite], rtol=0.01, atol=0.01)
