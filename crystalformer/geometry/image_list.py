"""The list of images that each atom attends to: what it holds, and what it was built for."""

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import checks
from ..common.ragged import cat_numbers, cat_ptr, crystal_of_atom, ordinals
from ..common.tensor_struct import TensorStruct, cat_known, check_parts, join_words, split_words, weakest
from .edges import Edges, edges_of
from .lattice import triangular
from .movement import Geometry
from .truncation import BEYOND, bearable_movement
from .wave_vectors import WaveVectors

# A cutoff that the caller chose has no certificate to go by: atoms may move by this fraction of it, which is about what
# a certificate bears.
BEARABLE_FRACTION = 1 / 200
# Of a packed list, for each entry: col and shift, or distance (two words), repeats and col.
WORDS = 4
NOT_SYMMETRIC = "images must be symmetric, (j, i, -n) there with each (i, j, n), but they are not"


class Views(NamedTuple):
    """The tensors of a list that operators read."""

    row_ptr: Tensor
    col: Tensor
    shift: Tensor
    ptr: Tensor
    distance: Tensor | None = None
    repeats: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImageList(TensorStruct):
    """The images e = (i, j, n) of all atoms: atom j of the same crystal, moved by n lattice vectors, seen from atom i.

    Row i holds the images of atom i, sorted by (j, n). The list is symmetric: with (i, j, n) it holds (j, i, -n). It
    holds each atom itself, (i, i, 0). It says which images there are, not where: gradients flow through positions and
    lattice, not through the list.

    The certificate holds for the geometry that the list was built for, which is kept in `geometry`. Atoms may move a
    little: while no distance changes by more than `bearable`, the list leaves out at most twice `tol`, and ops refuse
    positions that have moved further. On a GPU they look only under `debug_checks`.

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
        geometry: what the list was built for, or None where that is not known: then any positions are taken.
        distance, repeats: (M) fp64, Å, and (M) fp32, of a list of orbits, from `build_orbit_images`: its rows are
            orbits of equivalent atoms, an entry is `repeats` images of atoms of the orbit `col`, all at one
            distance; they have different translations, so shift is (0,3). None in a list of atoms.
        layouts: what backends have packed the list into, see layouts.py; a copy of the list starts without.

    Raises:
        TypeError, ValueError: for tensors that do not make a valid list, naming the attribute. Tensors of the size of M
            are checked when the list is first used.
    """

    PACKED = ("ptr", "row_ptr", "col", "shift", "distance", "repeats")

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
    geometry: Geometry | None = None
    distance: Tensor | None = None
    repeats: Tensor | None = None
    layouts: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        known: dict[str, int] = {}
        checks.check_tensor("col", self.col, "M", known)
        checks.check_dtype("col", self.col, torch.int32)
        checks.check_tensor("shift", self.shift, "0 3" if self.of_orbits else "M 3", known, like=self.col)
        if self.distance is not None or self.repeats is not None:
            for name, dtype in (("distance", torch.float64), ("repeats", torch.float32)):
                x = getattr(self, name)
                checks.check_tensor(name, x, "M", known)
                checks.check_dtype(name, x, dtype)
                checks.check_device(name, x, like=self.col)
        checks.check_segments("row_ptr", self.row_ptr, known["M"], "images")
        checks.check_ptr("ptr", self.ptr, self.num_atoms)
        checks.check_tensor("cutoff", self.cutoff, "C", {"C": self.num_crystals})
        for name, x in (("row_ptr", self.row_ptr), ("ptr", self.ptr), ("cutoff", self.cutoff)):
            checks.check_device(name, x, like=self.col)
        if self.decay_min is not None:
            checks.check_number("decay_min", self.decay_min)
        if self.tol is not None:
            checks.check_number("tol", self.tol, high=1.0)
        if self.logit_range is not None:
            checks.check_number("logit_range", self.logit_range, closed=True)
        if self.crossover is not None:
            checks.check_tensor("crossover", self.crossover, "C", {"C": self.num_crystals})
        for name, part, kind in (
            ("wave_vectors", self.wave_vectors, WaveVectors),
            ("geometry", self.geometry, Geometry),
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"{name} must be {kind.__name__}, not {type(part).__name__}")
        if self.geometry is not None:
            known = {"N": self.num_atoms, "C": self.num_crystals}
            checks.check_tensor("geometry.positions", self.geometry.positions, "N 3", known)
            checks.check_tensor("geometry.lattice", self.geometry.lattice, "C 3 3", known)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"layouts": {}}

    @staticmethod
    def views(words: Tensor, num_atoms: int, num_crystals: int, of_orbits: bool = False) -> Views:
        """The tensors that `packed` made one of, by name."""
        ptr, row_ptr, rest = split_words(words, num_crystals + 1, num_atoms + 1)
        number = len(rest) // WORDS
        aligned = -(-number // 4) * 4  # col is padded
        if len(rest) != (WORDS * number if of_orbits else aligned + (WORDS - 1) * number):
            raise ValueError(f"a packed list must hold whole entries behind its offsets, not {len(rest)} words")
        if of_orbits:
            entry = rest.view(number, WORDS)
            distance, repeats = entry[:, :2].view(torch.float64)[:, 0], entry[:, 2].view(torch.float32)
            return Views(row_ptr, entry[:, 3], rest.new_empty(0, 3), ptr, distance, repeats)
        shift = rest[aligned:].view(number, WORDS - 1)
        return Views(row_ptr, rest[:number], shift, ptr)

    @staticmethod
    def length(words: Tensor, num_atoms: int, num_crystals: int) -> int:
        """M of what `packed` made, from its length."""
        return len(split_words(words, num_crystals + 1, num_atoms + 1)[-1]) // WORDS

    @staticmethod
    def unpack(
        words: Tensor, num_atoms: int, num_crystals: int, num_pairs: int = 0, of_orbits: bool = False
    ) -> "ImageList":
        """The list that `packed` made one tensor of, in views; what it is certified for is not there."""
        found = ImageList.views(words, num_atoms, num_crystals, of_orbits)
        return ImageList(**found._asdict(), cutoff=words.new_zeros(num_crystals), num_pairs=num_pairs)

    def _words(self) -> Tensor:
        if self.distance is None or self.repeats is None:
            return super()._words()
        entry = torch.empty(self.num_images, WORDS, dtype=torch.int32, device=self.device)
        entry[:, :2] = self.distance.contiguous().view(torch.int32).view(-1, 2)
        entry[:, 2] = self.repeats.view(torch.int32)
        entry[:, 3] = self.col
        return join_words((self.ptr, self.row_ptr, entry))

    @property
    def real_decay_min(self) -> float | None:
        """The smallest decay that the images alone serve: with `reciprocal`, a larger one than decay_min."""
        if self.decay_min is None or self.crossover is None or not len(self.crossover):
            return self.decay_min
        return max(self.decay_min, float(self.crossover.max()))

    @property
    def of_orbits(self) -> bool:
        """Whether rows are orbits of equivalent atoms, and an entry stands for all images at its distance."""
        return self.distance is not None

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
            ValueError: for no lists, lists on several devices, some built with reciprocal=True and some without, or
                some with a geometry and some without: nobody could say any more which crystals they serve.
        """
        lists = list(lists)
        check_parts(lists, "lists", ImageList)
        crossovers = [x.crossover for x in lists if x.crossover is not None]
        if crossovers and len(crossovers) < len(lists):
            raise ValueError("lists must be built all with reciprocal=True or all without")
        if len({x.of_orbits for x in lists}) > 1:
            raise ValueError("lists must be all of orbits or all of atoms")
        waves = [x.wave_vectors for x in lists if x.wave_vectors is not None]
        first = [0, *itertools.accumulate(x.num_atoms for x in lists[:-1])]
        return ImageList(
            row_ptr=cat_ptr([x.row_ptr for x in lists]),
            col=cat_numbers([x.col for x in lists], first),
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
            geometry=_cat_geometry([x.geometry for x in lists]),
            distance=cat_known([x.distance for x in lists]),
            repeats=cat_known([x.repeats for x in lists]),
        )

    def to_edges(self, positions: Tensor, lattice: Tensor, themselves: bool = False) -> Edges:
        """The images as edges of a graph, as PyG, MACE and matgl have them, in the order of the list.

        Differentiable in positions and lattice. The list has the mirror of each image: so has the graph, and it does
        not matter which end of an edge is called its source.

        Args:
            positions: (N,3), Å, of the geometry that the list was built for.
            lattice: (C,3,3), Å.
            themselves: also each atom as its own image, at the distance 0, which the list has and graphs have not.

        Raises:
            ValueError: for a list of orbits, and for positions that the list was not built for.
        """
        return edges_of(self, positions, lattice, themselves)

    @property
    def bearable(self) -> Tensor | None:
        """(C), Å: by how much distances may change before the list has to be built again. At least what rounding to
        fp32 changes; None where it is not known what the list was built for."""
        if self.geometry is None:
            return None
        rounding = self.geometry.rounding()
        if self.of_orbits:  # whose distances are fixed
            return torch.full_like(self.cutoff, rounding)
        return self._reach_and_bearable[1].clamp(min=rounding)

    @cached_property
    def _reach_and_bearable(self) -> tuple[Tensor, Tensor]:
        assert self.geometry is not None
        if self.decay_min is None or self.tol is None or self.logit_range is None:
            return self.cutoff, self.cutoff * BEARABLE_FRACTION
        t, _ = triangular(self.geometry.lattice)
        a = torch.full_like(t[:, 0, 0], self.decay_min)
        if self.crossover is not None:
            a = torch.maximum(a, self.crossover)
        slack = torch.full_like(a, math.log(self.tol * BEYOND))
        if self.every_pair:  # relative to the pair's nearest image, which is at most half a diagonal of T away
            slack -= a * torch.diagonal(t, dim1=1, dim2=2).square().sum(1) / 4
        else:
            slack -= self.logit_range + self.ptr.diff().log()
        return bearable_movement(t, a, slack)

    def check_built_for(self, positions: Tensor, lattice: Tensor) -> None:
        """Refuses positions (N,3) and lattices (C,3,3) that the list was not built for, where they can be seen.

        Raises:
            ValueError: if atoms have moved too far since.
        """
        if self.geometry is None or not checks.values_visible(positions):
            return
        known = {"N": self.num_atoms, "C": self.num_crystals}
        checks.check_tensor("positions", positions, "N 3", known)
        checks.check_tensor("lattice", lattice, "C 3 3", known)
        if self.geometry.same(positions, lattice):
            return
        moved, bearable = (
            self.geometry.movement(positions, lattice, self.ptr, self._reach_and_bearable[0]),
            self.bearable,
        )
        assert bearable is not None
        far = ~(moved <= bearable)
        if bool(far.any()):
            c = int(far.nonzero()[0])
            raise ValueError(
                f"images must be built for these positions and lattice: in crystal {c} distances have changed by up to "
                f"{float(moved[c]):.3g} Å since the list was built, and it serves up to {float(bearable[c]):.3g} Å; "
                f"call {'build_orbit_images' if self.of_orbits else 'build_images'} again"
            )


def _cat_geometry(parts: list[Geometry | None]) -> Geometry | None:
    known = [x for x in parts if x is not None]
    if not known:
        return None
    if len(known) < len(parts):
        raise ValueError("lists must all know what they were built for, their geometry, or none of them")
    return Geometry(torch.cat([x.positions for x in known]), torch.cat([x.lattice for x in known]))


def check_entries(images: ImageList) -> None:
    """Refuses a list that is not sorted, not symmetric or not of atoms of one crystal, where it can be seen.

    The compiled kernels do the same as they pack a list (csrc/list_check.cpp).

    Raises:
        ValueError: saying what is wrong.
    """
    if not checks.values_visible(images.col):
        return
    n, shift = images.num_atoms, images.shift
    row = torch.repeat_interleave(images.row_ptr.diff(), output_size=images.num_images)
    crystal, col = crystal_of_atom(images.ptr, n)[row], images.col.long()
    if bool(((col < images.ptr[crystal]) | (col >= images.ptr[crystal + 1])).any()):
        raise ValueError("images must be of atoms of the row's own crystal, but they are not")
    if images.distance is not None and images.repeats is not None:
        return _check_orbits(row, col, images.distance, images.repeats, n)
    pair, of_image, count = torch.unique_consecutive(row * n + col, return_inverse=True, return_counts=True)
    first = count.cumsum(0) - count
    step = shift.diff(dim=0)
    leading = step.gather(1, (step != 0).int().argmax(1, keepdim=True))[:, 0]
    if not bool((pair.diff() > 0).all()) or not bool(((leading > 0) | (of_image.diff() > 0)).all()):
        raise ValueError("images must be sorted by (col, shift) in each row, no image twice, but they are not")
    transposed = pair % n * n + pair // n
    mirror = torch.searchsorted(pair, transposed).clamp(max=len(pair) - 1)
    if not torch.equal(pair[mirror], transposed) or not torch.equal(count[mirror], count):
        raise ValueError(NOT_SYMMETRIC)
    # Sorted by (j, n), the mirror images of a pair's images come in the opposite order.
    if not torch.equal(shift[first[mirror][of_image] + count[of_image] - 1 - ordinals(count, of_image)], -shift):
        raise ValueError(NOT_SYMMETRIC)
    if int(((row == col) & (shift == 0).all(1)).sum()) < n:
        raise ValueError("images must hold each atom itself, (i, i, 0), but they are not")


def _check_orbits(row: Tensor, col: Tensor, distance: Tensor, repeats: Tensor, number: int) -> None:
    """`check_entries` of a list of orbits."""
    pair = row * number + col
    step, farther = pair.diff(), distance.diff()
    if not bool(((step > 0) | ((step == 0) & (farther > 0))).all()):
        raise ValueError("images must be sorted by (col, distance) in each row, no entry twice, but they are not")
    if not bool((distance >= 0).all()) or not bool((repeats > 0).all()):
        raise ValueError("images must have distances from 0 and repeats above 0, but they do not")
    mirrored = torch.argsort(col * number + row, stable=True)
    if not torch.equal((col * number + row)[mirrored], pair) or not torch.equal(distance[mirrored], distance):
        raise ValueError("images must be symmetric, (J, I, d) there with each (I, J, d), but they are not")
    if int(((row == col) & (distance == 0)).sum()) < number:
        raise ValueError("images must hold each orbit's atom itself, (I, I, 0), but they do not")
