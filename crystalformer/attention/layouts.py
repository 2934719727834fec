"""The image list as a backend wants it: packed for one geometry and one radial basis, opaque to everybody else.

The kernels read distances, not translations, so a layout belongs to the values of positions and lattice. It is made
once and kept with the list: the blocks of a model, forward and backward, share it.
"""

from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..geometry.image_list import ImageList, check_entries
from ..geometry.lattice import check_geometry
from .ops import NAMESPACE, SETTINGS
from .settings import Settings

LIST = "Tensor positions, Tensor lattice, Tensor images"
CPU = f"({LIST}, int num, {SETTINGS}, bool by_pair, bool merge) -> Tensor"
TRITON = f"({LIST}, SymInt num_pairs, int num, {SETTINGS}, bool by_pair) -> Tensor"

torch.library.define(f"{NAMESPACE}::cpu_layout", CPU)  # implemented in csrc/bindings_real.cpp
torch.library.define(f"{NAMESPACE}::triton_layout", TRITON)  # implemented in kernels/layout.py


@torch.library.register_fake(f"{NAMESPACE}::cpu_layout")
def _(positions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake(f"{NAMESPACE}::triton_layout")
def _(positions: Tensor, *_: Any) -> Tensor:
    context = torch.library.get_ctx()
    return positions.new_empty(context.new_dynamic_size(), context.new_dynamic_size(), dtype=torch.int32)


def layout(
    backend: str,
    images: ImageList,
    positions: Tensor,
    lattice: Tensor,
    num: int,
    settings: Settings,
    by_pair: bool,
    merge: bool,
) -> Tensor:
    """The layout of a list that a backend's ops want; empty for backends that want none.

    Checks the values of positions, lattice and list, of those that a layout is there for no more than once.

    Args:
        num: number of radial basis functions, 0 for none.
        settings: of the op.
        by_pair: for the encoding, where the sums are over the images of a pair, not of a row.
        merge: make one entry of the images at one distance; not for gradients of positions and lattice.
    """
    geometry = (positions.detach(), lattice.detach())
    # One of Triton's serves every tol, and moving atoms, too; the reference reads the list as it is.
    settings = settings._replace(tf32=False)
    arguments: tuple[Any, ...] = (num, settings, by_pair, merge)
    if backend != "cpu":
        settings = settings._replace(tol=0.0)
        arguments = () if backend == "reference" else (images.num_pairs, num, settings, by_pair)

    def make() -> Tensor:
        if backend == "reference":
            return positions.new_empty(0, dtype=torch.uint8)
        return getattr(torch.ops.crystalformer, f"{backend}_layout")(*geometry, images.packed(), *arguments)

    if torch.compiler.is_compiling():
        return make()
    key = (backend, positions.dtype, arguments)
    made_for, kept = images.layouts.get(key, (None, None))
    if made_for is None or not made_for.still(geometry, images):
        check_geometry(positions, lattice)
        images.check_built_for(positions, lattice)
        _check_num_pairs(images)
        if backend != "cpu":  # whose packing does it
            check_entries(images)
        with torch.inference_mode(False):  # the layout outlives this call, and may be saved for a backward
            kept = make()
        images.layouts[key] = (_Made(geometry, images), kept)
    return kept


def _check_num_pairs(images: ImageList) -> None:
    """Memory is taken for so many."""
    if not checks.values_visible(images.ptr):
        return
    number = int(images.ptr.diff().square().sum())
    if images.num_pairs != number:
        raise ValueError(f"images.num_pairs must be {number}, the sum of squared sizes, not {images.num_pairs}")


class _Made:
    """What a layout was made for, and whether its values could be looked at then.

    Positions and lattices on the CPU are compared by value, because not every change of a tensor leaves a trace in its
    version. On a GPU that would wait for the device, and forbid the capture of a graph: there, and for the list, which
    is long, it must be the same memory, not written since as far as PyTorch knows.
    """

    def __init__(self, geometry: tuple[Tensor, Tensor], images: ImageList) -> None:
        self.written, self.seen = images.versions(), checks.values_visible(geometry[0])
        self.trace = _trace(geometry)
        self.tensors = geometry if self.trace else tuple(x.clone() for x in geometry)

    def still(self, geometry: tuple[Tensor, Tensor], images: ImageList) -> bool:
        if self.written != images.versions() or (checks.values_visible(geometry[0]) and not self.seen):
            return False
        trace = _trace(geometry)
        return trace == self.trace if trace or self.trace else all(map(torch.equal, geometry, self.tensors))


def _trace(geometry: tuple[Tensor, Tensor]) -> list[Any] | None:
    """Where GPU tensors are and how often they were written, or None where values have to be compared."""
    if any(not x.is_cuda or x.is_inference() for x in geometry):
        return None
    return [(x.data_ptr(), x.shape, x.stride(), x._version) for x in geometry]
