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
    packed, told = x.images.packed(), x.settings._replace(tol=x.images.tol)
    pairs, num, by_pair = x.images.num_pairs, x.basis.num, name == "encoding"
    layout = x.ptr.new_empty(0, dtype=torch.uint8)
    if backend != "reference":
        of_backend = {"cpu": (num, told, by_pair, False), "triton": (pairs, num, told, by_pair)}
        layout = operator(backend, "layout")(positions, lattice, packed, *of_backend[backend])
    waves = x.wave_vectors(1.0, x.images.tol)
    return {
        "attention": (packed, layout, told),
        "encoding": (packed, layout, pairs, told),
        "reciprocal": waves,
        "reciprocal_sum": (*waves, pairs),
        "dual_space": (packed, layout, *waves, told),
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
