"""The images of orbits: one row for each orbit, and in it one entry for all images of an orbit at one distance."""

from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.backends import choose_backend
from ..common.ragged import crystal_of_atom, offsets
from .image_list import ImageList
from .images import build_images, checked_geometry
from .limits import INT32, MAX_IMAGES
from .movement import Geometry
from .orbits import SYMMETRY_TOL
from .truncation import BEYOND, MAX_LOGIT_RANGE

SCHEMA = (
    "(Tensor positions, Tensor lattice, Tensor ptr, Tensor orbit, Tensor orbit_ptr, Tensor decay_min, float tol, "
    "float logit_range, float beyond, float? cutoff, bool every_pair, int max_images, float spread) -> "
    "(Tensor row_ptr, Tensor col, Tensor distance, Tensor count, Tensor cutoff)"
)

torch.library.define("crystalformer::cpu_orbit_images", SCHEMA)  # implemented in csrc/bindings_images.cpp


@torch.library.register_fake("crystalformer::cpu_orbit_images")
def _(positions: Tensor, lattice: Tensor, *_: Any) -> tuple[Tensor, ...]:
    entries, orbits = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        positions.new_empty(orbits, dtype=torch.int64),
        positions.new_empty(entries, dtype=torch.int32),
        positions.new_empty(entries),
        positions.new_empty(entries, dtype=torch.float32),
        lattice.new_empty(len(lattice)),
    )


@torch.inference_mode(False)  # the list outlives this call, and may be saved for a backward
@torch.no_grad()
def build_orbit_images(
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    orbit: Tensor,
    decay_min: float = 0.1275,
    tol: float = 1e-6,
    logit_range: float = 4.0,
    every_pair: bool = False,
    max_images: int = MAX_IMAGES,
    symmetry_tol: float = SYMMETRY_TOL,
) -> ImageList:
    """`build_images` for features that are equal on equivalent atoms: one row for each orbit, the same sums.

    An atom of orbit I sees m images of atoms of orbit J at the distance d; they have one score and one b(d), so they
    are one entry (I, J, d, m), whose weight is m exp(s). Equation (19) of docs/math.md. The list is certified as that
    of all atoms is, and where it is not compiled, up to images that `symmetry_tol` puts on either side of the cutoff.

    Args:
        positions, lattice, ptr: the crystals, best their primitive cells, as for `build_images`.
        orbit: (N) int64, the orbit of each atom, as `Orbits.orbit`, numbered over the whole batch: rising from crystal
            to crystal, no number left out.
        decay_min, tol, logit_range, every_pair, max_images: as for `build_images`.
        symmetry_tol: Å, how much distances of one entry may differ, at least 1e-9: what the orbits were found within.

    Returns:
        ImageList with `distance` and `repeats`. Ops take it with one row for each orbit in q, k, v and decay, and in
        positions the first atom of each; they have no gradients of positions and lattice then.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    positions, lattice = checked_geometry(positions, lattice, ptr)
    ptr = ptr.contiguous()
    orbit_ptr, first = _check_orbits(orbit, ptr)
    a = checks.check_number("decay_min", decay_min)
    tol = checks.check_number("tol", tol, high=1.0)
    logit_range = checks.check_number("logit_range", logit_range, high=MAX_LOGIT_RANGE, closed=True)
    checks.check_integer("max_images", max_images, 1, INT32 - 1)
    # Means of equal numbers round, and must not reach the next entry.
    symmetry_tol = max(checks.check_number("symmetry_tol", symmetry_tol, closed=True), 1e-9)
    if choose_backend("auto", positions.device, "images") == "cpu":
        smallest = torch.full_like(lattice[:, 0, 0], a)
        settings = (smallest, tol, logit_range, BEYOND, None, every_pair, max_images, symmetry_tol)
        run = torch.ops.crystalformer.cpu_orbit_images
        row_ptr, col, distance, count, cutoff = run(positions, lattice, ptr, orbit.contiguous(), orbit_ptr, *settings)
    else:
        images = build_images(positions, lattice, ptr, a, tol, logit_range, None, every_pair, False, max_images)
        row_ptr, col, distance, count = merge(images, positions, lattice, orbit, first, symmetry_tol)
        cutoff = images.cutoff
    return ImageList(
        row_ptr,
        col,
        col.new_empty(0, 3),
        orbit_ptr,
        cutoff,
        int(orbit_ptr.diff().square().sum()),
        decay_min=a,
        tol=tol,
        logit_range=logit_range,
        every_pair=every_pair,
        geometry=Geometry.of(positions[first], lattice),
        distance=distance,
        repeats=count,
    )


def _check_orbits(orbit: Any, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Where the orbits of each crystal begin (C+1), and the first atom of each orbit."""
    checks.check_tensor("orbit", orbit, "N", {"N": int(ptr[-1])})
    checks.check_dtype("orbit", orbit, torch.int64)
    checks.check_device("orbit", orbit, like=ptr)
    kinds, atom = torch.unique(orbit, return_inverse=True)
    first = torch.full_like(kinds, len(orbit)).scatter_reduce_(
        0, atom, torch.arange(len(orbit), device=ptr.device), "amin"
    )
    crystal = crystal_of_atom(ptr, len(orbit))
    of_orbit = crystal[first]
    numbered = torch.equal(kinds, torch.arange(len(kinds), device=ptr.device))
    if not numbered or not torch.equal(of_orbit[atom], crystal) or bool((of_orbit.diff() < 0).any()):
        raise ValueError(f"orbit must be numbered 0, 1, 2, ... from crystal to crystal, but it is {orbit.tolist()}")
    return offsets(torch.bincount(of_orbit, minlength=len(ptr) - 1)), first


def merge(
    images: ImageList, positions: Tensor, lattice: Tensor, orbit: Tensor, first: Tensor, spread: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_ptr, col, distance and count of orbits, of all images of the crystals' atoms.

    n_I m(I,J,d) = n_J m(J,I,d) for orbits of n_I and n_J atoms, so the entries of (J,I) are made of those of (I,J): the
    same distances, in the same order, however the positions are rounded.
    """
    number, size = len(first), torch.bincount(orbit, minlength=len(first))
    row = torch.repeat_interleave(images.row_ptr.diff(), output_size=images.num_images)
    chosen = ((first[orbit[row]] == row) & (orbit[row] <= orbit[images.col.long()])).nonzero()[:, 0]
    i, j = row[chosen], images.col[chosen].long()
    cell = lattice[crystal_of_atom(images.ptr, images.num_atoms)[i]]
    r = positions[j] - positions[i] + (images.shift[chosen].to(positions.dtype)[:, None] @ cell)[:, 0]
    d = r.square().sum(1).sqrt()
    pair = orbit[i] * number + orbit[j]
    order = torch.argsort(d)
    order = order[torch.argsort(pair[order], stable=True)]
    d, pair = d[order], pair[order]
    start = _starts(pair, d, spread)
    entry = start.cumsum(0) - 1
    pair, count = pair[start], torch.bincount(entry).to(d.dtype)
    distance = torch.zeros_like(count).index_add_(0, entry, d) / count
    row, col = pair // number, pair % number
    off = (row != col).nonzero()[:, 0]
    transposed = count[off] * size[row[off]] / size[col[off]]
    row, col = torch.cat((row, col[off])), torch.cat((col, row[off]))
    distance, count = torch.cat((distance, distance[off])), torch.cat((count, transposed))
    order = torch.argsort(row * number + col, stable=True)
    row_ptr = offsets(torch.bincount(row, minlength=number))
    return row_ptr, col[order].to(torch.int32), distance[order], count[order].float()


def _starts(pair: Tensor, d: Tensor, spread: float) -> Tensor:
    """(M) which of the sorted distances begin an entry: it has those of a pair within `spread` of its first."""
    place = torch.arange(len(d), device=d.device)
    start = torch.ones_like(pair, dtype=torch.bool)
    start[1:] = (pair[1:] != pair[:-1]) | (d[1:] - d[:-1] > spread)
    while True:
        far = d - d[torch.where(start, place, 0).cummax(0).values] > spread
        if not bool(far.any()):
            return start
        start |= far & ~far.roll(1)
