"""Backward of infinitely connected attention, equations (B1) to (B8) and (B10) of docs/math.md.

The row kernel goes over the tiles of atom i once more, with p = exp(s - lse): it sums dq and da, and writes what each
group adds to its pair, the sums of p and ds. The column kernel gathers these of the mirror images, which are in row j
in the same groups, and so sums dk and dv of atom j without atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.attention.ops import without_autocast
from crystalformer.attention.settings import Settings
from crystalformer.geometry.image_list import ImageList

from .device_functions import LOG2E, basis, dot, gather_heads, load_columns, load_heads, store_heads
from .geometry_gradients import spread
from .launch import column_blocks, head_blocks, row_blocks
from .layout import scale, unpack


@triton.jit
def attention_bwd_rows(
    q_p,
    k_p,
    v_p,
    decay_p,
    y_p,
    lse_p,
    grad_y_p,
    grad_lse_p,
    grad_c_p,
    tile_p,
    first_p,
    mu_p,
    dq_p,
    d_decay_p,
    p_group_p,
    ds_group_p,
    force_p,
    q_scale,
    decay_scale,
    force_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BU: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TF32: tl.constexpr,
):
    BE: tl.constexpr = G * BG
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    bg = tl.arange(0, BG)
    g = tl.arange(0, G)
    q = load_heads(q_p, i, h, H, D, BD) * q_scale  # [BH, BD]
    a = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * decay_scale  # [BH], negative
    lse = tl.load(lse_p + i * H + h, mask=h < H, other=0.0) * LOG2E
    grad_y = load_heads(grad_y_p, i, h, H, DV, BV)  # [BH, BV]
    delta = tl.sum(grad_y * load_heads(y_p, i, h, H, DV, BV), 1)
    delta -= tl.load(grad_lse_p + i * H + h, mask=h < H, other=0.0)
    if K > 0:
        for o_k in tl.static_range(0, K, BU):
            k = o_k + tl.arange(0, BU)
            mu = tl.load(mu_p + k)
            u = load_columns(grad_c_p, i, h, k, H, K)  # [BU, BH]
    dq = tl.zeros((BG, BH, BD), tl.float32)
    d_decay = tl.zeros((BG, BH), tl.float32)
    first = tl.load(first_p + i).to(tl.int64)
    for t in range(first, tl.load(first_p + i + 1).to(tl.int64)):
        record_p = tile_p + t * (BG * (2 + 2 * G))
        j = tl.load(record_p + bg).to(tl.int64)  # [BG]
        o_shell = g[:, None] * BG + bg[None, :]
        x = tl.load(record_p + 2 * BG + o_shell).to(tl.float32, bitcast=True)  # [G, BG]
        log_count = tl.load(record_p + (2 + G) * BG + o_shell).to(tl.float32, bitcast=True)
        k_j = gather_heads(k_p, j, h, H, D, BD)
        s = tl.sum(k_j * q[None, :, :], 2) - lse[None, :]  # [BG, BH]
        # gamma - delta of (B4): what p is multiplied with
        weight = tl.sum(gather_heads(v_p, j, h, H, DV, BV) * grad_y[None, :, :], 2) - delta[None, :]  # [BG, BH]
        x2 = x * x
        p = tl.exp2(s[None, :, :] + (a[None, None, :] * x2[:, :, None] + log_count[:, :, None]))  # [G, BG, BH]
        weight = tl.broadcast_to(weight[None, :, :], (G, BG, BH))
        if K > 0:
            weight = tl.reshape(weight, (BE, BH))
            slope = tl.zeros((BE, BH), tl.float32)
            for start in range(0, K, BU):
                if K > BU:  # too many for the registers: read again for each tile
                    k = start + tl.arange(0, BU)
                    mu = tl.load(mu_p + k)
                    u = load_columns(grad_c_p, i, h, k, H, K)
                b, from_center = basis(tl.reshape(x, (BE,))[:, None], mu[None, :])  # [BE, BU]
                weight += dot(b, u, TF32)
                if GEOMETRY:
                    slope += dot(b * from_center, u, TF32)
            weight = tl.reshape(weight, (G, BG, BH))
        ds = p * weight
        ds_group = tl.sum(ds, 0)  # [BG, BH]
        dq += ds_group[:, :, None] * k_j
        d_decay += tl.sum(ds * x2[:, :, None], 0)
        o_group = (t * BG + bg[:, None]) * H + h[None, :]
        tl.store(p_group_p + o_group, tl.sum(p, 0), mask=h[None, :] < H)
        tl.store(ds_group_p + o_group, ds_group, mask=h[None, :] < H)
        if GEOMETRY:
            # f = dd_e / d_e of (B8), of each of the shell's images: the gradient of r_e is f r_e. No force between an
            # atom and itself, where x = 0.
            force = tl.sum(ds * a[None, None, :], 2)  # [G, BG]
            if K > 0:
                slope = tl.sum(p * tl.reshape(slope, (G, BG, BH)), 2)
                force -= tl.where(x > 0, slope / tl.where(x > 0, x, 1.0), 0.0)
            o_force = (t * BE + o_shell) * tl.num_programs(1) + tl.program_id(1)
            tl.store(force_p + o_force, force * force_scale * tl.exp2(-log_count))
    store_heads(dq_p, i, h, tl.sum(dq, 0) * (q_scale / LOG2E), H, D, BD)
    tl.store(d_decay_p + i * H + h, tl.sum(d_decay, 0) * (decay_scale / LOG2E), mask=h < H)


@triton.jit
def attention_bwd_columns(
    q_p,
    grad_y_p,
    p_group_p,
    ds_group_p,
    tile_p,
    first_p,
    dk_p,
    dv_p,
    q_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    bg = tl.arange(0, BG)
    dk = tl.zeros((BG, BH, BD), tl.float32)
    dv = tl.zeros((BG, BH, BV), tl.float32)
    first = tl.load(first_p + j).to(tl.int64)
    for t in range(first, tl.load(first_p + j + 1).to(tl.int64)):
        record_p = tile_p + t * (BG * (2 + 2 * G))
        i = tl.load(record_p + bg).to(tl.int64)  # [BG]
        mirror = tl.load(record_p + BG + bg).to(tl.int64)
        o_group = mirror[:, None] * H + h[None, :]
        m_group = (mirror[:, None] >= 0) & (h[None, :] < H)
        ds = tl.load(ds_group_p + o_group, mask=m_group, other=0.0)  # [BG, BH]
        p = tl.load(p_group_p + o_group, mask=m_group, other=0.0)
        dk += ds[:, :, None] * gather_heads(q_p, i, h, H, D, BD)
        dv += p[:, :, None] * gather_heads(grad_y_p, i, h, H, DV, BV)
    store_heads(dk_p, j, h, tl.sum(dk, 0) * q_scale, H, D, BD)
    store_heads(dv_p, j, h, tl.sum(dv, 0), H, DV, BV)


def attention_backward(
    grad_y: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    edge_weight: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: Tensor,
    layout: Tensor,
    settings: list[float],
    y: Tensor,
    lse: Tensor,
    c: Tensor,
    geometry: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, decay, edge_weight, positions and lattice: the operator `triton_attention_backward`."""
    num, told = edge_weight.shape[2], Settings.read(settings)
    q, k, v, decay, grad_y, grad_lse, y, lse = (x.contiguous() for x in (q, k, v, decay, grad_y, grad_lse, y, lse))
    tiles = unpack(layout, len(q), ImageList.length(images, len(q), len(lattice)), num)
    group, groups = tiles.shape
    grid = (len(q), head_blocks(q.shape[1]))
    dq, dk, dv, d_decay = (torch.empty_like(x) for x in (q, k, v, decay))
    p_group, ds_group = decay.new_empty(2, len(tiles.records) * groups, q.shape[1])
    force = decay.new_empty(len(tiles.records) * group * groups if geometry else 0, grid[1])
    x_scale, log2e = scale(num, told), math.log2(math.e)
    q_scale = 1 / math.sqrt(q.shape[2])
    results = (dq, d_decay, p_group, ds_group, force)
    scales = (q_scale * log2e, -log2e / x_scale**2, 2 * x_scale**2 / log2e)
    with torch.cuda.device_of(q), without_autocast(q):
        grad_c = torch.einsum("hdk,nhd->nhk", edge_weight, grad_y).contiguous()
        d_edge_weight = torch.einsum("nhd,nhk->hdk", grad_y, c)
        inputs = (q, k, v, decay, y, lse, grad_y, grad_lse, grad_c, tiles.records, tiles.first, tiles.mu)
        blocks = row_blocks(q, v, num, tiles.shape, geometry)
        attention_bwd_rows[grid](*inputs, *results, *scales, **blocks, TF32=bool(told.tf32))
        attention_bwd_columns[grid](
            *(q, grad_y, p_group, ds_group, tiles.records, tiles.first, dk, dv),
            q_scale,
            **column_blocks(q, v, tiles.shape),
        )
        if not geometry:
            return dq, dk, dv, d_decay, d_edge_weight, positions.new_empty(0), lattice.new_empty(0)
        return dq, dk, dv, d_decay, d_edge_weight, *spread(force, positions, lattice, images, tiles)
