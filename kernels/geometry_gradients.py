"""Gradients of positions and lattice from the force f_e of each image: dr_e = f_e r_e.  Equations (B9) and (B10)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.common.ragged import crystal_of_atom
from crystalformer.geometry.image_list import ImageList

from .launch import power_of_2
from .layout import Layout


@triton.jit
def geometry_rows(
    positions_p,
    lattice_p,
    crystal_p,
    row_p,
    col_p,
    shift_p,
    place_p,
    mirror_p,
    force_p,
    d_positions_p,
    d_cell_p,
    HEAD_BLOCKS: tl.constexpr,
    BE: tl.constexpr,
):
    """Of one atom: dp = -sum_e (f_e + f_mirror) r_e, and its share sum_e n ⊗ f_e r_e of dL."""
    i = tl.program_id(0).to(tl.int64)
    xyz = tl.arange(0, 4)
    m_xyz = xyz < 3
    e = tl.arange(0, BE)
    cell_p = lattice_p + tl.load(crystal_p + i) * 9
    last = tl.load(row_p + i + 1)
    own = tl.load(positions_p + i * 3 + xyz, mask=m_xyz, other=0.0)
    l_0 = tl.load(cell_p + xyz, mask=m_xyz, other=0.0)
    l_1 = tl.load(cell_p + 3 + xyz, mask=m_xyz, other=0.0)
    l_2 = tl.load(cell_p + 6 + xyz, mask=m_xyz, other=0.0)
    d_position = tl.zeros((BE, 4), tl.float32)
    d_0 = tl.zeros((BE, 4), tl.float32)
    d_1 = tl.zeros((BE, 4), tl.float32)
    d_2 = tl.zeros((BE, 4), tl.float32)
    for start in range(tl.load(row_p + i), last, BE):
        at = start + e
        m_e = at < last
        j = tl.load(col_p + at, mask=m_e, other=0).to(tl.int64)
        n_0 = tl.load(shift_p + at * 3, mask=m_e, other=0).to(tl.float32)[:, None]
        n_1 = tl.load(shift_p + at * 3 + 1, mask=m_e, other=0).to(tl.float32)[:, None]
        n_2 = tl.load(shift_p + at * 3 + 2, mask=m_e, other=0).to(tl.float32)[:, None]
        place = tl.load(place_p + at, mask=m_e, other=0).to(tl.int64)
        mirror = tl.load(mirror_p + at, mask=m_e, other=0).to(tl.int64)
        f = tl.zeros((BE,), tl.float32)
        f_mirror = tl.zeros((BE,), tl.float32)
        for block in tl.static_range(HEAD_BLOCKS):
            f += tl.load(force_p + place * HEAD_BLOCKS + block, mask=m_e, other=0.0)
            f_mirror += tl.load(force_p + mirror * HEAD_BLOCKS + block, mask=m_e, other=0.0)
        f, f_mirror = f[:, None], f_mirror[:, None]
        m_j = m_e[:, None] & m_xyz[None, :]
        r = tl.load(positions_p + j[:, None] * 3 + xyz[None, :], mask=m_j, other=0.0) - own[None, :]
        r += n_0 * l_0[None, :] + n_1 * l_1[None, :] + n_2 * l_2[None, :]  # [BE, 4]
        d_position -= (f + f_mirror) * r
        d_0 += n_0 * f * r
        d_1 += n_1 * f * r
        d_2 += n_2 * f * r
    tl.store(d_positions_p + i * 3 + xyz, tl.sum(d_position, 0), mask=m_xyz)
    tl.store(d_cell_p + i * 9 + xyz, tl.sum(d_0, 0), mask=m_xyz)
    tl.store(d_cell_p + i * 9 + 3 + xyz, tl.sum(d_1, 0), mask=m_xyz)
    tl.store(d_cell_p + i * 9 + 6 + xyz, tl.sum(d_2, 0), mask=m_xyz)


@triton.jit
def segment_sums(x_p, first_p, sum_p, W: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr):
    """Of one segment: the sum of rows first[s] to first[s+1] of x (n,W), always in the same order."""
    s = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BW)
    last = tl.load(first_p + s + 1)
    total = tl.zeros((BN, BW), tl.float32)
    for start in range(tl.load(first_p + s), last, BN):
        i = start + tl.arange(0, BN)
        m_x = (i < last)[:, None] & (w < W)[None, :]
        total += tl.load(x_p + i[:, None] * W + w[None, :], mask=m_x, other=0.0)
    tl.store(sum_p + s * W + w, tl.sum(total, 0), mask=w < W)


def sum_segments(x: Tensor, first: Tensor) -> Tensor:
    """(S,W) sums of the rows first[s] to first[s+1] of x (n,W), the same bits every time."""
    total = x.new_empty(len(first) - 1, x.shape[1])
    block = power_of_2(x.shape[1])
    segment_sums[(len(total),)](x, first, total, W=x.shape[1], BW=block, BN=32, num_warps=1)
    return total


def spread(force: Tensor, positions: Tensor, lattice: Tensor, images: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The gradients of positions and lattice, from f (T·G·BG, head blocks) at the places of a layout."""
    found = ImageList.views(images, len(positions), len(lattice))
    positions, lattice = positions.contiguous(), lattice.contiguous()
    crystal = crystal_of_atom(found.ptr, len(positions))
    d_positions, d_cell = torch.empty_like(positions), positions.new_empty(len(positions), 9)
    geometry_rows[(len(positions),)](
        positions, lattice, crystal, found.row_ptr, found.col, found.shift, layout.place, layout.mirror, force,
        d_positions, d_cell,
        HEAD_BLOCKS=force.shape[1], BE=32, num_warps=1,
    )  # fmt: skip
    return d_positions, sum_segments(d_cell, found.ptr).view_as(lattice)
