"""Values are looked at before an op runs, but not in compiled code or where an op is called by itself: there, what is
not a number must show in all that it belongs to, by every backend."""

import pytest
import torch
from operators import NOT_IN_TRITON, OPS, call, inputs_of, settings_of
from problems import Problem
from ways import Way

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter


@pytest.fixture(params=OPS)
def name(request: pytest.FixtureRequest, kernels: Way) -> str:
    if kernels.backend == "triton" and request.param in NOT_IN_TRITON:
        kernels.skip("the reference serves this op on a GPU")
    return request.param


def example(name: str, way: Way) -> Problem:
    """The atoms of the needle are too far apart to have images of each other in the list."""
    kinds = (("cubic", 2),) if way.backend == "triton" else (("needle", 3), ("skewed", 3), ("cubic", 1))
    return way.problem(kinds, decay_min=1.0, tol=1e-3, every_pair=name == "encoding", num_basis=40)


def both(name: str, x: Problem, way: Way, inputs: dict, spoil=None) -> tuple[dict, dict]:
    """Of this way and of the reference; Triton's kernels read a layout of the inputs' geometry, as the CPU's do."""
    geometry = (inputs["positions"], inputs["lattice"])
    return tuple(
        call(name, backend, inputs, settings_of(name, x, backend, geometry), spoil=spoil)
        for backend in (way.backend, "reference")
    )


def assert_shown(found: dict, wanted: dict, way: Way, what: str) -> None:
    for key, value in wanted.items():
        if way.backend == "triton":  # a sum over a tile shows it in the rest of the tile, too
            assert not (value.isnan() & ~found[key].isnan()).any(), f"{what}: {key}"
        else:
            assert torch.equal(found[key].isnan(), value.isnan()), f"{what}: {key}"


def test_one_nan_shows_in_all_that_the_reference_shows_it_in(name, kernels):
    x = example(name, kernels)
    for spoiled, tensor in inputs_of(name, x).items():
        last = tensor[: 1 if spoiled == "lattice" else 2].numel() - 1
        for place in (0, last)[: 1 if kernels.backend == "triton" else 2]:
            inputs = inputs_of(name, x)
            inputs[spoiled].view(-1)[place] = NAN
            found, wanted = both(name, x, kernels, inputs)
            assert any(wanted[key].isnan().any() for key in OPS[name].outputs)
            assert_shown(found, wanted, kernels, f"{spoiled}[{place}]")


def test_one_nan_in_a_gradient_shows_too(name, kernels):
    x = example(name, kernels)
    for k, output in enumerate(OPS[name].outputs):
        spoil = lambda grads: grads[k].view(-1)[2:3].fill_(NAN)  # noqa: B023, called before k changes
        found, wanted = both(name, x, kernels, inputs_of(name, x), spoil)
        assert any(value.isnan().any() for value in wanted.values())
        assert_shown(found, wanted, kernels, output)


@pytest.mark.parametrize("value", [INF, -INF])
def test_what_is_infinite_spoils_no_more_than_in_the_reference(name, value, kernels):
    """A score of minus infinity is a weight of zero."""
    if kernels.backend == "triton":
        kernels.skip("heads and images of a tile are one matrix product: an infinity times a zero of it is NaN")
    x = example(name, kernels)
    for spoiled in OPS[name].inputs:
        inputs = inputs_of(name, x)
        inputs[spoiled].view(-1)[1] = value
        found, wanted = both(name, x, kernels, inputs)
        for key, there in wanted.items():
            finite = there.isfinite()
            if not key.startswith("d "):
                assert torch.equal(found[key].isfinite(), finite), f"{spoiled}: {key}"
            torch.testing.assert_close(found[key][finite], there[finite], rtol=0.01, atol=0.01)
