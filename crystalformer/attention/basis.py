"""The radial basis of the value encoding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import checks

MOST_FUNCTIONS, R_MAX, WIDTH = 1 << 16, (1e-3, 1e6), (1e-3, 1e3)  # csrc/layout.cpp has them too


@dataclass(frozen=True)
class RadialBasis:
    """Gaussians of the distance, b_m(d) = exp(-(d - mu_m)² / (2 w²)) with mu_m = m r_max/num, m = 1..num.

    A distance is within reach of some 17 width functions, and kernels take memory and time for so many.

    Attributes:
        num: how many, K, up to 65,536.
        r_max: centre of the last one, Å, from 1e-3 to 1e6.
        width: w in units of the spacing r_max/num, from 1e-3 to 1,000.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    num: int = 64
    r_max: float = 14.0
    width: float = 1.0

    def __post_init__(self) -> None:
        checks.check_integer("num", self.num, 1, MOST_FUNCTIONS)
        checks.check_between("r_max", self.r_max, *R_MAX)
        checks.check_between("width", self.width, *WIDTH)

    def __call__(self, d: Tensor) -> Tensor:
        """b(d), (..., K), of distances d (...), Å."""
        return torch.exp(-0.5 * ((d[..., None] - self._centers(d)) / self._sigma).square())

    def derivative(self, d: Tensor, b: Tensor) -> Tensor:
        """b'(d), (..., K), of distances d (...) and b(d)."""
        return (self._centers(d) - d[..., None]) * b / self._sigma**2

    @property
    def _sigma(self) -> float:
        return self.width * self.r_max / self.num

    def _centers(self, like: Tensor) -> Tensor:
        return torch.arange(1, self.num + 1, dtype=like.dtype, device=like.device) * (self.r_max / self.num)
