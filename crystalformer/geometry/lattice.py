"""Points of a lattice inside spheres, and bounds on Gaussian sums over a lattice.

Both rest on one factorisation: a lattice, its vectors as rows, is `L = T Q` with Q orthogonal and T upper triangular.
In the rotated frame the first coordinate of a lattice point n·L depends on n_0 alone, the second on n_0 and n_1, the
third on all three. So the points in a sphere are found axis by axis with no candidate outside it (Fincke and Pohst,
1985), however skewed the cell, and a Gaussian sum over them is bounded by three one-dimensional sums.

Everything here is batched and runs on the device of its arguments, the choice of points in fp64.
"""

import math

import torch
from torch import Tensor

from ..common import checks
from ..common.ragged import ordinals

# Volume of a cell over the product of its edges, below which it is singular.
FLATTEST = 1e-6


def triangular(lattice: Tensor) -> tuple[Tensor, Tensor]:
    """The factors T (C,3,3), upper triangular with a positive diagonal, and Q (C,3,3), orthogonal, of L = T Q."""
    # QR of the reversed, transposed lattice: numpy and torch have QR but no RQ.
    q, r = torch.linalg.qr(lattice.flip(-2).mT)
    sign = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(lattice.dtype)
    return (r * sign[..., None]).mT.flip(-2, -1), (q * sign[..., None, :]).mT.flip(-2)


def volume(lattice: Tensor) -> Tensor:
    """(C) the volumes of the cells, Å³. Not by `det`, whose second derivatives are NaN for cubic cells."""
    return (torch.linalg.cross(lattice[:, 0], lattice[:, 1]) * lattice[:, 2]).sum(-1).abs()


def check_geometry(positions: Tensor, lattice: Tensor) -> None:
    checks.check_finite("positions", positions)
    check_lattice(lattice)


def check_lattice(lattice: Tensor) -> None:
    """A lattice is singular when its volume is nothing beside the product of its edges."""
    checks.check_has_values("lattice", lattice)
    if not checks.values_visible(lattice):
        return
    x = lattice.detach().double()
    good = volume(x) > FLATTEST * x.norm(dim=-1).prod(-1)
    if not bool(good.all()):
        checks.check_finite("lattice", lattice)
        index = int((~good).nonzero()[0])
        raise ValueError(f"lattice must have a volume, but lattice[{index}] is singular: {lattice[index].tolist()}")


def reciprocal(lattice: Tensor) -> Tensor:
    """Rows are the reciprocal lattice vectors, Å^-1, 2 pi included: lattice @ result.mT = 2 pi.

    All are NaN where an edge is infinite; LAPACK finds an inverse for such a cell, too.
    """
    unknown = (0 * lattice).sum((-2, -1), keepdim=True)
    return 2 * math.pi * torch.linalg.inv_ex(lattice).inverse.mT + unknown


def points_in_spheres(t: Tensor, cell: Tensor, center: Tensor, radius2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All integer n with |center + n·T|² <= radius2, for each of many spheres.

    Args:
        t: (C,3,3) upper triangular lattices, from `triangular`.
        cell: (S,) which lattice a sphere belongs to.
        center: (S,3) minus the centre of each sphere, in the rotated frame, Å.
        radius2: (S,) squared radii, Å².

    Returns:
        sphere (M,), n (M,3) and squared length (M,) of each point, sorted by sphere, then by n. The negative of a
        center gives exactly the negative n: IEEE rounding is symmetric, and no operation here is not.
    """
    sphere = torch.arange(len(cell), device=cell.device)
    x, left = center, radius2
    n: list[Tensor] = []
    for axis in range(3):
        step = t[cell[sphere], axis]
        middle = -x[:, axis] / step[:, axis]
        half = left.clamp(min=0).sqrt() / step[:, axis]
        first = torch.ceil(middle - half)
        count = (torch.floor(middle + half) - first + 1).clamp(min=0).long()
        parent = torch.repeat_interleave(count, output_size=int(count.sum()))
        n = [m[parent] for m in n] + [first[parent] + ordinals(count, parent)]
        x = x[parent] + n[-1][:, None] * step[parent]
        left = left[parent] - x[:, axis] ** 2
        sphere = sphere[parent]
    return sphere, torch.stack(n, 1).long(), x.square().sum(1)


def gaussian_sum_bound(t: Tensor, a: Tensor) -> Tensor:
    """Upper bound, for any r, on log sum_n exp(-a |r + n·L|²), docs/math.md equation (9).

    Args:
        t: (C,3,3) from `triangular`.
        a: (..., C) exponents, Å^-2 (Å² for a reciprocal lattice).

    Returns:
        (..., C), the bound: log prod_k (1 + sqrt(pi/a) / T_kk).
    """
    steps = torch.diagonal(t, dim1=-2, dim2=-1)
    return torch.log1p((math.pi / a[..., None]).sqrt() / steps).sum(-1)
