"""The image list as a backend wants it: packed for one geometry and one radial basis, opaque to everybody else.

The kernels read distances, not translations, so a layout belongs to the values of positions and lattice. It is made
once and kept with the list: the blocks of a model, forward and backward, share it.
"""

from typing import Any

import torch
from torch import Tensor

from .images import ImageList

NAMESPACE = "crystalformer"
CPU_LAYOUT = (
    "(Tensor positions, Tensor lattice, Tensor ptr, Tensor row_ptr, Tensor col, Tensor shift, "
    "int num, float r_max, float width, float tol, bool by_pair, bool merge) -> Tensor"
)

torch.library.define(f"{NAMESPACE}::cpu_layout", CPU_LAYOUT)


@torch.library.register_fake(f"{NAMESPACE}::cpu_layout")
def _(positions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def layout(
    backend: str,
    images: ImageList,
    positions: Tensor,
    lattice: Tensor,
    basis: tuple[int, float, float],
    tol: float,
    by_pair: bool,
    merge: bool,
) -> Tensor:
    """The layout of a list that a backend's ops want, bytes; empty for backends that want none.

    Args:
        basis: num, r_max and width of the radial basis; num = 0 for none.
        tol: largest fraction of the weight that the op may leave out.
        by_pair: for the encoding, where the sums are over the images of a pair, not of a row.
        merge: make one entry of the images at one distance; not for gradients of positions and lattice.
    """
    if backend != "cpu":
        return positions.new_empty(0, dtype=torch.uint8)
    geometry = (positions.detach(), lattice.detach())
    settings = (*basis, tol, by_pair, merge)

    def make() -> Tensor:
        lists = (images.ptr, images.row_ptr, images.col, images.shift)
        return torch.ops.crystalformer.cpu_layout(*geometry, *lists, *settings)

    if torch.compiler.is_compiling():
        return make()
    key = (backend, positions.dtype, settings)
    made_for, kept = images.layouts.get(key, ((), None))
    # The values are compared, because not every change of a tensor leaves a trace in its version.
    if kept is None or not all(map(torch.equal, geometry, made_for)):
        kept = make()
        images.layouts[key] = (tuple(x.clone() for x in geometry), kept)
    return kept
