"""Forward of infinitely connected attention: one program per atom, one pass over its tiles, online softmax.

Equations (2) to (5) of docs/math.md. Nothing of the images leaves the registers: k_j and v_j are gathered once a group,
and the sum c = sum_e p_e b(d_e) is a matrix product of b [BK, BE] and p [BE, BH]. W c is a library product.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.attention.ops import without_autocast
from crystalformer.attention.settings import Settings
from crystalformer.geometry.image_list import ImageList

from .device_functions import LN2, basis, dot, gather_heads, load_heads, store_heads
from .launch import forward_blocks, head_blocks
from .layout import scale, unpack


@triton.jit
def attention_fwd(
    q_p,
    k_p,
    v_p,
    decay_p,
    tile_p,
    first_p,
    mu_p,
    o_p,
    lse_p,
    c_p,
    q_scale,
    decay_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    TF32: tl.constexpr,
):
    BE: tl.constexpr = G * BG
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    bg = tl.arange(0, BG)
    g = tl.arange(0, G)
    q = load_heads(q_p, i, h, H, D, BD) * q_scale  # [BH, BD]
    a = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * decay_scale  # [BH], negative
    top = tl.full((BH,), -1e30, tl.float32)
    total = tl.zeros((BG, BH), tl.float32)
    o = tl.zeros((BG, BH, BV), tl.float32)
    if K > 0:
        mu = tl.load(mu_p + tl.arange(0, BK))
        c = tl.zeros((BK, BH), tl.float32)
    first = tl.load(first_p + i).to(tl.int64)
    for t in range(first, tl.load(first_p + i + 1).to(tl.int64)):
        record_p = tile_p + t * (BG * (2 + 2 * G))
        j = tl.load(record_p + bg).to(tl.int64)  # [BG]
        o_shell = g[:, None] * BG + bg[None, :]
        x = tl.load(record_p + 2 * BG + o_shell).to(tl.float32, bitcast=True)  # [G, BG]
        log_count = tl.load(record_p + (2 + G) * BG + o_shell).to(tl.float32, bitcast=True)
        nearest = tl.load(record_p + 2 * BG + bg).to(tl.float32, bitcast=True)  # [BG]
        s = tl.sum(gather_heads(k_p, j, h, H, D, BD) * q[None, :, :], 2)  # [BG, BH]
        # The nearest shell has the largest score of its group.
        new_top = tl.maximum(top, tl.max(s + a[None, :] * (nearest * nearest)[:, None], 0))
        shrink = tl.exp2(top - new_top)
        top = new_top
        s = tl.trans(s - top[None, :])
        p = tl.exp2(s[None, :, :] + (a[None, :, None] * (x * x)[:, None, :] + log_count[:, None, :]))  # [G, BH, BG]
        p_group = tl.trans(tl.sum(p, 0))  # [BG, BH]
        total = total * shrink[None, :] + p_group
        o = o * shrink[None, :, None] + p_group[:, :, None] * gather_heads(v_p, j, h, H, DV, BV)
        if K > 0:
            b, _ = basis(tl.reshape(x, (BE,))[None, :], mu[:, None])  # [BK, BE]
            c = c * shrink[None, :] + dot(b, tl.reshape(tl.permute(p, (0, 2, 1)), (BE, BH)), TF32)
    total = tl.sum(total, 0)
    o = tl.sum(o, 0) / total[:, None]
    store_heads(o_p, i, h, o, H, DV, BV)
    tl.store(lse_p + i * H + h, (top + tl.log2(total)) * LN2, mask=h < H)
    if K > 0:
        k = tl.arange(0, BK)
        m_c = (h[None, :] < H) & (k[:, None] < K)
        tl.store(c_p + i * (H * K) + h[None, :] * K + k[:, None], c / total[None, :], mask=m_c)


def attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N,H,Dv), lse (N,H), c (N,H,K): the operator `triton_attention`."""
    num, told = edge_weight.shape[2], Settings.read(settings)
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay))
    tiles = unpack(layout, len(q), ImageList.length(images, len(q), len(lattice)), num)
    y, lse, c = (decay.new_empty(shape) for shape in (v.shape, decay.shape, (*decay.shape, num)))
    q_scale = math.log2(math.e) / math.sqrt(q.shape[2])
    decay_scale = -math.log2(math.e) / scale(num, told) ** 2
    tensors = (q, k, v, decay, tiles.records, tiles.first, tiles.mu, y, lse, c)
    with torch.cuda.device_of(q), without_autocast(q):
        attention_fwd[len(q), head_blocks(q.shape[1])](
            *tensors, q_scale, decay_scale, **forward_blocks(q, v, num, tiles.shape), TF32=bool(told.tf32)
        )
        if num:
            y.transpose(0, 1).baddbmm_(c.transpose(0, 1), edge_weight.mT)
    return y, lse, c
