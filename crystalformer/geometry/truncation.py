"""Certified truncation: how far the images must reach. Derived in docs/math.md, section 4.

All functions take fp64 tensors. `slack` is the logarithm of what a tail is allowed to weigh against the nearest term.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .lattice import gaussian_sum_bound

# Content scores further apart than this would have to be weighed against numbers that fp64 does not hold.
MAX_LOGIT_RANGE = 500.0
# Fraction of the tolerance spent on the images beyond the outer radius, which are bounded and never enumerated. It must
# be small: a cutoff that leaves out nearly `tol` may need one shell more because of it, and with a steep decay the next
# shell is far.
BEYOND = 0.01
# First and last trial value of b/a in the bound exp(-(a-b) R²) sum exp(-b d²), and their number; the best is taken.
SPLITS = (0.02, 0.5, 25)
# The cutoff is bisected to this fraction of the squared outer radius.
BISECTIONS = 12


def tail_radius2(t: Tensor, a: float | Tensor, slack: Tensor, lattice: Tensor | None = None) -> Tensor:
    """Squared radius R² (S) with sum_{|r + n·L| > R} exp(-a |r + n·L|²) <= exp(slack) for every r, equation (10).

    Args:
        t: (C,3,3) triangular lattices.
        a: exponent, Å^-2 (Å² for a reciprocal lattice), or one for each lattice (C).
        slack: (S) logarithms of the bounds to reach.
        lattice: (S) which of the lattices each is for; one each by default.
    """
    b = torch.linspace(*SPLITS, dtype=t.dtype, device=t.device)[:, None] * a
    b = b.expand(-1, len(t))
    bound, rest = gaussian_sum_bound(t, b), a - b
    if lattice is not None:
        bound, rest = bound[:, lattice], rest[:, lattice]
    return ((bound - slack) / rest).amin(0).clamp(min=0)


def bearable_movement(t: Tensor, a: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """How far images may move before a list leaves out more than twice its `tol`; docs/math.md, equation (18).

    Args:
        t: (C,3,3) triangular lattices.  a: (C) the smallest decay, Å^-2.
        slack: (C) as for the list's outer radius, see `tail_radius2`.

    Returns:
        (C), (C), Å: the outer radius, and by how much the distances of the images within it may change.
    """
    outer = tail_radius2(t, a, slack).sqrt()
    return outer, (math.log(2) / (2 * a * (4 * outer + 1))).clamp(max=1)


def row_cutoff2(
    weight: Tensor,
    d2: Tensor,
    pair: Tensor,
    pair_row: Tensor,
    row_crystal: Tensor,
    outer2: Tensor,
    beyond: Tensor,
    tol: float,
    logit_range: float,
) -> Tensor:
    """The smallest squared cutoff (C), to 1 in 4096, that leaves out at most `tol` of every row's mass.

    Equation (12): for content scores in [0, logit_range] chosen by an adversary, the mass that a row leaves out is at
    most tol exactly if sum_j g(T_j - tol F_j) <= 0, g(x) = exp(logit_range) x for x > 0 and x otherwise, where F_j is
    pair j's whole sum and T_j its part beyond the cutoff.

    Args:
        weight, d2, pair: (M) exp(-a d²), d², and the pair of each image enumerated within `outer2`.
        pair_row, row_crystal: (P) the row of each pair, (N) the crystal of each row.
        outer2: (C) squared outer radius.  beyond: (C) bound on what a pair has beyond it.
    """
    num_pairs, crystal = len(pair_row), row_crystal[pair_row]
    whole = weight.new_zeros(num_pairs).index_add_(0, pair, weight)
    image_crystal = crystal[pair]

    def holds(cutoff2: Tensor) -> Tensor:
        tail = torch.where(d2 > cutoff2[image_crystal], weight, 0.0)
        excess = weight.new_zeros(num_pairs).index_add_(0, pair, tail) + beyond[crystal] - tol * whole
        excess = torch.where(excess > 0, excess * math.exp(logit_range), excess)
        excess = weight.new_zeros(len(row_crystal)).index_add_(0, pair_row, excess)
        return torch.zeros_like(outer2).scatter_reduce_(0, row_crystal, excess, "amax") == 0

    return _bisect(holds, outer2)


def pair_cutoff2(weight: Tensor, d2: Tensor, pair: Tensor, outer2: Tensor, beyond: Tensor, tol: float) -> Tensor:
    """The smallest squared cutoff (P) of each pair, to 1 in 4096, that leaves at most `tol` of the pair's own sum.

    Args: as `row_cutoff2`, `outer2` and `beyond` per pair, `weight` and `beyond` relative to the pair's nearest image:
        half a long cell away, exp(-a d²) itself is zero in fp64.
    """
    whole = torch.zeros_like(outer2).index_add_(0, pair, weight)

    def holds(cutoff2: Tensor) -> Tensor:
        tail = torch.where(d2 > cutoff2[pair], weight, 0.0)
        return torch.zeros_like(outer2).index_add_(0, pair, tail) + beyond <= tol * whole

    return _bisect(holds, outer2)


def _bisect(holds: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """The smallest value in (0, high] at which a monotone condition holds; it is known to hold at `high`."""
    low = torch.zeros_like(high)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        good = holds(middle)
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return high
