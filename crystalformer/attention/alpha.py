"""alpha of every pair, each atom and head summed over images or over wave vectors, whichever the decay makes cheaper.

`crossover` chose both lists and where to cross from one to the other; docs/math.md, section 6, says why they agree.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..common import checks
from ..common.backends import choose_backend
from ..common.ragged import crystal_of_atom
from ..geometry.image_list import ImageList
from ..geometry.lattice import volume
from .ops import NAMESPACE
from .reference import pair_atoms


def cheaper_alpha(
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    backend: str,
    real_alpha: Callable[[Tensor], Tensor],
) -> Tensor:
    """alpha (P,H) of a list built with reciprocal=True: decays below its crossover take the sum over wave vectors.

    Where the values of the decays can be seen, a sum that no decay needs is not computed.

    Args:
        backend: of the sum over wave vectors.
        real_alpha: alpha of decays that are large enough for the images.
    """
    assert images.crossover is not None
    crossover = images.crossover.to(decay.dtype)[crystal_of_atom(images.ptr, images.num_atoms), None]
    slow = decay < crossover
    visible = checks.values_visible(decay)
    if visible and not slow.any():
        return real_alpha(decay)
    if visible and slow.all():
        return reciprocal_alpha(decay, positions, lattice, images, backend)
    # Both sums are computed for all decays. Where one is not used, it gets a decay that it can handle.
    served = torch.where(crossover > 0, crossover, 1.0)
    alpha = reciprocal_alpha(torch.where(slow, decay, served), positions, lattice, images, backend)
    pair_slow = slow[pair_atoms(images)[0]]
    return torch.where(pair_slow, alpha, real_alpha(torch.where(slow, served, decay)))


def reciprocal_alpha(decay: Tensor, positions: Tensor, lattice: Tensor, images: ImageList, backend: str) -> Tensor:
    """alpha (P,H) summed over the wave vectors of the list, in fp64.  Equation (15) of docs/math.md."""
    waves = images.wave_vectors
    assert waves is not None
    waves.check_built_for(lattice, name="images", build="build_images")
    a, p, cell = decay.double(), positions.double(), lattice.double()
    backend = choose_backend(backend, decay.device, "reciprocal_sum", a.dtype)
    lists = (waves.packed(), waves.largest, images.num_pairs)
    total = getattr(getattr(torch.ops, NAMESPACE), f"{backend}_reciprocal_sum")(1 / (4 * a), p, cell, *lists)
    row = 1.5 * (math.pi / a).log() - volume(cell).log()[crystal_of_atom(images.ptr, images.num_atoms), None]
    return (total.log() + row[pair_atoms(images)[0]]).to(decay.dtype)
