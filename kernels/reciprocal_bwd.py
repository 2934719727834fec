"""Backward of reciprocal attention, equation (B12) of docs/math.md.

The row kernel sums dc of row i and writes p and ds of each pair and head, up to the norm of the row, which it knows
last. Another kernel reads them: those of a row for its dq, those of its atoms' columns for dk and dv, so there are no
atomics. For the gradients of positions and lattice the row kernel writes dS, too.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.attention.ops import NAMESPACE

from .device_functions import LOG2E, crystal_of, gather_heads, load_heads, store_heads
from .launch import head_blocks, reciprocal_blocks
from .phases import in_parts, make_phases, of_atoms, padded
from .reciprocal_fwd import CLAMP, atoms_of, clamped, sum_vectors, tile
from .reciprocal_geometry_gradients import geometry_gradients


@triton.jit
def reciprocal_bwd_rows(
    q_p,
    k_p,
    v_p,
    decay_p,
    phase_p,
    vector_p,
    crystal_p,
    ptr_p,
    g_ptr_p,
    atom_ptr_p,
    y_p,
    grad_y_p,
    d_decay_p,
    p_p,
    ds_p,
    d_sum_p,
    norm_p,
    q_scale,
    stride,
    columns,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    GEOMETRY: tl.constexpr,
    ORBITS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    crystal, own, first, last = atoms_of(i, crystal_p, ptr_p, atom_ptr_p, ORBITS)
    number = tl.load(g_ptr_p + crystal + 1) - tl.load(g_ptr_p + crystal)
    c = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * -LOG2E  # [BH], negative
    q = load_heads(q_p, i, h, H, D, BD) * q_scale  # [BH, BD]
    grad_y = load_heads(grad_y_p, i, h, H, DV, BV)  # [BH, BV]
    delta = tl.sum(grad_y * load_heads(y_p, i, h, H, DV, BV), 1)
    # The largest content first, so that all p of the row that are written have one norm.
    top = tl.full((BH,), -1e30, tl.float32)
    for start in range(first, last, BN):
        j, _ = tile(start, last, BN)
        s = tl.sum(gather_heads(k_p + start * (H * D), j, h, H, D, BD) * q[None, :, :], 2)
        top = tl.maximum(top, tl.max(s, 0))
    norm = tl.zeros((BH,), tl.float32)
    d_decay = tl.zeros((BH,), tl.float32)
    for start in range(first, last, BN):
        j, m_j = tile(start, last, BN)
        # gamma - delta of (B4): what p is multiplied with
        weight = tl.sum(gather_heads(v_p + start * (H * DV), j, h, H, DV, BV) * grad_y[None, :, :], 2) - delta[None, :]
        sums, slope = sum_vectors(
            phase_p, vector_p + (4 * crystal + 3) * stride, stride, number, own, start, j, c, BH, BN, BW, True
        )
        k_j = gather_heads(k_p + start * (H * D), j, h, H, D, BD)
        e = tl.exp2(tl.sum(k_j * q[None, :, :], 2) - top[None, :])  # [BN, BH]
        e = tl.where(m_j[:, None], e, 0.0)
        p = e * clamped(sums)
        ds = p * weight
        norm += tl.sum(p, 0)
        # ds / S = e (gamma - delta), and none for a clamped pair
        d_sum = tl.where(sums > CLAMP, e * weight, 0.0)
        d_decay += tl.sum(d_sum * slope, 0)
        m_pair = m_j[:, None] & (h[None, :] < H)
        o_tile = (i * columns + start - first) * H
        o_pair = j[:, None] * H + h[None, :]
        tl.store(p_p + o_tile + o_pair, p, mask=m_pair)
        tl.store(ds_p + o_tile + o_pair, ds, mask=m_pair)
        if GEOMETRY:
            tl.store(d_sum_p + o_tile + o_pair, d_sum, mask=m_pair)
    tl.store(d_decay_p + i * H + h, -d_decay / norm, mask=h < H)
    tl.store(norm_p + i * H + h, norm, mask=h < H)


@triton.jit
def add_column(
    dk, dv, q_p, grad_y_p, p_p, ds_p, norm_p, h, column, first, last, columns, H: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv, with what the rows first to last-1 give to an atom in the place `column` of theirs."""
    for start in range(first, last, BN):
        i, m_i = tile(start, last, BN)
        m_pair = m_i[:, None] & (h[None, :] < H)
        o_tile = (start * columns + column) * H
        o_pair = i[:, None] * (columns * H) + h[None, :]
        inverse = 1 / tl.load(norm_p + start * H + i[:, None] * H + h[None, :], mask=m_pair, other=1.0)  # [BN, BH]
        ds = tl.load(ds_p + o_tile + o_pair, mask=m_pair, other=0.0) * inverse
        p = tl.load(p_p + o_tile + o_pair, mask=m_pair, other=0.0) * inverse
        dk += tl.sum(ds[:, :, None] * gather_heads(q_p + start * (H * D), i, h, H, D, BD), 0)
        dv += tl.sum(p[:, :, None] * gather_heads(grad_y_p + start * (H * DV), i, h, H, DV, BV), 0)
    return dk, dv


@triton.jit
def reciprocal_bwd_sums(
    q_p,
    k_p,
    grad_y_p,
    p_p,
    ds_p,
    norm_p,
    crystal_p,
    ptr_p,
    atom_ptr_p,
    dq_p,
    dk_p,
    dv_p,
    q_scale,
    columns,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    ORBITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    _, first_row, last_row = crystal_of(row, crystal_p, ptr_p)
    _, own, first, last = atoms_of(row, crystal_p, ptr_p, atom_ptr_p, ORBITS)
    dq = tl.zeros((BH, BD), tl.float32)
    for start in range(first, last, BN):
        j, m_j = tile(start, last, BN)
        o_pair = (row * columns + start - first) * H + j[:, None] * H + h[None, :]
        ds = tl.load(ds_p + o_pair, mask=m_j[:, None] & (h[None, :] < H), other=0.0)  # [BN, BH]
        dq += tl.sum(ds[:, :, None] * gather_heads(k_p + start * (H * D), j, h, H, D, BD), 0)
    norm = tl.load(norm_p + row * H + h, mask=h < H, other=1.0)
    store_heads(dq_p, row, h, dq / norm[:, None] * q_scale, H, D, BD)
    dk = tl.zeros((BH, BD), tl.float32)
    dv = tl.zeros((BH, BV), tl.float32)
    if ORBITS:
        for atom in range(own, tl.load(atom_ptr_p + row + 1)):
            dk, dv = add_column(
                dk, dv, q_p, grad_y_p, p_p, ds_p, norm_p, h, atom - first, first_row, last_row, columns, H, D, DV, BD,
                BV, BN,
            )  # fmt: skip
    else:
        dk, dv = add_column(
            dk, dv, q_p, grad_y_p, p_p, ds_p, norm_p, h, own - first, first_row, last_row, columns, H, D, DV, BD, BV,
            BN,
        )  # fmt: skip
    store_heads(dk_p, row, h, dk * q_scale, H, D, BD)
    store_heads(dv_p, row, h, dv, H, DV, BV)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    grad_y: Tensor,
    y: Tensor,
    lattice: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
    geometry: bool,
) -> tuple[Tensor, ...]:
    q, k, v, decay, grad_y, y = (x.contiguous() for x in (q, k, v, decay, grad_y, y))
    dq, dk, dv, d_decay, norm = (torch.empty_like(x) for x in (q, k, v, decay, decay))
    columns = padded(largest[0])
    p, ds, d_sum = (q.new_empty(len(q) if n < 2 or geometry else 0, columns, q.shape[1]) for n in range(3))
    blocks, grid = reciprocal_blocks(q, v) | {"ORBITS": len(largest) > 2}, (len(q), head_blocks(q.shape[1]))
    q_scale = 1 / math.sqrt(q.shape[2])
    x = make_phases(positions, lattice, lists, largest[1])
    k, v = of_atoms(lists, k, v)
    reciprocal_bwd_rows[grid](
        *(q, k, v, decay, *x.read, x.atom_ptr, y, grad_y, d_decay, p, ds, d_sum, norm),
        *(q_scale * math.log2(math.e), x.stride, columns),
        **blocks,
        GEOMETRY=geometry,
    )
    del blocks["BW"]  # whose sums are there
    reciprocal_bwd_sums[grid](
        *(q, k, grad_y, p, ds, norm, x.crystal, x.ptr, x.atom_ptr, dq, dk, dv, q_scale, columns),
        **blocks,
    )
    if not geometry:
        return dq, dk, dv, d_decay, positions.new_empty(0), lattice.new_empty(0)
    return dq, dk, dv, d_decay, *geometry_gradients(positions, decay, x, d_sum, norm)


def reciprocal_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    waves: Tensor,
    largest: Sequence[int],
    y: Tensor,
    geometry: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, decay_reciprocal, positions, lattice: the operator `triton_reciprocal_backward`."""

    if geometry and len(largest) > 2:
        raise ValueError("wave_vectors must be of all atoms, not of orbits, for the gradients of positions and lattice")

    def by_products(*x: Any) -> tuple[Tensor, ...]:
        run = getattr(torch.ops, NAMESPACE).reference_reciprocal_backward
        return run(x[5], *x[:5], *x[7:], x[6], geometry)

    by_row = (q, k, v, decay_reciprocal, positions, grad_y, y)
    with torch.cuda.device_of(q):
        kernels = partial(_backward, geometry=geometry)
        return in_parts(kernels, by_products, by_row, lattice, waves, largest)
