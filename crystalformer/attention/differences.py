"""Second derivatives of the C++ operators in fp32: differences of their first derivatives in fp64.

A backward is the function J(x)^T g of the inputs x and the gradients g of the outputs. What autograd asks of it is its
derivative along one direction u of the inputs: by g that is J u, the change of the outputs along u, and by x the change
of J^T g. Both are central differences between x + h u and x - h u, at which the operator and its backward run in fp64,
with nothing left out but what is below rounding: as exact as fp32 is, by two calls each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .settings import Settings

if TYPE_CHECKING:
    from .ops import Op

# h u is at most this part of an input's largest number, and this many Å of the geometry. Its square, the relative
# error, and the rounding of fp64 over it are far below the rounding of fp32.
STEP = 2.0**-16


def differentiate_along(
    op: "Op",
    cotangents: Sequence[Tensor],
    arguments: Sequence[Any],
    grads: Sequence[Tensor | None],
    geometry: bool,
) -> tuple[Tensor | None, ...]:
    """Derivatives of the backward of an op with respect to the gradients of its outputs and to its inputs.

    Args:
        cotangents, arguments: what the backward was called with: the gradients of the outputs, then what the op was.
        grads: the direction, for each input; None for one that does not change.
        geometry: whether the backward was asked for the gradients of positions and lattice.
    """
    number, outputs = len(op.inputs), len(op.outputs)
    wanted = number if geometry else number - 2
    inputs = [x.double() for x in arguments[:number]]
    along = [torch.zeros_like(x) if u is None else u.double() for x, u in zip(inputs[:wanted], grads, strict=False)]
    furthest = max(_length(*pair) for pair in zip(op.inputs, inputs, along, strict=False))
    forward, backward = (getattr(torch.ops.crystalformer, f"cpu_{op.name}{x}") for x in ("", "_backward"))
    ends = []
    step = STEP / (furthest or 1.0)
    for h in (step, -step):
        moved = [x + h * u for x, u in zip(inputs, along, strict=False)] + inputs[wanted:]
        told = _told(op, moved, arguments[number:], geometry)
        results = forward(*moved, *told)
        results = results if len(op.results) > 1 else (results,)
        slopes = backward(*(g.double() for g in cotangents), *moved, *told, *results, geometry)
        ends.append((*results[:outputs], *slopes[:wanted]))
    like = (*cotangents, *arguments[:wanted])
    second = [((x - y) / (2 * step)).to(z.dtype) for x, y, z in zip(*ends, like, strict=True)]
    return (*second, *[None] * (number - wanted))


def _length(name: str, x: Tensor, u: Tensor) -> float:
    """Of a direction u, by the size of what it changes."""
    if not u.numel():
        return 0.0
    scale = 1.0 if name in ("positions", "lattice") else float(x.abs().max()) or 1.0
    return float(u.abs().max()) / scale


def _told(op: "Op", inputs: Sequence[Tensor], told: Sequence[Any], geometry: bool) -> list[Any]:
    """The other arguments of an op, for inputs that have moved: with a layout of theirs, that leaves nothing out."""
    names = [x.rpartition(" ")[2] for x in op.settings.split(", ")]
    known = dict(zip(names, told, strict=True))
    if "layout" in known:
        known["settings"] = Settings.read(known["settings"])._replace(tol=0.0, tf32=0.0)
        num = inputs[op.inputs.index("edge_weight")].shape[2]
        list_of = (*inputs[-2:], known["images"])
        known["layout"] = torch.ops.crystalformer.cpu_layout(
            *list_of, num, known["settings"], op.name == "encoding", not geometry
        )
    return list(known.values())
