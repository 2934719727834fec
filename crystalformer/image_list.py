"""The list of images that each atom attends to: what it holds, and what it was built for."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .packed import Packed, check_parts, weakest
from .segments import cat_ptr
from .wave_vectors import WaveVectors


@dataclass(frozen=True, eq=False)
class ImageList(Packed):
    """The images e = (i, j, n) of all atoms: atom j of the same crystal, moved by n lattice vectors, seen from atom i.

    Row i holds the images of atom i, sorted by (j, n). The list is symmetric: with (i, j, n) it holds (j, i, -n). It
    holds each atom itself, (i, i, 0). It says which images there are, not where: gradients flow through positions and
    lattice, not through the list. The certificate holds for the geometry that the list was built for.

    Attributes:
        row_ptr: (N+1) int64, row i is the images row_ptr[i] to row_ptr[i+1].
        col: (M) int32, atom j of each image.
        shift: (M,3) int32, n of each image.
        ptr: (C+1) int64, the first atom of each crystal.
        cutoff: (C) fp64, Å. All images this near are there; with `every_pair` the longest cutoff of any pair; the
            caller's own where one was given.
        num_pairs: P, the sum over crystals of the squared number of atoms.
        decay_min, tol, logit_range: what the list is certified for (see `build_images`), or None for a cutoff that the
            caller chose.
        every_pair: whether every pair of atoms has the images its own sum needs.
        crossover: (C), Å^-2, with `reciprocal`: alpha is summed over the wave vectors where the decay is smaller; the
            images serve the decays from there on. 0 where they serve all from decay_min on.
        wave_vectors: those of these sums.
        layouts: what backends have packed the list into, see layouts.py; a copy of the list starts without.
    """

    row_ptr: Tensor
    col: Tensor
    shift: Tensor
    ptr: Tensor
    cutoff: Tensor
    num_pairs: int
    decay_min: float | None = None
    tol: float | None = None
    logit_range: float | None = None
    every_pair: bool = False
    crossover: Tensor | None = None
    wave_vectors: WaveVectors | None = None
    layouts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"layouts": {}}

    @property
    def real_decay_min(self) -> float | None:
        """The smallest decay that the images alone serve: with `reciprocal`, a larger one than decay_min."""
        if self.decay_min is None or self.crossover is None or not len(self.crossover):
            return self.decay_min
        return max(self.decay_min, float(self.crossover.max()))

    @property
    def num_images(self) -> int:
        return len(self.col)

    @property
    def num_atoms(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def num_crystals(self) -> int:
        return len(self.ptr) - 1

    @property
    def device(self) -> torch.device:
        return self.col.device

    @staticmethod
    def cat(lists: "list[ImageList]") -> "ImageList":
        """Joins lists of separate crystals into the list of their batch, in order.

        The certificate of the result is the weakest of its parts.

        Raises:
            ValueError: for no lists, lists on several devices, or some built with reciprocal=True and some without.
        """
        lists = list(lists)
        check_parts(lists, "lists", ImageList)
        crossovers = [x.crossover for x in lists if x.crossover is not None]
        if crossovers and len(crossovers) < len(lists):
            raise ValueError("lists must be built all with reciprocal=True or all without")
        waves = [x.wave_vectors for x in lists if x.wave_vectors is not None]
        first = [0, *itertools.accumulate(x.num_atoms for x in lists)]
        return ImageList(
            row_ptr=cat_ptr([x.row_ptr for x in lists]),
            col=torch.cat([x.col + n for x, n in zip(lists, first, strict=False)]),
            shift=torch.cat([x.shift for x in lists]),
            ptr=cat_ptr([x.ptr for x in lists]),
            cutoff=torch.cat([x.cutoff for x in lists]),
            num_pairs=sum(x.num_pairs for x in lists),
            decay_min=weakest(lists, "decay_min", max),
            tol=weakest(lists, "tol", max),
            logit_range=weakest(lists, "logit_range", min),
            every_pair=all(x.every_pair for x in lists),
            crossover=torch.cat(crossovers) if crossovers else None,
            wave_vectors=WaveVectors.cat(waves) if waves else None,
        )
