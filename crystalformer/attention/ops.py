"""The operators `torch.ops.crystalformer.{backend}_{op}` and their derivatives.

Each op has a schema, a fake and an autograd formula here, the same for every backend; a backend brings only the
implementation of `{backend}_{op}` and `{backend}_{op}_backward`. So torch.compile and export see one opaque op, and its
backward is one op too. Second and higher derivatives go through the reference, for every backend; but second ones of
`cpu` in fp32 (differences.py).

Two conventions keep this file free of copies. The differentiable inputs of an op come first and the geometry
(positions, lattice) last among them. A backward takes the gradients of the outputs, then everything the forward took,
then all that the forward returned, then `geometry`: whether the gradients of positions and lattice are wanted at all,
because they cost extra. Without them it returns empty tensors in their place.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry.image_list import ImageList
from ..geometry.wave_vectors import WaveVectors
from . import reference, reference_backward
from .basis import RadialBasis
from .differences import differentiate_along
from .settings import Settings

NAMESPACE = "crystalformer"


@dataclass(frozen=True)
class Op:
    """What the registration of one op needs.

    Attributes:
        inputs: names of the differentiable inputs, geometry last.
        settings: schema of the other arguments.
        outputs: names of the outputs.
        saved: names of further results, that only the backward reads.
        shapes: shapes of all results, from all arguments.
        parts: the reference, cut into parts, from all arguments.
        part_backward: the backward of one part; none for an op that is made of others.
    """

    name: str
    inputs: tuple[str, ...]
    settings: str
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    shapes: Callable[..., Sequence[tuple[int, ...]]]
    parts: Callable[..., Iterator[reference.Part]]
    part_backward: Callable[..., None] | None = None

    @property
    def results(self) -> tuple[str, ...]:
        return (*self.outputs, *self.saved)

    def empty(self, *args: Any) -> tuple[Tensor, ...]:
        """Results to be filled in, in the geometry's dtype: q, k and v may be in half precision, no sum ever is."""
        return tuple(args[len(self.inputs) - 1].new_empty(shape) for shape in self.shapes(*args))

    @property
    def forward_schema(self) -> str:
        return f"({_tensors(self.inputs)}, {self.settings}) -> {_results(len(self.results))}"

    @property
    def backward_schema(self) -> str:
        grads = _tensors(f"grad_{name}" for name in self.outputs)
        arguments = f"{_tensors(self.inputs)}, {self.settings}, {_tensors(self.results)}, bool geometry"
        return f"({grads}, {arguments}) -> {_results(len(self.inputs))}"


def _tensors(names: Iterable[str]) -> str:
    return ", ".join(f"Tensor {name}" for name in names)


def _results(number: int) -> str:
    return "(" + ", ".join(["Tensor"] * number) + ")" if number > 1 else "Tensor"


def _images(
    positions: Tensor, lattice: Tensor, images: Tensor, settings: Sequence[float], num_pairs: int = 0
) -> ImageList:
    return ImageList.unpack(images, len(positions), len(lattice), num_pairs, bool(Settings.read(settings).of_orbits))


def _basis(edge_weight: Tensor, settings: Sequence[float]) -> RadialBasis | None:
    num, told = edge_weight.shape[2], Settings.read(settings)
    return RadialBasis(num, told.r_max, told.width) if num else None


# The functions below take exactly what their schemas say, positionally: annotations would say it a second time.


def _attention_shapes(q, k, v, decay, edge_weight, *_):  # type: ignore[no-untyped-def]
    return v.shape, decay.shape, (*decay.shape, edge_weight.shape[2])


def _attention_parts(q, k, v, decay, edge_weight, positions, lattice, images, layout, settings):  # type: ignore[no-untyped-def]
    return reference.attention_parts(q, v, _images(positions, lattice, images, settings), _basis(edge_weight, settings))


def _encoding_shapes(decay, edge_weight, positions, lattice, images, layout, num_pairs, settings):  # type: ignore[no-untyped-def]
    return (num_pairs, decay.shape[1]), (num_pairs, decay.shape[1], edge_weight.shape[1])


def _encoding_parts(decay, edge_weight, positions, lattice, images, layout, num_pairs, settings):  # type: ignore[no-untyped-def]
    found = _images(positions, lattice, images, settings, num_pairs)
    return reference.encoding_parts(decay, found, _basis(edge_weight, settings))


def _reciprocal_shapes(q, k, v, *_):  # type: ignore[no-untyped-def]
    return (v.shape,)


def _reciprocal_parts(q, k, v, decay_reciprocal, positions, lattice, waves, largest):  # type: ignore[no-untyped-def]
    return reference.reciprocal_parts(q, WaveVectors.unpack(waves, len(lattice), largest))


def _reciprocal_sum_shapes(decay_reciprocal, positions, lattice, waves, largest, num_pairs):  # type: ignore[no-untyped-def]
    return ((num_pairs, decay_reciprocal.shape[1]),)


def _reciprocal_sum_parts(decay_reciprocal, positions, lattice, waves, largest, num_pairs):  # type: ignore[no-untyped-def]
    found = WaveVectors.unpack(waves, len(lattice), largest)
    if found.of_orbits:
        raise ValueError("wave_vectors must be of all atoms, not of orbits, for the sums of pairs")
    return reference.reciprocal_pairs_parts(decay_reciprocal, found, num_pairs)


# Each list is one argument, `packed()` of ImageList or WaveVectors, and the numbers are one group: the time that
# torch.library takes grows with the number of arguments. `layout` is what the backend has made of the image list.
LIST = "Tensor images, Tensor layout"
SETTINGS = "float[] settings"
WAVES = "Tensor waves, int[] largest"
ATTENTION = Op(
    name="attention",
    inputs=("q", "k", "v", "decay", "edge_weight", "positions", "lattice"),
    settings=f"{LIST}, {SETTINGS}",
    outputs=("y", "lse"),
    saved=("c",),
    shapes=_attention_shapes,
    parts=_attention_parts,
    part_backward=reference_backward.attention_rows_backward,
)
ENCODING = Op(
    name="encoding",
    inputs=("decay", "edge_weight", "positions", "lattice"),
    settings=f"{LIST}, int num_pairs, {SETTINGS}",
    outputs=("alpha", "beta"),
    saved=(),
    shapes=_encoding_shapes,
    parts=_encoding_parts,
    part_backward=reference_backward.encoding_pairs_backward,
)
RECIPROCAL = Op(
    name="reciprocal",
    inputs=("q", "k", "v", "decay_reciprocal", "positions", "lattice"),
    settings=WAVES,
    outputs=("y",),
    saved=(),
    shapes=_reciprocal_shapes,
    parts=_reciprocal_parts,
    part_backward=reference_backward.reciprocal_rows_backward,
)
RECIPROCAL_SUM = Op(
    name="reciprocal_sum",
    inputs=("decay_reciprocal", "positions", "lattice"),
    settings=f"{WAVES}, int num_pairs",
    outputs=("total",),
    saved=(),
    shapes=_reciprocal_sum_shapes,
    parts=_reciprocal_sum_parts,
    part_backward=reference_backward.reciprocal_pairs_backward,
)
OPS = (ATTENTION, ENCODING, RECIPROCAL, RECIPROCAL_SUM)


def register(op: Op, backend: str) -> None:
    """Defines `{backend}_{op}` and `{backend}_{op}_backward`: schemas, fakes and autograd, no implementation."""
    forward, backward = f"{NAMESPACE}::{backend}_{op.name}", f"{NAMESPACE}::{backend}_{op.name}_backward"
    torch.library.define(forward, op.forward_schema)
    torch.library.define(backward, op.backward_schema)
    num_inputs, num_outputs, num_results = len(op.inputs), len(op.outputs), len(op.results)

    @torch.library.register_fake(forward)
    def _(*args: Any) -> Any:
        results = op.empty(*args)
        return results if num_results > 1 else results[0]

    @torch.library.register_fake(backward)
    def _(*args: Any) -> Any:
        inputs, geometry = args[num_outputs : num_outputs + num_inputs], args[-1]
        return tuple(x.new_empty(_grad_shape(x, i, num_inputs, geometry)) for i, x in enumerate(inputs))

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        results = output if num_results > 1 else (output,)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.settings = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*tensors, *results)
        ctx.mark_non_differentiable(*results[num_outputs:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if x is None else x for x in ctx.settings]
        results = list(saved)
        grads = tuple(_or_zeros(g, x) for g, x in zip(grads, results[:num_outputs], strict=False))
        geometry = any(ctx.needs_input_grad[num_inputs - 2 : num_inputs])
        run = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_{op.name}_backward")
        totals = run(*grads, *args, *results, geometry)
        needed = [x if need else None for x, need in zip(totals, ctx.needs_input_grad, strict=False)]
        return (*needed, *[None] * (len(args) - num_inputs))

    def save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.settings = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*tensors)

    def differentiate_backward(ctx: Any, *grads: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if x is None else x for x in ctx.settings]
        cotangents, arguments = args[:num_outputs], args[num_outputs : len(args) - num_results - 1]
        inner = (cotangents, arguments, grads, args[-1])
        # What is to be differentiated once more must be exact.
        if backend == "cpu" and cotangents[0].dtype == torch.float32 and not torch.is_grad_enabled():
            results = differentiate_along(op, *inner)
        else:
            results = _differentiate_twice(op, *inner)
        # The derivatives with respect to the inputs are total ones, so none are left for the forward's results.
        return (*results, *[None] * (len(args) - len(results)))

    torch.library.register_autograd(forward, differentiate, setup_context=save)
    torch.library.register_autograd(backward, differentiate_backward, setup_context=save_backward)


def _grad_shape(x: Tensor, index: int, num_inputs: int, geometry: bool) -> Sequence[int]:
    return x.shape if geometry or index < num_inputs - 2 else (0,)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """What an op computes on the device of x, it computes in its arguments' dtypes: autocast reaches inside ops."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


def implement_reference(op: Op) -> None:
    """Implements the reference backend of an op, on every device, part by part."""
    num_inputs, num_outputs, num_results = len(op.inputs), len(op.outputs), len(op.results)

    def forward(*args: Any) -> Any:
        results = op.empty(*args)
        with without_autocast(args[0]):
            for part in op.parts(*args):
                for result, value in zip(results, part.forward(*args[:num_inputs]), strict=True):
                    result[part.span] = value
        return results if num_results > 1 else results[0]

    def backward(*args: Any) -> tuple[Tensor, ...]:
        grads, arguments, geometry = args[:num_outputs], args[num_outputs : -num_results - 1], args[-1]
        inputs, results = arguments[:num_inputs], args[-num_results - 1 : -1]
        assert op.part_backward is not None
        totals = tuple(x.new_zeros(_grad_shape(x, i, num_inputs, geometry)) for i, x in enumerate(inputs))
        with without_autocast(args[0]):
            for part in op.parts(*arguments):
                here = [[x[part.span] for x in tensors] for tensors in (grads, results)]
                op.part_backward(here[0], inputs, here[1], totals, geometry, **part.settings)
        return totals

    torch.library.impl(f"{NAMESPACE}::reference_{op.name}", "CompositeExplicitAutograd")(forward)
    torch.library.impl(f"{NAMESPACE}::reference_{op.name}_backward", "CompositeExplicitAutograd")(backward)


def _differentiate_twice(
    op: Op, cotangents: list, arguments: list, grads: Sequence[Tensor | None], geometry: bool
) -> tuple[Tensor | None, ...]:
    """Derivatives of an op's backward with respect to the output gradients and the inputs, through the reference."""
    num_inputs, num_outputs = len(op.inputs), len(op.outputs)
    wanted = num_inputs if geometry else num_inputs - 2
    dtype = arguments[num_inputs - 1].dtype
    if not arguments[0].numel():  # no atoms
        return tuple(torch.zeros_like(x) for x in (*cotangents, *arguments[:num_inputs]))

    def whole(*x: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.to(dtype) for t in (*x, *arguments[wanted:num_inputs])]
        pieces = [part.forward(*inputs) for part in op.parts(*arguments)]
        return tuple(torch.cat(piece) for piece in list(zip(*pieces, strict=True))[:num_outputs])

    def backward(*g_and_x: Tensor) -> tuple[Tensor, ...]:
        transpose = torch.func.vjp(whole, *g_and_x[num_outputs:])[1]
        return transpose(g_and_x[:num_outputs])

    with without_autocast(cotangents[0]):
        results, transpose = torch.func.vjp(backward, *cotangents, *arguments[:wanted])[:2]
        second = transpose(tuple(_or_zeros(g, r) for g, r in zip(grads, results, strict=False)))
    return (*second, *[None] * (num_inputs - wanted))


for _op in OPS:
    register(_op, "reference")
    implement_reference(_op)
for _op in OPS:
    register(_op, "cpu")  # implemented in csrc/bindings_*.cpp
for _op in (ATTENTION, ENCODING, RECIPROCAL):
    register(_op, "triton")  # implemented in kernels/
