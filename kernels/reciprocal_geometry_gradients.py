"""Gradients of positions and lattice of reciprocal attention, from dS of each pair and head.  Equation (B12).

cos(G·r_ij) depends on r_ij, exp(-c_i |G|²) on |G|², so a pair has the force F_ij = sum_G M_ijG sin(G·r_ij) G, with
M_ijG = sum_h w_i(G) dS_ij, and the row the tensor T_i = sum_G dG ⊗ G, with which dL = -L^-T sum_i T_i.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_functions import LN2, LOG2E, crystal_of, dot
from .geometry_gradients import sum_segments
from .launch import reciprocal_geometry_blocks
from .phases import Phases
from .reciprocal_fwd import tile


@triton.jit
def reciprocal_forces(
    positions_p,
    decay_p,
    phase_p,
    vector_p,
    crystal_p,
    ptr_p,
    g_ptr_p,
    d_sum_p,
    norm_p,
    force_p,
    tensor_p,
    stride,
    columns,
    H: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Of one atom i: F_ij of each pair, and T_i."""
    i = tl.program_id(0).to(tl.int64)
    crystal, first, last = crystal_of(i, crystal_p, ptr_p)
    number = tl.load(g_ptr_p + crystal + 1) - tl.load(g_ptr_p + crystal)
    own_p = phase_p + (2 * i) * stride
    own_x = tl.load(positions_p + i * 3)
    own_y = tl.load(positions_p + i * 3 + 1)
    own_z = tl.load(positions_p + i * 3 + 2)
    # T: what comes through r is not symmetric, what comes through |G|² is.
    xx = tl.zeros((BW,), tl.float32)
    xy = tl.zeros((BW,), tl.float32)
    xz = tl.zeros((BW,), tl.float32)
    yy = tl.zeros((BW,), tl.float32)
    yz = tl.zeros((BW,), tl.float32)
    zz = tl.zeros((BW,), tl.float32)
    b = tl.arange(0, 4)
    r_x = tl.zeros((4,), tl.float32)
    r_y = tl.zeros((4,), tl.float32)
    r_z = tl.zeros((4,), tl.float32)
    for start in range(first, last, BN):
        j, m_j = tile(start, last, BN)
        row_p = phase_p + (2 * start) * stride
        o_row = j[:, None] * (2 * stride) + tl.arange(0, BW)[None, :]
        f_x = tl.zeros((BN, BW), tl.float32)
        f_y = tl.zeros((BN, BW), tl.float32)
        f_z = tl.zeros((BN, BW), tl.float32)
        for first_h in range(0, H, BH):
            h = first_h + tl.arange(0, BH)
            m_pair = m_j[:, None] & (h[None, :] < H)
            c = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * -LOG2E  # [BH], negative
            inverse = 1 / tl.load(norm_p + i * H + h, mask=h < H, other=1.0)
            o_tile = (i * columns + start - first) * H
            d_sum = tl.load(d_sum_p + o_tile + j[:, None] * H + h[None, :], mask=m_pair, other=0.0)
            d_sum *= inverse[None, :]  # [BN, BH]
            for first_g in range(0, number, BW):
                g = first_g + tl.arange(0, BW)
                cos = tl.load(own_p + g)[None, :]
                sin = tl.load(own_p + stride + g)[None, :]
                cos_j = tl.load(row_p + first_g + o_row)
                sin_j = tl.load(row_p + first_g + stride + o_row)
                g_p = vector_p + (4 * crystal) * stride + g
                g_x = tl.load(g_p)
                g_y = tl.load(g_p + stride)
                g_z = tl.load(g_p + 2 * stride)
                w = tl.exp2(c[:, None] * tl.load(g_p + 3 * stride)[None, :])  # [BH, BW]
                m = dot(d_sum, w, False) * (sin_j * cos - cos_j * sin)  # [BN, BW]
                f_x += m * g_x[None, :]
                f_y += m * g_y[None, :]
                f_z += m * g_z[None, :]
                d_length2 = tl.sum(dot(d_sum * c[None, :], w, False) * (cos_j * cos + sin_j * sin), 0)
                xx += d_length2 * g_x * g_x
                xy += d_length2 * g_x * g_y
                xz += d_length2 * g_x * g_z
                yy += d_length2 * g_y * g_y
                yz += d_length2 * g_y * g_z
                zz += d_length2 * g_z * g_z
        # Twice, for G and -G; that of G = 0 has no force.
        force = tl.where(b[None, :] == 0, tl.sum(f_x, 1)[:, None], 0.0)
        force += tl.where(b[None, :] == 1, tl.sum(f_y, 1)[:, None], 0.0)
        force += tl.where(b[None, :] == 2, tl.sum(f_z, 1)[:, None], 0.0)
        force *= 2.0  # [BN, 4]
        m_force = m_j[:, None] & (b < 3)[None, :]
        tl.store(force_p + (i * columns + start - first) * 3 + j[:, None] * 3 + b[None, :], force, mask=m_force)
        p_p = positions_p + start * 3 + j * 3
        force = tl.where(m_force, force, 0.0)
        r_x -= tl.sum((tl.load(p_p) - own_x)[:, None] * force, 0)
        r_y -= tl.sum((tl.load(p_p + 1) - own_y)[:, None] * force, 0)
        r_z -= tl.sum((tl.load(p_p + 2) - own_z)[:, None] * force, 0)
    # d|G|² is -sum_hj c w dS cos(G·r), with c in units of log 2 and the other sign here; G and -G, and 2 G = d|G|²/dG
    twice = 4 * LN2
    x_y = tl.sum(xy) * twice
    x_z = tl.sum(xz) * twice
    y_z = tl.sum(yz) * twice
    r_x += tl.where(b == 0, tl.sum(xx) * twice, tl.where(b == 1, x_y, x_z))
    r_y += tl.where(b == 0, x_y, tl.where(b == 1, tl.sum(yy) * twice, y_z))
    r_z += tl.where(b == 0, x_z, tl.where(b == 1, y_z, tl.sum(zz) * twice))
    tl.store(tensor_p + i * 9 + b, r_x, mask=b < 3)
    tl.store(tensor_p + i * 9 + 3 + b, r_y, mask=b < 3)
    tl.store(tensor_p + i * 9 + 6 + b, r_z, mask=b < 3)


@triton.jit
def reciprocal_positions(force_p, crystal_p, ptr_p, d_positions_p, columns, BN: tl.constexpr):
    """Of one atom: dp_i = sum_j F_ij - F_ji."""
    i = tl.program_id(0).to(tl.int64)
    xyz = tl.arange(0, 4)[None, :]
    _, first, last = crystal_of(i, crystal_p, ptr_p)
    total = tl.zeros((BN, 4), tl.float32)
    for start in range(first, last, BN):
        j, m_j = tile(start, last, BN)
        m_force = m_j[:, None] & (xyz < 3)
        row_p = force_p + (i * columns + start - first) * 3
        column_p = force_p + (start * columns + i - first) * 3
        total += tl.load(row_p + j[:, None] * 3 + xyz, mask=m_force, other=0.0)
        total -= tl.load(column_p + j[:, None] * (columns * 3) + xyz, mask=m_force, other=0.0)
    xyz = tl.arange(0, 4)
    tl.store(d_positions_p + i * 3 + xyz, tl.sum(total, 0), mask=xyz < 3)


def geometry_gradients(
    positions: Tensor, decay: Tensor, x: Phases, d_sum: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of positions and lattice, from dS (N,columns,H) up to the norm (N,H) of each row."""
    columns, positions = d_sum.shape[1], positions.contiguous()
    force, tensor = positions.new_empty(len(positions), columns, 3), positions.new_empty(len(positions), 9)
    d_positions = torch.empty_like(positions)
    inputs = (positions, decay, *x.read, d_sum, norm)
    grid = (len(positions),)
    reciprocal_forces[grid](*inputs, force, tensor, x.stride, columns, **reciprocal_geometry_blocks(decay))
    reciprocal_positions[grid](force, x.crystal, x.ptr, d_positions, columns, BN=32, num_warps=1)
    total = sum_segments(tensor, x.ptr).view_as(x.inverse)
    return d_positions, -(x.inverse[..., None] * total[:, None]).sum(2)
