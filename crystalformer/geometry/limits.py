"""How long a list will be, estimated before it is made. A list that memory or int32 cannot hold is refused at once."""

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..common.ragged import crystal_of_atom
from .truncation import BEYOND, tail_radius2

# A list of so many images takes 2 GiB, what is packed of it for the CPU kernels 6 GiB: of some 200,000 atoms with the
# default settings.
MAX_IMAGES = 1 << 27
# Wave vectors of a crystal: of a cell of 2,900,000 Å^3 with the default settings. No call of torch takes a second for
# so many, and Ctrl-C waits for no more than a call.
MAX_VECTORS = 1 << 23
# A batch may have so many times those of its largest crystal, which are some 3 GiB.
MOST_LARGEST = 8
INT32 = 2**31
NO_MPS = "lists are certified in fp64, which Apple's GPUs do not have"


def expected_images(steps: Tensor, atoms: Tensor, radius2: Tensor, all_pairs: bool) -> Tensor:
    """(C) about how many images crystals have within a radius of their atoms.

    For each pair this is the sphere's volume over the cell's, but at least the number of images that an atom has of
    itself: where the cell is shorter than the sphere in some directions only, as many as fit in these directions.

    Args:
        steps: (C,3) diagonals of the triangular lattices, Å.
        atoms, radius2: (C) number of atoms, and squared radius, Å².
        all_pairs: each pair has as many as an atom has of itself.
    """
    ball = math.pi / 6  # of the box around it
    cells = 2 * radius2.sqrt()[:, None] / steps
    own = (ball * cells.clamp(min=1).prod(1)).clamp(min=1)
    return atoms.square() * own if all_pairs else atoms * torch.maximum(atoms * ball * cells.prod(1), own)


@dataclass(frozen=True)
class Extent:
    """What a search for images is about to find.

    Attributes:
        radius: (C) of the spheres around the atoms, Å; with every_pair around those of middling distance.
        images: (C) about how many are in them.
        cells: (C) a bound on |n| of any image.
    """

    radius: Tensor
    images: Tensor
    cells: Tensor

    @staticmethod
    def of(
        positions: Tensor,
        lattice: Tensor,
        ptr: Tensor,
        a: Tensor,
        tol: float,
        logit_range: float,
        radius: float | None,
        every_pair: bool,
        all_pairs: bool,
    ) -> "Extent":
        """Of the arguments of the search, without a wait for a GPU. all_pairs: it looks at pairs however far apart."""
        size = ptr.diff().to(lattice.dtype)
        planes = torch.linalg.cross(lattice.roll(-1, 1), lattice.roll(-2, 1))  # the columns of L^-1, times the volume
        volume = (planes[:, 0] * lattice[:, 0]).sum(-1)
        planes = planes / volume[:, None, None]
        density, last = planes.norm(dim=-1), lattice[:, 2].norm(dim=-1)  # of the planes, Å^-1
        steps = torch.stack([1 / density[:, 0], volume.abs() * density[:, 0] / last, last], 1)
        slack = math.log(tol * BEYOND)
        if radius is not None:
            outer2 = longest2 = torch.full_like(size, radius).square()
        elif every_pair:
            # The near image of a pair lies in the box around the atom whose edges are the steps.
            box2 = steps.square().sum(1)
            outer2, longest2 = (tail_radius2(torch.diag_embed(steps), a, slack - a * box2 / k) for k in (12, 4))
        else:
            outer2 = longest2 = tail_radius2(torch.diag_embed(steps), a, slack - logit_range - size.log())
        crystal = crystal_of_atom(ptr, len(positions))
        fraction = torch.einsum("nx,nkx->nk", positions, planes[crystal])
        index, none = crystal[:, None].expand(-1, 3), torch.zeros_like(steps)
        high, low = (none.scatter_reduce(0, index, fraction, f, include_self=False) for f in ("amax", "amin"))
        return Extent(
            radius=outer2.sqrt(),
            images=expected_images(steps, size, outer2, every_pair or all_pairs),
            cells=(high - low + longest2.sqrt()[:, None] * density).amax(1),
        )

    def refused(self, max_images: int) -> Tensor:
        """Whether there are too many, or some are too far away; also true for a geometry that is not finite."""
        return ~((self.images.sum() <= max_images) & (self.cells < INT32).all())

    def refuse(self, max_images: int) -> NoReturn:
        """Says why. It waits for a GPU."""
        if not bool(self.images.sum() <= max_images):
            c = int(self.images.argmax())
            raise ValueError(
                f"images must number at most max_images={max_images}, but there are about {float(self.images.sum()):g},"
                f" most of them within {float(self.radius[c]):g} Å of the atoms of lattice[{c}]: "
                "raise decay_min, tol or max_images, or take a shorter cutoff"
            )
        c = int(self.cells.argmax())
        raise ValueError(
            f"positions must be less than 2^31 cells apart, but those of lattice[{c}] are {float(self.cells[c]):g}"
        )


def check_vectors(steps: Tensor, radius2: Tensor, max_vectors: int) -> Tensor:
    """(C) about how many wave vectors crystals have, from the steps (C,3) of the reciprocal lattices and the radii (C).

    Raises:
        ValueError: for too many.
    """
    number = expected_images(steps, torch.ones_like(radius2), radius2, all_pairs=True)
    if not len(number) or bool((number.max() <= max_vectors) & (number.sum() <= MOST_LARGEST * max_vectors)):
        return number
    c = int(number.argmax())
    raise ValueError(
        f"wave vectors must number at most max_vectors={max_vectors} in each crystal, and {MOST_LARGEST} times as many "
        f"in all, but there are about {float(number.sum()):g} in all, and lattice[{c}] has about {float(number[c]):g} "
        f"up to {float(radius2[c].sqrt()):g} Å^-1: raise decay_min, tol or max_vectors, or take fewer crystals"
    )
