"""The operators `torch.ops.crystalformer.{backend}_{op}` called by themselves, past the checks of the public functions:
the one place of the tests that knows their arguments."""

from collections.abc import Callable
from typing import Any

import torch
from problems import Problem
from torch import Tensor

from crystalformer.attention import ops
from crystalformer.attention.dual_space import DUAL_SPACE

OPS = {op.name: op for op in (*ops.OPS, DUAL_SPACE)}
# On a GPU the reference's matrix products serve it.
NOT_IN_TRITON = ("reciprocal_sum",)


def operator(backend: str, name: str) -> Callable[..., Any]:
    return getattr(torch.ops.crystalformer, f"{backend}_{name}").default


def inputs_of(name: str, x: Problem) -> dict[str, Tensor]:
    """Copies of the differentiable inputs of an op, by name."""
    known = dict(q=x.q, k=x.k, v=x.v, decay=x.decay, edge_weight=x.edge_weight, positions=x.positions)
    known |= dict(lattice=x.lattice, decay_reciprocal=x.decay)
    if name == DUAL_SPACE.name:
        known |= dict(decay=x.decay[:, :1], decay_reciprocal=x.decay[:, 1:], edge_weight=x.edge_weight[:1])
    return {one: known[one].clone() for one in OPS[name].inputs}


def settings_of(name: str, x: Problem, backend: str, geometry: tuple[Tensor, Tensor] | None = None) -> tuple:
    """The other arguments of an op, of a list and a layout made for `geometry`, with waves for decays from 1 Å⁻² on.

    A layout for positions that are not finite can be made only so, as compiled code does.
    """
    positions, lattice = geometry or (x.positions, x.lattice)
    lists = (x.ptr, x.images.row_ptr, x.images.col, x.images.shift)
    basis, tol, by_pair = (x.basis.r_max, x.basis.width), x.images.tol, name == "encoding"
    layout = x.ptr.new_empty(0, dtype=torch.uint8)
    if backend != "reference":
        of_cpu, of_triton = (x.basis.num, basis, tol, by_pair, False), (x.images.num_pairs, x.basis.num, basis, by_pair)
        layout = operator(backend, "layout")(positions, lattice, *lists, *(of_cpu if backend == "cpu" else of_triton))
    waves, pairs, last = x.wave_vectors(1.0, tol), x.images.num_pairs, (basis, tol, False)
    return {
        "attention": (*lists, layout, *last),
        "encoding": (*lists, layout, pairs, *last),
        "reciprocal": waves,
        "reciprocal_sum": (*waves, pairs),
        "dual_space": (*lists, layout, *waves[1:], *last),
    }[name]


def call(
    name: str, backend: str, inputs: dict[str, Tensor], settings: tuple, geometry: bool = True, spoil=None
) -> dict:
    """Outputs and gradients by name; `spoil` changes the gradients of the outputs before they are used."""
    op, arguments = OPS[name], (*inputs.values(), *settings)
    outputs = operator(backend, name)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y) for y in outputs[: len(op.outputs)]]
    if spoil:
        spoil(grads)
    gradients = operator(backend, f"{name}_backward")(*grads, *arguments, *outputs, geometry)
    found = dict(zip(op.outputs, outputs, strict=False))
    return found | {f"d {one}": grad for one, grad in zip(op.inputs, gradients, strict=True)}
