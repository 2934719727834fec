"""Heads in real space and heads in reciprocal space as one operator: `attention` and `reciprocal` side by side.

They are one operator because the Python code around an operator costs as much as the sums of a small batch. A backend
that has the two operators also has this one.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops, reference


def _shapes(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, decay_reciprocal: Tensor, edge_weight: Tensor, *_: Any):  # type: ignore[no-untyped-def]
    return v.shape, decay.shape, (*decay.shape, edge_weight.shape[2])


def _halves(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the two operators, from those of the one: q, k and v of the first heads and of the rest."""
    q, k, v, decay, decay_reciprocal, edge_weight, positions, lattice, *settings = args
    images, layout, waves, largest, numbers = settings
    real = decay.shape[1]
    first, rest = ([x[:, half] for x in (q, k, v)] for half in (slice(0, real), slice(real, None)))
    rest = [x.to(decay.dtype) for x in rest]
    return (
        (*first, decay, edge_weight, positions, lattice, images, layout, numbers),
        (*rest, decay_reciprocal, positions, lattice, waves, largest),
    )


def _rows(*inputs: Tensor, parts: tuple[list[reference.Part], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of both, through the reference."""
    q, k, v, decay, decay_reciprocal, *rest = inputs
    real = decay.shape[1]
    first = (q[:, :real], k[:, :real], v[:, :real], decay, *rest)
    last = (q[:, real:], k[:, real:], v[:, real:], decay_reciprocal, *rest[1:])
    y, lse, c = (torch.cat(x) for x in zip(*[part.forward(*first) for part in parts[0]], strict=True))
    y_reciprocal = torch.cat([part.forward(*last)[0] for part in parts[1]])
    return torch.cat((y, y_reciprocal), 1), lse, c


def _parts(*args: Any):  # type: ignore[no-untyped-def]
    if len(args[0]):
        both = zip((ops.ATTENTION, ops.RECIPROCAL), _halves(args), strict=True)
        yield reference.part(slice(None), _rows, parts=tuple(list(op.parts(*half)) for op, half in both))


DUAL_SPACE = ops.Op(
    name="dual_space",
    inputs=("q", "k", "v", "decay", "decay_reciprocal", "edge_weight", "positions", "lattice"),
    settings=f"{ops.LIST}, {ops.WAVES}, {ops.SETTINGS}",
    outputs=("y",),
    saved=("lse", "c"),
    shapes=_shapes,
    parts=_parts,
)


def implement(backend: str) -> None:
    """Implements `{backend}_dual_space` and its backward by the two operators of the backend."""
    namespace = getattr(torch.ops, ops.NAMESPACE)
    names = [f"{backend}_{op.name}{suffix}" for op in (ops.ATTENTION, ops.RECIPROCAL) for suffix in ("", "_backward")]
    attention, attention_backward, reciprocal, reciprocal_backward = (getattr(namespace, name) for name in names)

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        first, rest = _halves(args)
        y, lse, c = attention(*first)
        return torch.cat((y, reciprocal(*rest)), 1), lse, c

    def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        (first, rest), (y, lse, c, geometry) = _halves(args[:-4]), args[-4:]
        real = lse.shape[1]
        grads = attention_backward(grad[:, :real], torch.zeros_like(lse), *first, y[:, :real], lse, c, geometry)
        more = reciprocal_backward(grad[:, real:], *rest, y[:, real:], geometry)
        qkv = (torch.cat((one, other.to(one.dtype)), 1) for one, other in zip(grads[:3], more[:3], strict=True))
        geometry_grads = (one + other for one, other in zip(grads[5:], more[4:], strict=True))
        return (*qkv, grads[3], more[3], grads[4], *geometry_grads)

    for suffix, function in (("", forward), ("_backward", backward)):
        name = f"{ops.NAMESPACE}::{backend}_{DUAL_SPACE.name}{suffix}"
        torch.library.impl(name, "CompositeExplicitAutograd")(function)


for _backend in ("reference", "cpu", "triton"):
    ops.register(DUAL_SPACE, _backend)
    implement(_backend)
