"""What the kernels share: loads and stores of heads, the radial basis, and a matrix product exact to fp32.

Names in all kernels: x_p points to x, o_x is an offset in it, m_x a mask. BD, BV, BK are D, Dv, K padded to powers of
two. A program serves BH heads, and in a tile BG groups of G shells of one pair, which are BE = BG·G. Scores are in
units of log 2 and distances in units in which b(d) = 2^-(x - mu)²: exp2 is one instruction, exp is not.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def crystal_of(i, crystal_p, ptr_p):
    """The crystal of atom i, its first atom, and the first atom after it."""
    crystal = tl.load(crystal_p + i)
    return crystal, tl.load(ptr_p + crystal), tl.load(ptr_p + crystal + 1)


@triton.jit
def load_heads(p, i, h, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x[i, h] of x (N,H,D): [BH, BD] of one atom, zero in the padding."""
    d = tl.arange(0, BD)[None, :]
    h = h[:, None]
    return tl.load(p + i * (H * D) + h * D + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)


@triton.jit
def load_columns(p, i, h, k, H: tl.constexpr, K: tl.constexpr):
    """x[i, h, k]ᵀ of x (N,H,K), h [BH] and k: [k, BH], zero in the padding."""
    h = h[None, :]
    k = k[:, None]
    return tl.load(p + i * (H * K) + h * K + k, mask=(h < H) & (k < K), other=0.0)


@triton.jit
def gather_heads(p, j, h, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """x[j, h] of x (N,H,D) and j [BG]: [BG, BH, BD], zero in the padding."""
    d = tl.arange(0, BD)[None, None, :]
    h = h[None, :, None]
    return tl.load(p + j[:, None, None] * (H * D) + h * D + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)


@triton.jit
def store_heads(p, i, h, x, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Writes x [BH, BD] to x[i, h] of x (N,H,D)."""
    d = tl.arange(0, BD)[None, :]
    h = h[:, None]
    tl.store(p + i * (H * D) + h * D + d, x, mask=(h < H) & (d < D))


@triton.jit
def high(x):
    """x rounded to the 10 bits of fraction that tf32 has; the rest has at most 12 bits, of either sign.

    A tensor core cuts its operands off after 10 bits. Had the rest 13 bits, all of one sign, sums would come out low.
    """
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, y, TF32: tl.constexpr):
    """x @ y in three tf32 products; what they leave out, low·low, is below fp32's rounding. With TF32 in one.

    The small terms come first, and nothing large is there yet: tensor cores cut their sums off, they do not round.
    """
    x_high = high(x)
    y_high = high(y)
    if TF32:
        product = tl.dot(x_high, y_high, input_precision="tf32")
    else:
        product = tl.dot(x - x_high, y_high, input_precision="tf32")
        product = tl.dot(x_high, y - y_high, product, input_precision="tf32")
        product = tl.dot(x_high, y_high, product, input_precision="tf32")
    return product


@triton.jit
def basis(x, mu):
    """b [n, m] = 2^-(x - mu)² of x - mu = t [n, m]; t comes with it, for the derivative."""
    t = x - mu
    return tl.exp2((t * t) * -1.0), t
