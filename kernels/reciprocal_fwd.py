"""Forward of reciprocal attention: one program per row, one pass over the atoms of its crystal, online softmax.

Equation (13) of docs/math.md. Rows are atoms, or ORBITS of them; keys and values are by atom. A tile is BN atoms j. The
cosine of a pair is two products of phases, which all heads share, and S [BN, BH] = sum_G cos(G·r_ij) w_i(G) is a matrix
product, of BW vectors at a time. S and the softmax never leave the registers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.attention.ops import NAMESPACE
from crystalformer.attention.reference import RECIPROCAL_CLAMP

from .device_functions import LOG2E, crystal_of, dot, gather_heads, load_heads, store_heads
from .launch import head_blocks, reciprocal_blocks
from .phases import in_parts, make_phases, of_atoms

CLAMP = tl.constexpr(RECIPROCAL_CLAMP)


@triton.jit
def atoms_of(i, crystal_p, ptr_p, atom_ptr_p, ORBITS: tl.constexpr):
    """The crystal of row i, the row's atom, the first atom of the crystal, and the first one after it."""
    crystal, first, last = crystal_of(i, crystal_p, ptr_p)
    own = i
    if ORBITS:
        own = tl.load(atom_ptr_p + i)
        first = tl.load(atom_ptr_p + first)
        last = tl.load(atom_ptr_p + last)
    return crystal, own, first, last


@triton.jit
def tile(start, last, BN: tl.constexpr):
    """Of atoms start to last-1, the first BN, counted from start, the last one repeated; and which are real.

    Places in a tile are small, so offsets from its first atom are of 32 bits.
    """
    here = tl.arange(0, BN)
    number = tl.minimum(last - start, BN).to(tl.int32)
    return tl.minimum(here, number - 1), here < number


@triton.jit
def sum_vectors(
    phase_p, length2_p, stride, number, i, start, j, c, BH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """S_ij of atoms start + j [BN] and of c [BH]: [BN, BH]; with SLOPE also sum_G w |G|² cos(G·r), which is -dS/dc."""
    total = tl.zeros((BN, BH), tl.float32)
    slope = tl.zeros((BN, BH), tl.float32)
    own_p = phase_p + (2 * i) * stride
    row_p = phase_p + (2 * start) * stride
    o_row = j[:, None] * (2 * stride) + tl.arange(0, BW)[None, :]
    for first_g in range(0, number, BW):  # without masks: the last block is filled with zeros
        g = first_g + tl.arange(0, BW)
        cosine = tl.load(row_p + first_g + o_row) * tl.load(own_p + g)[None, :]  # [BN, BW]
        cosine += tl.load(row_p + first_g + stride + o_row) * tl.load(own_p + stride + g)[None, :]
        length2 = tl.load(length2_p + g)
        w = tl.exp2(length2[:, None] * c[None, :])  # [BW, BH]
        total += dot(cosine, w, False)
        if SLOPE:
            slope += dot(cosine, w * length2[:, None], False)
    # All of them twice, for G and -G, but for G = 0, which is 1 in S and nothing in the slope.
    return 2 * total - 1, 2 * slope


@triton.jit
def clamped(sums):
    """max(S, clamp), and NaN where S is."""
    return tl.maximum(sums, CLAMP, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal_fwd(
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
    q_scale,
    stride,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    ORBITS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    crystal, own, first, last = atoms_of(i, crystal_p, ptr_p, atom_ptr_p, ORBITS)
    number = tl.load(g_ptr_p + crystal + 1) - tl.load(g_ptr_p + crystal)
    c = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * -LOG2E  # [BH], negative
    q = load_heads(q_p, i, h, H, D, BD) * q_scale  # [BH, BD]
    top = tl.full((BH,), -1e30, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    y = tl.zeros((BH, BV), tl.float32)
    for start in range(first, last, BN):
        j, m_j = tile(start, last, BN)
        sums, _ = sum_vectors(
            phase_p, vector_p + (4 * crystal + 3) * stride, stride, number, own, start, j, c, BH, BN, BW, False
        )
        s = tl.sum(gather_heads(k_p + start * (H * D), j, h, H, D, BD) * q[None, :, :], 2)  # [BN, BH]
        # S is in [clamp, S_ii], so the content alone keeps the exponentials in range.
        new_top = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp2(top - new_top)
        top = new_top
        p = tl.exp2(s - top[None, :]) * tl.where(m_j[:, None], clamped(sums), 0.0)
        total = total * shrink + tl.sum(p, 0)
        y = y * shrink[:, None] + tl.sum(p[:, :, None] * gather_heads(v_p + start * (H * DV), j, h, H, DV, BV), 0)
    store_heads(y_p, i, h, y / total[:, None], H, DV, BV)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    lists: Sequence[Tensor],
    largest: Sequence[int],
) -> tuple[Tensor]:
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay))
    y = torch.empty_like(v)
    x = make_phases(positions, lattice, lists, largest[1])
    q_scale = math.log2(math.e) / math.sqrt(q.shape[2])
    reciprocal_fwd[len(q), head_blocks(q.shape[1])](
        *(q, *of_atoms(lists, k, v), decay, *x.read, x.atom_ptr, y, q_scale, x.stride),
        **reciprocal_blocks(q, v),
        ORBITS=len(largest) > 2,
    )
    return (y,)


def reciprocal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    waves: Tensor,
    largest: Sequence[int],
) -> Tensor:
    """y (N,H,Dv): the operator `triton_reciprocal`."""
    by_row = (q, k, v, decay_reciprocal, positions)
    with torch.cuda.device_of(q):
        return in_parts(_forward, _by_products, by_row, lattice, waves, largest)[0]


def _by_products(*inputs: Any) -> tuple[Tensor]:
    return (getattr(torch.ops, NAMESPACE).reference_reciprocal(*inputs),)
