"""Periodic encodings of pairs, equations (6), (7) and (B11) of docs/math.md: one program per pair and head block.

A row of the layout is a shell of the pair, its distance and the logarithm of how many images it has.

A program sums c = sum_e p_e b(d_e) over the images of its pair, beta = W c is a library product. c is larger than beta,
so it is made for some pairs at a time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.attention.ops import without_autocast
from crystalformer.attention.settings import Settings
from crystalformer.geometry.image_list import ImageList

from .device_functions import LN2, LOG2E, basis, dot, load_columns, load_heads
from .geometry_gradients import spread, sum_segments
from .launch import encoding_backward_blocks, encoding_blocks, head_blocks
from .layout import FAR, Layout, scale, unpack

# Elements of c, or of its gradient, at a time.
CHUNK_ELEMENTS = 1 << 24


@triton.jit
def encoding_fwd(
    decay_p,
    shell_p,
    first_p,
    atom_p,
    mu_p,
    alpha_p,
    c_p,
    decay_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    FAR: tl.constexpr,
    TF32: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    e = tl.arange(0, BE)
    i = tl.load(atom_p + pair).to(tl.int64)
    a = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * decay_scale  # [BH], negative
    first = tl.load(first_p + pair).to(tl.int64)
    last = tl.load(first_p + pair + 1).to(tl.int64)
    # The nearest shell comes first and has the largest score.
    nearest = tl.load(shell_p + first * 2)
    top = a * (nearest * nearest)
    total = tl.zeros((BH,), tl.float32)
    if K > 0:
        mu = tl.load(mu_p + tl.arange(0, BK))
        c = tl.zeros((BK, BH), tl.float32)
    for start in range(first, last, BE):
        m_e = start + e < last
        x = tl.load(shell_p + (start + e) * 2, mask=m_e, other=FAR)
        log_count = tl.load(shell_p + (start + e) * 2 + 1, mask=m_e, other=0.0)
        p = tl.exp2(a[None, :] * (x * x)[:, None] + log_count[:, None] - top[None, :])  # [BE, BH]
        total += tl.sum(p, 0)
        if K > 0:
            b, _ = basis(x[None, :], mu[:, None])  # [BK, BE]
            c += dot(b, p, TF32)
    tl.store(alpha_p + pair * H + h, (top + tl.log2(total)) * LN2, mask=h < H)
    if K > 0:
        k = tl.arange(0, BK)
        m_c = (h[None, :] < H) & (k[:, None] < K)
        tl.store(c_p + pair * (H * K) + h[None, :] * K + k[:, None], c / total[None, :], mask=m_c)


@triton.jit
def encoding_bwd(
    decay_p,
    shell_p,
    first_p,
    atom_p,
    mu_p,
    alpha_p,
    beta_p,
    grad_alpha_p,
    grad_beta_p,
    grad_c_p,
    d_decay_p,
    force_p,
    decay_scale,
    force_scale,
    H: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BU: tl.constexpr,
    BE: tl.constexpr,
    FAR: tl.constexpr,
    GEOMETRY: tl.constexpr,
    TF32: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    e = tl.arange(0, BE)
    i = tl.load(atom_p + pair).to(tl.int64)
    a = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * decay_scale  # [BH], negative
    alpha = tl.load(alpha_p + pair * H + h, mask=h < H, other=0.0) * LOG2E
    weight = tl.load(grad_alpha_p + pair * H + h, mask=h < H, other=0.0)
    if K > 0:
        # The mean of u·b is u·c = grad_beta·beta.
        beta = load_heads(beta_p, pair, h, H, DV, BV)
        weight -= tl.sum(load_heads(grad_beta_p, pair, h, H, DV, BV) * beta, 1)
    d_decay = tl.zeros((BH,), tl.float32)
    first = tl.load(first_p + pair).to(tl.int64)
    last = tl.load(first_p + pair + 1).to(tl.int64)
    for start in range(first, last, BE):
        m_e = start + e < last
        x = tl.load(shell_p + (start + e) * 2, mask=m_e, other=FAR)
        log_count = tl.load(shell_p + (start + e) * 2 + 1, mask=m_e, other=0.0)
        x2 = (x * x)[:, None]
        p = tl.exp2(a[None, :] * x2 + log_count[:, None] - alpha[None, :])  # [BE, BH]
        ds = tl.broadcast_to(weight[None, :], (BE, BH))
        if K > 0:
            slope = tl.zeros((BE, BH), tl.float32)
            for o_k in range(0, K, BU):  # few pairs have more than BE shells, so u is read once
                k = o_k + tl.arange(0, BU)
                u = load_columns(grad_c_p, pair, h, k, H, K)  # [BU, BH]
                b, from_center = basis(x[:, None], tl.load(mu_p + k)[None, :])  # [BE, BU]
                ds += dot(b, u, TF32)
                if GEOMETRY:
                    slope += dot(b * from_center, u, TF32)
        ds = p * ds
        d_decay += tl.sum(ds * x2, 0)
        if GEOMETRY:
            force = tl.sum(ds * a[None, :], 1)  # [BE]
            if K > 0:
                slope = tl.sum(p * slope, 1)
                force -= tl.where(x > 0, slope / tl.where(x > 0, x, 1.0), 0.0)
            o_force = (start + e) * tl.num_programs(1) + tl.program_id(1)
            tl.store(force_p + o_force, force * force_scale * tl.exp2(-log_count), mask=m_e)
    tl.store(d_decay_p + pair * H + h, d_decay * (decay_scale / LOG2E), mask=h < H)


def encoding(
    decay: Tensor,
    edge_weight: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: Tensor,
    layout: Tensor,
    num_pairs: int,
    settings: list[float],
) -> tuple[Tensor, Tensor]:
    """alpha (P,H) and beta (P,H,Dv): the operator `triton_encoding`."""
    num, told = edge_weight.shape[2], Settings.read(settings)
    decay, pairs = (
        decay.contiguous(),
        unpack(layout, num_pairs, ImageList.length(images, len(decay), len(lattice)), num),
    )
    alpha = decay.new_empty(num_pairs, decay.shape[1])
    beta = decay.new_empty(*alpha.shape, edge_weight.shape[1])
    with torch.cuda.device_of(decay), without_autocast(decay):
        for some in _chunks(alpha, num):
            c = _coefficients(decay, pairs, some, alpha[some], num, told)
            if num:
                beta[some] = torch.einsum("hdk,nhk->nhd", edge_weight, c)
    return alpha, beta


def encoding_backward(
    grad_alpha: Tensor,
    grad_beta: Tensor,
    decay: Tensor,
    edge_weight: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: Tensor,
    layout: Tensor,
    num_pairs: int,
    settings: list[float],
    alpha: Tensor,
    beta: Tensor,
    geometry: bool,
) -> tuple[Tensor, ...]:
    """The gradients of decay, edge_weight, positions and lattice: the operator `triton_encoding_backward`."""
    num, told = edge_weight.shape[2], Settings.read(settings)
    found = ImageList.length(images, len(decay), len(lattice))
    decay, grad_alpha, grad_beta, alpha, beta = (x.contiguous() for x in (decay, grad_alpha, grad_beta, alpha, beta))
    pairs = unpack(layout, num_pairs, found, num)
    d_pair, d_edge_weight = torch.empty_like(alpha), torch.zeros_like(edge_weight)
    blocks = head_blocks(decay.shape[1])
    force = decay.new_empty(found if geometry else 0, blocks)
    x_scale, log2e = scale(num, told), math.log2(math.e)
    sizes = encoding_backward_blocks(decay, beta, num)
    with torch.cuda.device_of(decay), without_autocast(decay):
        for some in _chunks(alpha, num):
            g, u = grad_beta[some], alpha.new_empty(0)
            if num:
                c = _coefficients(decay, pairs, some, torch.empty_like(alpha[some]), num, told)
                d_edge_weight += torch.einsum("nhd,nhk->hdk", g, c)
                u = torch.einsum("hdk,nhd->nhk", edge_weight, g).contiguous()
            encoding_bwd[len(g), blocks](
                *(decay, pairs.records.view(torch.float32), pairs.first[some.start :], pairs.atom[some], pairs.mu),
                *(alpha[some], beta[some], grad_alpha[some], g, u, d_pair[some], force),
                *(-log2e / x_scale**2, 2 * x_scale**2 / log2e),
                **sizes, FAR=FAR, GEOMETRY=geometry, TF32=bool(told.tf32),
            )  # fmt: skip
        size = ImageList.views(images, len(decay), len(lattice)).ptr.diff()
        pairs_of_atom = torch.repeat_interleave(size, size, output_size=len(decay))
        d_decay = sum_segments(d_pair, torch.nn.functional.pad(pairs_of_atom.cumsum(0), (1, 0)))
        if not geometry:
            return d_decay, d_edge_weight, positions.new_empty(0), lattice.new_empty(0)
        return d_decay, d_edge_weight, *spread(force, positions, lattice, images, pairs)


def _chunks(alpha: Tensor, num: int) -> list[slice]:
    """The pairs cut so that c of each piece has at most CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // (alpha.shape[1] * max(1, num)))
    return [slice(first, min(first + step, len(alpha))) for first in range(0, len(alpha), step)]


def _coefficients(decay: Tensor, pairs: Layout, some: slice, alpha: Tensor, num: int, told: Settings) -> Tensor:
    """c (n,H,K) of some pairs, whose alpha is written to `alpha`."""
    c = alpha.new_empty(*alpha.shape, num)
    encoding_fwd[len(alpha), head_blocks(alpha.shape[1])](
        *(decay, pairs.records.view(torch.float32), pairs.first[some.start :], pairs.atom[some], pairs.mu, alpha, c),
        *(-math.log2(math.e) / scale(num, told) ** 2,),
        **encoding_blocks(decay, num), FAR=FAR, TF32=bool(told.tf32),
    )  # fmt: skip
    return c
