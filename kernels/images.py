"""The image list, as geometry/images.py builds it in PyTorch: one program per atom, in fp64, and one wait for sizes.

`row_cutoffs` finds the cutoff of each row, `list_rows` counts its images and, once the host has fetched their number,
writes them. With every_pair, `list_rows` finds the cutoff of each pair itself, both times: there is no room for one
number a pair before the host knows how many there are. Equation numbers are those of docs/math.md.

A program takes tiles of BJ pairs and BC candidates for their images: all n in the box around the sphere, in the rotated
frame in which T is triangular, so the box is as tight for a skewed cell as for a cubic one. Candidates are made anew in
each pass, so a pass tries the three cutoffs that two bisections may come to.

Distances and sums differ from those of the torch code by rounding, so a cutoff can in principle be another by one step
of the bisection, 1/4096 of the squared outer radius, where the condition holds or fails by no more than that.

(i, j, n) and (j, i, -n) have the same distance bit for bit, because negation commutes with everything on the way from
positions to distances. The cutoff of a pair is found from its lower atom for both, in a box of its own, so that its
sums have one order whatever else is in the tile. So the list is symmetric.
"""

import math
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.common import checks
from crystalformer.common.ragged import crystal_of_atom, offsets
from crystalformer.geometry.lattice import FLATTEST as FLATTEST_CELL
from crystalformer.geometry.lattice import check_geometry
from crystalformer.geometry.limits import Extent
from crystalformer.geometry.truncation import BISECTIONS, SPLITS

from .device_functions import crystal_of
from .launch import image_blocks

PI = tl.constexpr(math.pi)
FIRST_SPLIT, SPLIT_STEP = tl.constexpr(SPLITS[0]), tl.constexpr((SPLITS[1] - SPLITS[0]) / (SPLITS[2] - 1))
LAST_SPLIT, PADDED_SPLITS = tl.constexpr(SPLITS[2] - 1), tl.constexpr(triton.next_power_of_2(SPLITS[2]))
FLATTEST = tl.constexpr(FLATTEST_CELL)
# A pair's candidates are numbered in 32 bits: a division of 64 bits is a subroutine.
MOST_CANDIDATES = tl.constexpr(float(1 << 30))
SHIFTER = tl.constexpr(float(3 << 51))  # added and subtracted, it rounds to an integer


@triton.jit
def cell(lattice_p, c):
    """T and Q of L = T Q, by Gram-Schmidt from the last row up, and whether L is a cell.

    T is (t_00, t_01, t_02, t_11, t_12, t_22), Q three rows [4].
    """
    xyz = tl.arange(0, 4)
    p = lattice_p + c * 9 + xyz
    l_0 = tl.load(p, mask=xyz < 3, other=0.0)
    l_1 = tl.load(p + 3, mask=xyz < 3, other=0.0)
    l_2 = tl.load(p + 6, mask=xyz < 3, other=0.0)
    edges = tl.sqrt(tl.sum(l_0 * l_0)) * tl.sqrt(tl.sum(l_1 * l_1)) * tl.sqrt(tl.sum(l_2 * l_2))
    t_22 = tl.sqrt(tl.sum(l_2 * l_2))
    q_2 = l_2 / t_22
    t_12 = tl.sum(l_1 * q_2)
    l_1 -= t_12 * q_2
    t_11 = tl.sqrt(tl.sum(l_1 * l_1))
    q_1 = l_1 / t_11
    t_02 = tl.sum(l_0 * q_2)
    l_0 -= t_02 * q_2
    t_01 = tl.sum(l_0 * q_1)
    l_0 -= t_01 * q_1
    t_00 = tl.sqrt(tl.sum(l_0 * l_0))
    volume = t_00 * t_11 * t_22
    return (t_00, t_01, t_02, t_11, t_12, t_22), (l_0 / t_00, q_1, q_2), volume > edges * FLATTEST


@triton.jit
def displacements(positions_p, i, j, q):
    """x, y, z [BJ] from atom i to atoms j in the rotated frame."""
    xyz = tl.arange(0, 4)
    q_0, q_1, q_2 = q
    own = tl.load(positions_p + i * 3 + xyz, mask=xyz < 3, other=0.0)
    r = tl.load(positions_p + j[:, None] * 3 + xyz[None, :], mask=(xyz < 3)[None, :], other=0.0) - own[None, :]
    return tl.sum(r * q_0[None, :], 1), tl.sum(r * q_1[None, :], 1), tl.sum(r * q_2[None, :], 1)


@triton.jit
def box_around(radius2, t):
    """The boxes around spheres of squared radii [BJ]: half their width, candidates along the last two axes, and in all.

    No candidates at all where something is not finite or there would be too many, so that every loop ends.
    """
    t_00, _, _, t_11, _, t_22 = t
    # A little wider, so that what an image's own d² admits is never outside by rounding.
    half = tl.sqrt(radius2) * (1 + 1e-9) + 1e-9
    k_0 = tl.floor(2 * half / t_00) + 1
    k_1 = tl.floor(2 * half / t_11) + 1
    k_2 = tl.floor(2 * half / t_22) + 1
    number = k_0 * k_1 * k_2
    known = number < MOST_CANDIDATES
    k_1 = tl.where(known, k_1, 1.0).to(tl.int32)
    k_2 = tl.where(known, k_2, 1.0).to(tl.int32)
    return half, k_1, k_2, tl.where(known, number, 0.0).to(tl.int64)


@triton.jit
def candidates(first, x, y, z, box, t, BC: tl.constexpr):
    """n = (n_0, n_1, n_2) and d² [BJ, BC] of candidates first to first + BC, d² infinite behind the last; n rises."""
    t_00, t_01, t_02, t_11, t_12, t_22 = t
    half, k_1, k_2, number = box
    half, k_1, k_2, number = half[:, None], k_1[:, None], k_2[:, None], number[:, None]
    c = (first + tl.arange(0, BC))[None, :]
    c_32 = c.to(tl.int32)
    row = c_32 // k_2
    n_0 = tl.ceil((-x[:, None] - half) * (1 / t_00)) + (row // k_1).to(tl.float64)
    x = x[:, None] + n_0 * t_00
    y = y[:, None] + n_0 * t_01
    z = z[:, None] + n_0 * t_02
    n_1 = tl.ceil((-y - half) * (1 / t_11)) + (row % k_1).to(tl.float64)
    y += n_1 * t_11
    z += n_1 * t_12
    n_2 = tl.ceil((-z - half) * (1 / t_22)) + (c_32 % k_2).to(tl.float64)
    z += n_2 * t_22
    d2 = x * x + y * y + z * z
    return (n_0, n_1, n_2), tl.where(c < number, d2, float("inf"))


@triton.jit
def tail_bounds(a, t):
    """log B(b) and a - b of equation (10), for all b that are tried."""
    t_00, _, _, t_11, _, t_22 = t
    split = tl.minimum(tl.arange(0, PADDED_SPLITS), LAST_SPLIT).to(tl.float64)
    b = a * (split * SPLIT_STEP + FIRST_SPLIT)
    width = tl.sqrt(1 / b * PI)
    return tl.log(1 + width / t_00) + tl.log(1 + width / t_11) + tl.log(1 + width / t_22), a - b


@triton.jit
def bounded_radius2(slack, bounds):
    """The squared radius beyond which a pair has at most exp(slack), equation (10)."""
    bound, rest = bounds
    return tl.maximum(tl.min((bound - slack) / rest, -1), 0.0)


@triton.jit
def quarters(low, high):
    """The ends of the first three quarters of (low, high], with the bits that two bisections give them."""
    middle = 0.5 * (low + high)
    return 0.5 * (low + middle), middle, 0.5 * (middle + high)


@triton.jit
def quarter_where(low, high, ends, holds):
    """The quarter of (low, high] at whose end a monotone condition holds first; it is known to hold at `high`."""
    end_1, end_2, end_3 = ends
    holds_1, holds_2, holds_3 = holds
    above = tl.where(holds_1, low, tl.where(holds_2, end_1, tl.where(holds_3, end_2, end_3)))
    return above, tl.where(holds_1, end_1, tl.where(holds_2, end_2, tl.where(holds_3, end_3, high)))


@triton.jit
def worst_case(tail, whole, m_j, beyond, tol, spread):
    """g(T_j - tol F_j) [BJ] of equation (12), from the parts [BJ, BC] of both sums."""
    excess = tl.sum(tail, 1) + beyond - tol * tl.sum(whole, 1)
    return tl.where(m_j, tl.where(excess > 0, excess * spread, excess), 0.0)


@triton.jit
def row_cutoffs(
    positions_p,
    lattice_p,
    ptr_p,
    crystal_p,
    decay_p,
    cutoff2_p,
    tol: tl.float64,
    log_beyond: tl.float64,
    logit_range: tl.float64,
    BISECTIONS: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """The squared cutoff of one row: the smallest on its crystal's grid for which equation (12) holds."""
    i = tl.program_id(0).to(tl.int64)
    crystal, begin, end = crystal_of(i, crystal_p, ptr_p)
    a = tl.load(decay_p + crystal)
    t, q, _ = cell(lattice_p, crystal)
    log_beyond = log_beyond - logit_range - tl.log((end - begin).to(tl.float64))
    beyond = tl.exp(log_beyond)
    spread = tl.exp(tl.full((), 0.0, tl.float64) + logit_range)
    outer2 = bounded_radius2(log_beyond, tail_bounds(a, t))
    box = box_around(outer2 + tl.zeros((BJ,), tl.float64), t)
    number = tl.max(box[3], 0)
    low = outer2 * 0.0
    high = outer2
    tl.static_assert(BISECTIONS % 2 == 0)
    for _step in range(BISECTIONS // 2):
        end_1, end_2, end_3 = quarters(low, high)
        excess_1 = tl.zeros((BJ,), tl.float64)
        excess_2 = tl.zeros((BJ,), tl.float64)
        excess_3 = tl.zeros((BJ,), tl.float64)
        for first_j in range(begin, end, BJ):
            j = first_j + tl.arange(0, BJ)
            m_j = j < end
            x, y, z = displacements(positions_p, i, tl.where(m_j, j, i), q)
            whole = tl.zeros((BJ, BC), tl.float64)
            tail_1 = tl.zeros((BJ, BC), tl.float64)
            tail_2 = tl.zeros((BJ, BC), tl.float64)
            tail_3 = tl.zeros((BJ, BC), tl.float64)
            for first in range(0, number, BC):
                _n, d2 = candidates(first, x, y, z, box, t, BC)
                weight = tl.where(d2 <= outer2, tl.exp(-a * d2), 0.0)
                whole += weight
                tail_1 += tl.where(d2 > end_1, weight, 0.0)
                tail_2 += tl.where(d2 > end_2, weight, 0.0)
                tail_3 += tl.where(d2 > end_3, weight, 0.0)
            excess_1 += worst_case(tail_1, whole, m_j, beyond, tol, spread)
            excess_2 += worst_case(tail_2, whole, m_j, beyond, tol, spread)
            excess_3 += worst_case(tail_3, whole, m_j, beyond, tol, spread)
        holds = (tl.sum(excess_1) <= 0, tl.sum(excess_2) <= 0, tl.sum(excess_3) <= 0)
        low, high = quarter_where(low, high, (end_1, end_2, end_3), holds)
    tl.store(cutoff2_p + i, high)


@triton.jit
def pair_cutoffs(x, y, z, a, bounds, t, tol, slack, BISECTIONS: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr):
    """The squared cutoff [BJ] of each pair: the smallest on its grid that leaves at most tol of the pair's own sum."""
    t_00, t_01, t_02, t_11, t_12, t_22 = t
    # An image near to the nearest one (Babai's nearest plane).
    n_0 = (x / t_00 + SHIFTER) - SHIFTER
    n_1 = ((y - n_0 * t_01) / t_11 + SHIFTER) - SHIFTER
    near_x = x - n_0 * t_00
    near_y = y - n_0 * t_01 - n_1 * t_11
    near_z = z - n_0 * t_02 - n_1 * t_12
    n_2 = (near_z / t_22 + SHIFTER) - SHIFTER
    near_z -= n_2 * t_22
    near2 = near_x * near_x + near_y * near_y + near_z * near_z
    outer2 = bounded_radius2((slack - a * near2)[:, None], bounds)
    box = box_around(outer2, t)
    number = tl.max(box[3], 0)
    nearest2 = tl.full((BJ,), float("inf"), tl.float64)
    for first in range(0, number, BC):
        _n, d2 = candidates(first, x, y, z, box, t, BC)
        nearest2 = tl.minimum(nearest2, tl.min(d2, 1))
    # Weights are relative to the nearest image's: far pairs would underflow, and relative to the image at near2, which
    # a skewed cell has far from the nearest, they would overflow.
    beyond = tl.exp(slack - a * (near2 - nearest2))
    low = outer2 * 0.0
    high = outer2
    for _step in range(BISECTIONS // 2):
        end_1, end_2, end_3 = quarters(low, high)
        whole = tl.zeros((BJ, BC), tl.float64)
        tail_1 = tl.zeros((BJ, BC), tl.float64)
        tail_2 = tl.zeros((BJ, BC), tl.float64)
        tail_3 = tl.zeros((BJ, BC), tl.float64)
        for first in range(0, number, BC):
            _n, d2 = candidates(first, x, y, z, box, t, BC)
            weight = tl.where(d2 <= outer2[:, None], tl.exp(a * (nearest2[:, None] - d2)), 0.0)
            whole += weight
            tail_1 += tl.where(d2 > end_1[:, None], weight, 0.0)
            tail_2 += tl.where(d2 > end_2[:, None], weight, 0.0)
            tail_3 += tl.where(d2 > end_3[:, None], weight, 0.0)
        allowed = tol * tl.sum(whole, 1) - beyond
        holds = (tl.sum(tail_1, 1) <= allowed, tl.sum(tail_2, 1) <= allowed, tl.sum(tail_3, 1) <= allowed)
        low, high = quarter_where(low, high, (end_1, end_2, end_3), holds)
    return high


@triton.jit
def list_rows(
    positions_p,
    lattice_p,
    ptr_p,
    crystal_p,
    decay_p,
    cutoff2_p,
    row_p,
    col_p,
    shift_p,
    tol: tl.float64,
    slack: tl.float64,
    EVERY_PAIR: tl.constexpr,
    WRITE: tl.constexpr,
    BISECTIONS: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """One row's number of images, -1 where the geometry is invalid; with WRITE, its images from row_p[i] on, by (j, n).

    cutoff2_p: (C) squared cutoffs; with EVERY_PAIR (N), to which the longest of the row's pairs is written.
    """
    i = tl.program_id(0).to(tl.int64)
    crystal, begin, end = crystal_of(i, crystal_p, ptr_p)
    t, q, sound = cell(lattice_p, crystal)
    if EVERY_PAIR:
        a = tl.load(decay_p + crystal)
        bounds = tail_bounds(a, t)
        longest2 = tl.zeros((BJ,), tl.float64)
    else:
        cutoff2 = tl.load(cutoff2_p + crystal) + tl.zeros((BJ,), tl.float64)
    if WRITE:
        place = tl.load(row_p + i)
        limit = tl.load(row_p + i + 1)  # whatever the two compilations may round differently, no row writes beyond
    else:
        own = tl.load(positions_p + i * 3 + tl.arange(0, 4), mask=tl.arange(0, 4) < 3, other=0.0)
        sound = sound & (tl.sum(own * 0.0) == 0)  # finite
        total = tl.zeros((BJ,), tl.int64)
    for first_j in range(begin, end, BJ):
        j = first_j + tl.arange(0, BJ)
        m_j = j < end
        x, y, z = displacements(positions_p, i, tl.where(m_j, j, i), q)
        if EVERY_PAIR:
            turn = tl.where(j < i, -1.0, 1.0).to(tl.float64)
            cutoff2 = pair_cutoffs(turn * x, turn * y, turn * z, a, bounds, t, tol, slack, BISECTIONS, BJ, BC)
            longest2 = tl.maximum(longest2, tl.where(m_j, cutoff2, 0.0))
        box = box_around(cutoff2, t)
        number = tl.max(box[3], 0)
        kept = tl.zeros((BJ, BC), tl.int64)
        for first in range(0, number, BC):
            _n, d2 = candidates(first, x, y, z, box, t, BC)
            kept += (d2 <= cutoff2[:, None]).to(tl.int64)
        count = tl.where(m_j, tl.sum(kept, 1), 0)
        if WRITE:
            next_place = place + tl.cumsum(count, 0) - count
            for first in range(0, number, BC):
                n, d2 = candidates(first, x, y, z, box, t, BC)
                n_0, n_1, n_2 = n
                keep = (d2 <= cutoff2[:, None]) & m_j[:, None]
                one = keep.to(tl.int64)
                e = next_place[:, None] + tl.cumsum(one, 1) - one
                keep = keep & (e < limit)
                tl.store(col_p + e, tl.broadcast_to(j[:, None], (BJ, BC)).to(tl.int32), mask=keep)
                tl.store(shift_p + e * 3, n_0.to(tl.int32), mask=keep)
                tl.store(shift_p + e * 3 + 1, n_1.to(tl.int32), mask=keep)
                tl.store(shift_p + e * 3 + 2, n_2.to(tl.int32), mask=keep)
                next_place += tl.sum(one, 1)
            place += tl.sum(count, 0)
        else:
            sound = sound & (tl.min(box[3], 0) > 0)
            total += count
    if not WRITE:
        tl.store(row_p + i, tl.where(sound, tl.sum(total, 0), -1))
        if EVERY_PAIR:
            tl.store(cutoff2_p + i, tl.max(longest2, 0))


def build(
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    decay_min: Tensor,
    tol: float,
    logit_range: float,
    beyond: float,
    cutoff: float | None,
    every_pair: bool,
    max_images: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """row_ptr (N+1), col (M), shift (M,3), cutoff (C) and the number of pairs: the operator `triton_images`.

    One host synchronisation, which brings the two sizes and whether all rows had a geometry and not too many images.

    Raises:
        ValueError: for positions or a lattice that are not finite, a cell without a volume, more images than max_images
            or 2^30 of a pair, or atoms 2^31 cells apart.
    """
    atoms, crystals = len(positions), len(lattice)
    crystal = crystal_of_atom(ptr, atoms)
    extent = Extent.of(positions, lattice, ptr, decay_min, tol, logit_range, cutoff, every_pair, all_pairs=False)
    refused = extent.refused(max_images)
    searched = torch.where(refused, 0, ptr)  # to be refused at the one wait, crystals without atoms take no time
    inputs = (positions.contiguous(), lattice.contiguous(), searched, crystal, decay_min)
    sizes = image_blocks(atoms, crystals) | {"BISECTIONS": BISECTIONS}
    slack = math.log(tol * beyond)
    by_row = positions.new_zeros(atoms)

    def longest2() -> Tensor:
        """(C) the largest of the rows of each crystal."""
        return positions.new_zeros(crystals).scatter_reduce_(0, crystal, by_row, "amax")

    with torch.cuda.device_of(positions):
        if cutoff is not None:
            cutoff2 = positions.new_full((crystals,), cutoff**2)
        elif every_pair:
            cutoff2 = by_row
        else:
            row_cutoffs[(atoms,)](*inputs, by_row, tol, slack, logit_range, **sizes)
            cutoff2 = longest2()
        count, none = ptr.new_zeros(atoms), ptr.new_empty(0, dtype=torch.int32)
        settings = {"EVERY_PAIR": every_pair, **sizes}
        list_rows[(atoms,)](*inputs, cutoff2, count, none, none, tol, slack, WRITE=False, **settings)
        row_ptr = offsets(count)
        told = [(count < 0).any() | refused, row_ptr[-1], ptr.diff().square().sum()]
        bad, number, num_pairs = torch.stack(told).tolist()
        if bad:
            _refuse(positions, lattice, extent, max_images)
        col, shift = ptr.new_zeros(number, dtype=torch.int32), ptr.new_zeros(number, 3, dtype=torch.int32)
        list_rows[(atoms,)](*inputs, cutoff2, row_ptr, col, shift, tol, slack, WRITE=True, **settings)
        return row_ptr, col, shift, (longest2() if every_pair else cutoff2).sqrt(), num_pairs


def _refuse(positions: Tensor, lattice: Tensor, extent: Extent, max_images: int) -> NoReturn:
    """Raises the error of the usual checks for an invalid geometry. It may wait for the GPU: the call fails anyway."""
    with checks.debug_checks(True):
        check_geometry(positions, lattice)
    if bool(extent.refused(max_images)):
        extent.refuse(max_images)
    raise ValueError("a pair of atoms must have fewer than 2^30 images: use a shorter cutoff, or a larger decay_min")
