"""The periodic images that each atom attends to, as few as the certificate allows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backends import choose_backend
from ..common.ragged import crystal_of_atom, offsets
from .crossover import crossover, slow_wave_vectors
from .image_list import ImageList
from .lattice import check_geometry, points_in_spheres, triangular
from .limits import INT32, MAX_IMAGES, Extent
from .movement import Geometry
from .truncation import BEYOND, MAX_LOGIT_RANGE, pair_cutoff2, row_cutoff2, tail_radius2

# Pairs of atoms enumerated at once: bounds the memory of a cell with thousands of atoms.
PAIRS_AT_ONCE = 1 << 18
# An image at exactly an explicit cutoff belongs to the list, whatever the rounding of its distance (Å): coordinates of
# 500 Å in fp32 are known to 3e-5.
CUTOFF_SLACK = 1e-4

SCHEMA = (
    "(Tensor positions, Tensor lattice, Tensor ptr, Tensor decay_min, float tol, float logit_range, float beyond, "
    "float? cutoff, bool every_pair, int max_images) -> "
    "(Tensor row_ptr, Tensor col, Tensor shift, Tensor cutoff, SymInt num_pairs)"
)

torch.library.define("crystalformer::cpu_images", SCHEMA)  # implemented in csrc/bindings_images.cpp
torch.library.define("crystalformer::triton_images", SCHEMA)  # implemented in kernels/images.py


@torch.library.register_fake("crystalformer::cpu_images")
@torch.library.register_fake("crystalformer::triton_images")
def _(positions: Tensor, lattice: Tensor, ptr: Tensor, *_: Any) -> tuple[Tensor | torch.SymInt, ...]:
    number, num_pairs = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    row_ptr = ptr.new_empty(len(positions) + 1)
    int32 = torch.int32
    return (
        row_ptr,
        ptr.new_empty(number, dtype=int32),
        ptr.new_empty(number, 3, dtype=int32),
        lattice.new_empty(len(lattice)),
        num_pairs,
    )


@torch.inference_mode(False)  # the list outlives this call, and may be saved for a backward
@torch.no_grad()
def build_images(
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    decay_min: float = 0.1275,
    tol: float = 1e-6,
    logit_range: float = 4.0,
    cutoff: float | None = None,
    every_pair: bool = False,
    reciprocal: bool = False,
    max_images: int = MAX_IMAGES,
) -> ImageList:
    """The images that each atom attends to, with a certified cutoff for each crystal.

    The attention of atom i weighs image e with exp(score - a d_e²). The list is certified: for every atom, every decay
    a >= decay_min and all content scores q·k/sqrt(D) that differ by at most `logit_range`, the images left out hold at
    most the fraction `tol` of the weight. The cutoff is the shortest that the certificate allows (docs/math.md,
    section 4).

    Args:
        positions: (N,3) fp32 or fp64, Cartesian, Å. Atoms may lie outside the cell.
        lattice: (C,3,3), rows are the lattice vectors, Å. Either handedness.
        ptr: (C+1) int64, the first atom of each crystal and, last, N.
        decay_min: smallest decay a that will be used, Å^-2. The default serves the paper's model, whose decays are
            at least 0.5/(2·1.4²) = 0.12755.
        tol: largest fraction of the attention's weight that may be left out.
        logit_range: largest difference between the content scores of an atom, below 500.
        cutoff: a radius in Å to use instead, uncertified: all images with d <= cutoff, and those within 1e-4 Å beyond,
            so that rounding never breaks a shell.
        every_pair: keep, for every pair of atoms, what the pair's own sum needs: the part of
            sum_n exp(-a d_ijn²) left out is at most `tol` of it, for every a >= decay_min. `periodic_encoding` needs
            it. Pairs have cutoffs of their own, and far pairs are there. Not with `cutoff`.
        reciprocal: with every_pair: leave the alpha of slow decays to sums over wave vectors, where these are cheaper,
            within the same `tol` (Poisson summation, docs/math.md, section 6). Such a list is short however small
            decay_min is. It serves `periodic_encoding` without edge_weight from decay_min on, and everything else from
            the larger `real_decay_min` on.
        max_images: how many images may be looked at, among them those that the certificate needs and the list leaves
            out again. More are refused, by an estimate, before time or memory goes into them. At most 2^31 - 1, by
            default 2^27. Building takes some 40 bytes an image; the reference backend takes 200, and looks at every
            pair of atoms, however far apart.

    Returns:
        ImageList on the device of positions; on the CPU the same for the same geometry, bit for bit. With Triton, a GPU
        is waited for once, for sizes; with `reciprocal` more often.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; for more images than max_images and
            atoms 2^31 cells apart, too.
    """
    positions, lattice = checked_geometry(positions, lattice, ptr)
    ptr = ptr.contiguous()
    a = checks.check_number("decay_min", decay_min)
    tol = checks.check_number("tol", tol, high=1.0)
    logit_range = checks.check_number("logit_range", logit_range, high=MAX_LOGIT_RANGE, closed=True)
    if cutoff is not None:
        cutoff = checks.check_number("cutoff", cutoff)
        if every_pair:
            raise ValueError("every_pair must be False when a cutoff is given: each pair has a cutoff of its own")

    checks.check_integer("max_images", max_images, 1, INT32 - 1)
    if reciprocal and not every_pair:
        raise ValueError("every_pair must be True with reciprocal=True: it is about the sums of pairs")

    smallest = torch.full_like(lattice[:, 0, 0], a)
    slow = crossover(lattice, a, tol) if reciprocal else None
    served = smallest if slow is None else torch.maximum(smallest, slow)
    settings = (served, tol, logit_range, cutoff, every_pair, max_images)
    geometry = Geometry.of(positions, lattice)
    backend = choose_backend("auto", positions.device, "images")
    if backend == "reference":
        images = _build(positions, lattice, ptr, *settings)
    else:
        images = _build_compiled(backend, positions, lattice, ptr, *settings)
    if cutoff is not None:
        return replace(images, geometry=geometry)
    return replace(
        images,
        decay_min=a,
        tol=tol,
        logit_range=logit_range,
        every_pair=every_pair,
        crossover=slow,
        wave_vectors=None if slow is None else slow_wave_vectors(lattice, ptr, slow, tol),
        geometry=geometry,
    )


def _build_compiled(
    backend: str,
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    a: Tensor,
    tol: float,
    logit_range: float,
    cutoff: float | None,
    every_pair: bool,
    max_images: int,
) -> ImageList:
    """`_build` by an operator, with the same result."""
    radius = None if cutoff is None else cutoff + CUTOFF_SLACK
    run = getattr(torch.ops.crystalformer, f"{backend}_images")
    settings = (tol, logit_range, BEYOND, radius, every_pair, max_images)
    row_ptr, col, shift, found, num_pairs = run(positions, lattice, ptr, a, *settings)
    radii = found if cutoff is None else torch.full_like(found, cutoff)
    return ImageList(row_ptr, col, shift, ptr, radii, num_pairs)


def _build(
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    a: Tensor,
    tol: float,
    logit_range: float,
    cutoff: float | None,
    every_pair: bool,
    max_images: int,
) -> ImageList:
    """The list, of checked arguments, not saying yet what it is certified for.

    It is used where no operator implements this. It waits for a GPU five times, for sizes: the number of pairs, of
    points after each of the three axes, and of images kept.
    """
    radius = None if cutoff is None else cutoff + CUTOFF_SLACK
    extent = Extent.of(positions, lattice, ptr, a, tol, logit_range, radius, every_pair, all_pairs=True)
    num_pairs, refused = torch.stack([ptr.diff().square().sum(), extent.refused(max_images)]).tolist()
    if refused:
        extent.refuse(max_images)
    t, q = triangular(lattice)
    row_crystal = crystal_of_atom(ptr, len(positions))
    rotated = torch.einsum("nx,nyx->ny", positions, q[row_crystal])
    pairs = _Pairs(ptr, rotated, t, num_pairs)
    size = ptr.diff().to(positions.dtype)
    slack = torch.full_like(size, tol * BEYOND).log()

    if cutoff is not None:
        outer2 = extent.radius.square()
        pair, n, _ = pairs.images(lambda p: outer2[pairs.crystal(p)])
        return pairs.pack(pair, n, torch.full_like(size, cutoff))

    everyone = torch.arange(pairs.number, device=t.device)
    if every_pair:
        crystal, near2 = pairs.crystal(everyone), pairs.map(pairs.near_image2)
        outer2 = pairs.map(lambda p: tail_radius2(t, a, slack[crystal[p]] - a[crystal[p]] * near2[p], crystal[p]))
        pair, n, d2 = pairs.images(lambda p: outer2[p])
        # A pair's weights are relative to that of its nearest image: far pairs would underflow, and relative to the
        # image at near2, which a skewed cell has far from the nearest, they would overflow.
        nearest2 = torch.full_like(near2, torch.inf).scatter_reduce_(0, pair, d2, "amin")
        decay = a[crystal]
        beyond = torch.exp(slack[crystal] - decay * (near2 - nearest2))
        weight = torch.exp(decay[pair] * (nearest2[pair] - d2))
        chosen = pair_cutoff2(weight, d2, pair, outer2, beyond, tol)
        # The sums of (i,j) and (j,i) are equal up to rounding; the list must be symmetric.
        chosen = torch.maximum(chosen, chosen[pairs.transposed(everyone)])
        longest = torch.zeros_like(size).scatter_reduce_(0, crystal, chosen, "amax").sqrt()
        keep = d2 <= chosen[pair]
    else:
        log_beyond = slack - logit_range - size.log()
        outer2 = tail_radius2(t, a, log_beyond)
        pair, n, d2 = pairs.images(lambda p: outer2[pairs.crystal(p)])
        row = pairs.atoms(everyone)[0]
        weight = torch.exp(-a[pairs.crystal(pair)] * d2)
        chosen = row_cutoff2(weight, d2, pair, row, row_crystal, outer2, log_beyond.exp(), tol, logit_range)
        longest = chosen.sqrt()
        keep = d2 <= chosen[pairs.crystal(pair)]
    kept = keep.nonzero()[:, 0]
    return pairs.pack(pair[kept], n[kept], longest)


class _Pairs:
    """The pairs (i, j) of atoms of one crystal, numbered crystal by crystal, row-major: P = sum_c n_c² of them."""

    def __init__(self, ptr: Tensor, rotated: Tensor, t: Tensor, number: int) -> None:
        self.ptr, self.rotated, self.t, self.number = ptr, rotated, t, number
        self.size = ptr.diff()
        self.first = offsets(self.size.square())

    def crystal(self, pair: Tensor) -> Tensor:
        return torch.searchsorted(self.first, pair, right=True) - 1

    def atoms(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        c = self.crystal(pair)
        local = pair - self.first[c]
        return self.ptr[c] + local // self.size[c], self.ptr[c] + local % self.size[c]

    def transposed(self, pair: Tensor) -> Tensor:
        c = self.crystal(pair)
        local = pair - self.first[c]
        return self.first[c] + (local % self.size[c]) * self.size[c] + local // self.size[c]

    def displacement(self, pair: Tensor) -> Tensor:
        """(.., 3) from atom i to atom j in the rotated frame, Å."""
        i, j = self.atoms(pair)
        return self.rotated[j] - self.rotated[i]

    def near_image2(self, pair: Tensor) -> Tensor:
        """The squared distance of an image near to the nearest one (Babai's nearest plane), Å²."""
        x, t = self.displacement(pair), self.t[self.crystal(pair)]
        for axis in range(3):
            x = x - torch.round(x[:, axis] / t[:, axis, axis])[:, None] * t[:, axis]
        return x.square().sum(1)

    def _batches(self) -> list[Tensor]:
        device = self.ptr.device
        starts = range(0, max(self.number, 1), PAIRS_AT_ONCE)
        return [torch.arange(s, min(s + PAIRS_AT_ONCE, self.number), device=device) for s in starts]

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(pair) of every pair (P), a batch at a time."""
        return torch.cat([function(pair) for pair in self._batches()])

    def images(self, radius2: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """All images with d² <= radius2(pair): pair (M), n (M,3), d² (M), sorted by pair, then n."""
        found = []
        for pair in self._batches():
            sphere, n, d2 = points_in_spheres(self.t, self.crystal(pair), self.displacement(pair), radius2(pair))
            found.append((pair[sphere], n, d2))
        pair, n, d2 = (torch.cat(column) for column in zip(*found, strict=True))
        return pair, n, d2

    def pack(self, pair: Tensor, n: Tensor, cutoff: Tensor) -> ImageList:
        row, col = self.atoms(pair)
        row_ptr = torch.searchsorted(row, torch.arange(len(self.rotated) + 1, device=row.device))
        return ImageList(row_ptr, col.to(torch.int32), n.to(torch.int32), self.ptr, cutoff, self.number)


def checked_geometry(positions: Tensor, lattice: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """The checked geometry in fp64."""
    known: dict[str, int] = {}
    checks.check_tensor("positions", positions, "N 3", known)
    checks.check_dtype("positions", positions, torch.float32, torch.float64)
    checks.check_ptr("ptr", ptr, len(positions))
    known["C"] = len(ptr) - 1
    checks.check_tensor("lattice", lattice, "C 3 3", known, like=positions)
    if ptr.device != positions.device:
        raise ValueError(f"ptr must be on {positions.device}, as positions, not on {ptr.device}")
    check_geometry(positions, lattice)
    return positions.detach().double(), lattice.detach().double()
