"""One Gaussian sum in two spaces: for which decays the sum over wave vectors is cheaper.

By Poisson summation alpha_ij = log sum_n exp(-a d²) is also a sum over reciprocal lattice vectors, which converges the
faster the slower the decay a is. Derived in docs/math.md, section 6.
"""

import math

import torch
from torch import Tensor

from .lattice import triangular
from .wave_vectors import WaveVectors, choose_wave_vectors

# Sums in reciprocal space are made in fp64, where cancellation costs about 1e-14: a sum smaller than ROUNDING/tol would
# not be known to tol.
ROUNDING = 1e-14
# Both sums have as many terms at the decay (248/4)^(1/3) V^(-2/3), see crossover.
EQUAL_COST = 62 ** (1 / 3)
# Trial values of the crossover, in powers of 2^(-1/4) of the one of equal cost; smaller ones bring nothing.
TRIALS = 60


def smallest_sum(t: Tensor, a: Tensor) -> Tensor:
    """Lower bound, for any r, on S(r) = sum_G exp(-|G|²/(4a)) cos(G·r), equation (16).

        S(r) >= prod_k sqrt(a/pi) T_kk sum_m exp(-a T_kk² (m + 1/2)²)

    Args:
        t: (C,3,3) triangular lattices, real space.
        a: (..., C) decays, Å^-2.
    """
    x = a[..., None] * torch.diagonal(t, dim1=-2, dim2=-1).square()  # a T_kk²
    m = torch.arange(32, dtype=t.dtype, device=t.device) + 0.5
    # The first terms from below: those left out are positive. Where x is small the sum is at least 1 - 2 exp(-pi²/x).
    near = 2 * (x / math.pi).sqrt() * torch.exp(-x[..., None] * m.square()).sum(-1)
    return torch.maximum(near, 1 - 2 * torch.exp(-(math.pi**2) / x)).prod(-1)


def crossover(lattice: Tensor, decay_min: float, tol: float) -> Tensor:
    """(C) the decay, Å^-2, up to which sums are made in reciprocal space; 0 where real space serves from decay_min on.

    A pair has about 4/3 pi (l/a)^1.5 / V images and a crystal half of 4/3 pi (4 a l)^1.5 V / (2 pi)³ wave vectors, with
    l = -log tol: equally many at a³ = 62 / V². The choice is about cost alone; the certificate holds for any.
    """
    t, _ = triangular(lattice)
    volume = torch.diagonal(t, dim1=-2, dim2=-1).prod(-1)
    steps = 2 ** (-torch.arange(TRIALS, dtype=t.dtype, device=t.device) / 4)
    trials = steps[:, None] * EQUAL_COST * volume ** (-2 / 3)
    good = (smallest_sum(t, trials) >= min(0.5, ROUNDING / tol)) & (trials > decay_min)
    # The largest good one; they come in falling order.
    return torch.where(good, trials, 0.0).amax(0)


def slow_wave_vectors(lattice: Tensor, ptr: Tensor, crossover: Tensor, tol: float) -> WaveVectors:
    """Those that leave out at most `tol` of every sum with a decay up to `crossover`, relatively.  Equation (17)."""
    t, _ = triangular(lattice)
    a = torch.where(crossover > 0, crossover, 1e-6)
    smallest = torch.where(crossover > 0, smallest_sum(t, a), 1.0)
    return choose_wave_vectors(lattice, ptr, 1 / (4 * a), tol * smallest)
