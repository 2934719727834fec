"""Forward of reciprocal attention: one program per atom, one pass over the atoms of its crystal, online softmax.

Equation (13) of docs/math.md. A tile is BN atoms j. The cosine of a pair is two products of phases, which all heads
share, and S [BN, BH] = sum_G cos(G·r_ij) w_i(G) is a matrix product. S and the softmax never leave the registers. A
table of phases, N times the wave vectors, is made first: no transcendental is computed for a pair of atoms.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crystalformer.images import crystal_of_atom
from crystalformer.ops import NAMESPACE
from crystalformer.reference import RECIPROCAL_CLAMP

from .functions import LOG2E, dot, gather_heads, load_heads, store_heads
from .table import VECTORS, head_blocks, reciprocal_blocks

CLAMP = tl.constexpr(RECIPROCAL_CLAMP)
# Numbers of 32 bits that a call may keep between its kernels, 256 MiB. Beyond, the reference's parts serve.
SCRATCH = 1 << 26


@triton.jit
def cross(a_0, a_1, a_2, b_0, b_1, b_2):
    return a_1 * b_2 - a_2 * b_1, a_2 * b_0 - a_0 * b_2, a_0 * b_1 - a_1 * b_0


@triton.jit
def cos_sin(turns):
    """cos and sin of 2 pi turns, fp64 to fp32: an eighth of a turn to either side of a quarter, by their series.

    tl.cos and tl.sin would keep a table of 2/pi on the stack, for arguments larger than there are.
    """
    quarter = tl.floor(turns * 4 + 0.5)
    x = ((turns * 4 - quarter) * 1.5707963267948966).to(tl.float32)
    quarter = quarter.to(tl.int64) & 3
    x2 = x * x
    cos = 1 + x2 * (-0.5 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320))))
    sin = x + x * x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880))))
    turned = (quarter & 1) == 1
    return (
        tl.where(turned, sin, cos) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0),
        tl.where(turned, cos, sin) * tl.where(quarter >= 2, -1.0, 1.0),
    )


@triton.jit
def phases(
    positions_p, lattice_p, crystal_p, ptr_p, g_ptr_p, g_p, phase_p, length2_p, stride, BP: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Of one atom: cos and sin of G·p for each G of its crystal; the crystal's first atom writes |G|², too.

    In fp64, because G·p is large where the atom is far from the origin. Zeros fill the last block of BW vectors.
    """
    i = tl.program_id(0).to(tl.int64)
    crystal = tl.load(crystal_p + i)
    cell_p = lattice_p + crystal * 9
    a_0 = tl.load(cell_p).to(tl.float64)
    a_1 = tl.load(cell_p + 1).to(tl.float64)
    a_2 = tl.load(cell_p + 2).to(tl.float64)
    b_0 = tl.load(cell_p + 3).to(tl.float64)
    b_1 = tl.load(cell_p + 4).to(tl.float64)
    b_2 = tl.load(cell_p + 5).to(tl.float64)
    c_0 = tl.load(cell_p + 6).to(tl.float64)
    c_1 = tl.load(cell_p + 7).to(tl.float64)
    c_2 = tl.load(cell_p + 8).to(tl.float64)
    # The reciprocal lattice over 2 pi, times the volume.
    u_0, u_1, u_2 = cross(b_0, b_1, b_2, c_0, c_1, c_2)
    v_0, v_1, v_2 = cross(c_0, c_1, c_2, a_0, a_1, a_2)
    w_0, w_1, w_2 = cross(a_0, a_1, a_2, b_0, b_1, b_2)
    inverse = 1 / (a_0 * u_0 + a_1 * u_1 + a_2 * u_2)
    x = tl.load(positions_p + i * 3).to(tl.float64) * inverse
    y = tl.load(positions_p + i * 3 + 1).to(tl.float64) * inverse
    z = tl.load(positions_p + i * 3 + 2).to(tl.float64) * inverse
    f_0 = x * u_0 + y * u_1 + z * u_2
    f_1 = x * v_0 + y * v_1 + z * v_2
    f_2 = x * w_0 + y * w_1 + z * w_2
    first = tl.load(g_ptr_p + crystal)
    number = tl.load(g_ptr_p + crystal + 1) - first
    is_first = i == tl.load(ptr_p + crystal)
    scale = inverse * 6.283185307179586
    for start in range(0, number, BP):
        g = start + tl.arange(0, BP)
        m_g = g < number
        m_block = g < (number + BW - 1) // BW * BW
        n_0 = tl.load(g_p + (first + g) * 3, mask=m_g, other=0).to(tl.float64)
        n_1 = tl.load(g_p + (first + g) * 3 + 1, mask=m_g, other=0).to(tl.float64)
        n_2 = tl.load(g_p + (first + g) * 3 + 2, mask=m_g, other=0).to(tl.float64)
        cos, sin = cos_sin(n_0 * f_0 + n_1 * f_1 + n_2 * f_2)
        tl.store(phase_p + (2 * i) * stride + g, tl.where(m_g, cos, 0.0), mask=m_block)
        tl.store(phase_p + (2 * i + 1) * stride + g, tl.where(m_g, sin, 0.0), mask=m_block)
        g_0 = (n_0 * u_0 + n_1 * v_0 + n_2 * w_0) * scale
        g_1 = (n_0 * u_1 + n_1 * v_1 + n_2 * w_1) * scale
        g_2 = (n_0 * u_2 + n_1 * v_2 + n_2 * w_2) * scale
        length2 = (g_0 * g_0 + g_1 * g_1 + g_2 * g_2).to(tl.float32)
        tl.store(length2_p + crystal * stride + g, length2, mask=m_block & is_first)


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
def reciprocal_fwd(
    q_p,
    k_p,
    v_p,
    decay_p,
    phase_p,
    length2_p,
    crystal_p,
    ptr_p,
    g_ptr_p,
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
):
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    crystal = tl.load(crystal_p + i)
    last = tl.load(ptr_p + crystal + 1)
    number = tl.load(g_ptr_p + crystal + 1) - tl.load(g_ptr_p + crystal)
    c = tl.load(decay_p + i * H + h, mask=h < H, other=0.0) * -LOG2E  # [BH], negative
    q = load_heads(q_p, i, h, H, D, BD) * q_scale  # [BH, BD]
    top = tl.full((BH,), -1e30, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    y = tl.zeros((BH, BV), tl.float32)
    for start in range(tl.load(ptr_p + crystal), last, BN):
        j, m_j = tile(start, last, BN)
        sums, _ = sum_vectors(phase_p, length2_p + crystal * stride, stride, number, i, start, j, c, BH, BN, BW, False)
        s = tl.sum(gather_heads(k_p + start * (H * D), j, h, H, D, BD) * q[None, :, :], 2)  # [BN, BH]
        # S is in [clamp, S_ii], so the content alone keeps the exponentials in range.
        new_top = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp2(top - new_top)
        top = new_top
        p = tl.exp2(s - top[None, :]) * tl.where(m_j[:, None], tl.maximum(sums, CLAMP), 0.0)
        total = total * shrink + tl.sum(p, 0)
        y = y * shrink[:, None] + tl.sum(p[:, :, None] * gather_heads(v_p + start * (H * DV), j, h, H, DV, BV), 0)
    store_heads(y_p, i, h, y / total[:, None], H, DV, BV)


def padded(number: int) -> int:
    """A stride of whole blocks of vectors."""
    return -(-number // VECTORS) * VECTORS


def fits(q: Tensor, max_atoms: int, max_vectors: int) -> bool:
    """Whether the phases of all atoms and the pairs of a backward fit in SCRATCH."""
    return len(q) * 2 * (padded(max_vectors) + padded(max_atoms) * q.shape[1]) <= SCRATCH


def phase_table(
    positions: Tensor, lattice: Tensor, ptr: Tensor, g_ptr: Tensor, g: Tensor, max_vectors: int
) -> tuple[Tensor, ...]:
    """phase (N,2,G): cos and sin of G·p; |G|² (C,G); the crystal of each atom; ptr; g_ptr."""
    crystal = crystal_of_atom(ptr, len(positions))
    phase = positions.new_empty(len(positions), 2, padded(max_vectors))
    length2 = positions.new_empty(len(lattice), phase.shape[2])
    arguments = (positions.contiguous(), lattice.contiguous(), crystal, ptr, g_ptr, g, phase, length2)
    phases[(len(positions),)](*arguments, phase.shape[2], BP=256, BW=VECTORS, num_warps=4)
    return phase, length2, crystal, ptr, g_ptr


def reciprocal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    ptr: Tensor,
    g_ptr: Tensor,
    g: Tensor,
    max_atoms: int,
    max_vectors: int,
) -> Tensor:
    """y (N,H,Dv): the operator `triton_reciprocal`."""
    if not fits(q, max_atoms, max_vectors):
        by_products = getattr(torch.ops, NAMESPACE).reference_reciprocal
        return by_products(q, k, v, decay_reciprocal, positions, lattice, ptr, g_ptr, g, max_atoms, max_vectors)
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay_reciprocal))
    y = torch.empty_like(v)
    with torch.cuda.device_of(q):
        table = phase_table(positions, lattice, ptr, g_ptr, g, max_vectors)
        q_scale = math.log2(math.e) / math.sqrt(q.shape[2])
        reciprocal_fwd[len(q), head_blocks(q.shape[1])](
            q, k, v, decay, *table, y, q_scale, table[0].shape[2], **reciprocal_blocks(q, v)
        )
    return y
