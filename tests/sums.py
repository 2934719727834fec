"""The sums as functions of a problem: their outputs and gradients by name, by any backend."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from problems import Problem, problem
from torch import Tensor
from ways import Way

import crystalformer as cf

INPUTS = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight")
GEOMETRY = ("positions", "lattice")


@dataclass(frozen=True)
class Sum:
    """One op, of inputs and a problem that has its lists.

    Attributes:
        options: of the problem, that the op needs.
        run: from the problem, the inputs by name, and options of the op.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., tuple[Tensor, ...]]
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return self.name

    def problem(self, way: Way | None = None, *args, **options) -> Problem:
        """A problem for it, of `way` or of the reference in fp64."""
        x = problem(*args, **dict(self.options) | options)
        return way.place(x) if way else x


def _attention(x: Problem, given: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    encoding = {"edge_weight": given["edge_weight"], "basis": x.basis} if "edge_weight" in given else {}
    inputs = [given[name] for name in INPUTS[:6]]
    return cf.periodic_attention(*inputs, x.images, **encoding, return_lse=True, **options)


def _encoding(x: Problem, given: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    encoding = {"edge_weight": given["edge_weight"], "basis": x.basis} if "edge_weight" in given else {}
    inputs = [given[name] for name in INPUTS[3:6]]
    return tuple(y for y in cf.periodic_encoding(*inputs, x.images, **encoding, **options) if y is not None)


def _reciprocal(x: Problem, given: dict[str, Tensor], waves: cf.WaveVectors | None = None, **options) -> tuple[Tensor]:
    """decay is that of wave vectors."""
    return (cf.reciprocal_attention(*given.values(), x.ptr, wave_vectors=waves or x.waves(), **options),)


def _dual_space(x: Problem, given: dict[str, Tensor], real: int = 1, **options) -> tuple[Tensor, ...]:
    """The first heads in real space, the others in reciprocal space."""
    q, k, v, decay, positions, lattice, *encoding = given.values()
    halves, lists = (decay[:, :real], decay[:, real:]), (x.images, x.waves())
    values = (encoding[0][:real], x.basis) if encoding else ()
    return (cf.dual_space_attention(q, k, v, *halves, positions, lattice, *lists, *values, **options),)


EVERY_PAIR = (("every_pair", True),)
ATTENTION = Sum("attention", INPUTS, ("y", "lse"), _attention)
SIMPLE_ATTENTION = Sum("attention without basis", INPUTS[:6], ("y", "lse"), _attention)
ENCODING = Sum("encoding", INPUTS[3:], ("alpha", "beta"), _encoding, EVERY_PAIR)
SIMPLE_ENCODING = Sum("encoding without basis", INPUTS[3:6], ("alpha",), _encoding, EVERY_PAIR)
RECIPROCAL = Sum("reciprocal", INPUTS[:6], ("y",), _reciprocal)
DUAL_SPACE = Sum("dual space", INPUTS, ("y",), _dual_space)
SIMPLE_DUAL_SPACE = Sum("dual space without basis", INPUTS[:6], ("y",), _dual_space)
SUMS = (ATTENTION, SIMPLE_ATTENTION, ENCODING, SIMPLE_ENCODING, RECIPROCAL, DUAL_SPACE, SIMPLE_DUAL_SPACE)
MAIN = (ATTENTION, ENCODING, RECIPROCAL)


def weights(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    """Random numbers that turn outputs into one, the same in every dtype."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=rng, dtype=torch.bfloat16).to(y) for y in outputs]


def results(op: Sum, x: Problem, backend: str, geometry: bool = True, **options) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs as "d input"; without geometry none of positions and lattice."""
    given = {name: getattr(x, name).clone() for name in op.inputs}
    leaves = {name: t.requires_grad_() for name, t in given.items() if geometry or name not in GEOMETRY}
    outputs = op.run(x, given, backend=backend, **options)
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights(outputs))
    found = {name: y.detach() for name, y in zip(op.outputs, outputs, strict=True)}
    return found | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def exact(x: Problem) -> Problem:
    """The problem with a list that allows an op to leave out nothing but what rounding loses."""
    return replace(x, images=replace(x.images, tol=None))


def assert_as_good_as_the_reference(
    op: Sum, x: Problem, way: Way, floor: float = 1e-6, geometry: tuple[bool, ...] = (True, False)
) -> None:
    """In fp64 the reference's numbers. In fp32 at most twice the error that the plain fp32 reference has against fp64.

    Args:
        x: the problem in fp64.
        floor: what is allowed in fp32 beside that, relatively; more for gradients, which are sums that cancel.
        geometry: with the gradients of positions and lattice and without them, where other code may run.
    """
    best, plain = results(op, x, "reference"), results(op, x.to(torch.float32), "reference")
    # Some gradients of one atom vanish but for rounding, hence the scale of all of them.
    scale = max(1.0, *(float(y.abs().max()) for y in best.values()))
    for moving in geometry:
        found = results(op, way.place(x), way.backend, moving)
        assert set(best) - set(found) == (set() if moving else {f"d {name}" for name in GEOMETRY})
        for name, y in found.items():
            assert (y.dtype, y.shape) == (way.dtype, best[name].shape), name
            error, largest = float((y.cpu().double() - best[name]).abs().max()), float(best[name].abs().max())
            if way.double:
                assert error < min(1e-12 * scale, 1e-9 * size(largest, scale)), name
            else:
                reference = float((plain[name] - best[name]).abs().max())
                more = {"cpu": 10, "triton": 2}.get(way.backend, 1) if name.startswith("d ") else 1
                bound = factor(op, name, way) * reference + more * floor * size(largest, scale)
                assert error < bound, f"{name} is off by {error:.1e} of {largest:.1e}, the reference by {reference:.1e}"


def size(largest: float, scale: float) -> float:
    """What errors of a result are relative to: its largest value, or a part of the scale of all where that cancels."""
    return max(largest, scale / 5)


def factor(op: Sum, name: str, way: Way) -> int:
    """How many times the fp32 reference's error is allowed: four for the decay in reciprocal space, where Triton's
    kernels take the mean of a row's gradient from dy·y, which is rounded, and the reference sums it again."""
    return 4 if way.backend == "triton" and op is RECIPROCAL and name == "d decay" else 2
