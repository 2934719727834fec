"""The sums over images on a radial grid: matrix products alone, in plain PyTorch.

exp(-a d²) b_m(d) is band-limited in d, so the sum over a pair's images of any such function is a sum over the nodes d_g
of a grid, with M_ij[g] = sum_n L_g(d_ijn), L_g the Lagrange polynomials through the nodes around d. M is geometry alone
and made beforehand; each call is then products of M, of exp(-a d_g²) and of b(d_g). The grid goes on below zero, where
the functions do too, so that no polynomial is one-sided. M takes pairs times nodes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Absent, Case, Provider, attention_case, require_memory
from ..problems import Problem
from .swapped import training_with

POINTS = 24  # of a polynomial
SPACING = 0.5  # in units of the width of the basis
BOUND = 1e-4


def grid_attention(x: Problem) -> Callable[..., Tensor]:
    size, images = x.size, x.images
    if size.basis is None:
        raise Absent("the grid follows the width of the basis")
    step = SPACING * size.basis.r_max / size.basis.num * size.basis.width
    if step > 0.5:
        raise Absent(f"a grid of {step:.1f} Å would be too coarse for the decays: the basis is too wide")
    nodes = math.ceil(float(images.cutoff.max()) / step) + POINTS + 1
    largest = int(images.ptr.diff().max())
    # M and its transpose, and what is made of them.
    require_memory(3.0 * images.num_atoms * largest * nodes * x.upstream.itemsize, x.device)
    m, partner = _spread(x, step, nodes, largest)
    m_transposed = m.mT.contiguous()
    d = (torch.arange(nodes, dtype=x.dtype, device=x.device) - POINTS // 2) * step
    b = size.basis(d)

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor, **geometry: Tensor) -> Tensor:
        gathered = partner.flatten()
        keys, values = (y.index_select(0, gathered).view(*partner.shape, *y.shape[1:]) for y in (k, v))
        s = torch.einsum("nhd,nphd->nhp", q, keys) / q.shape[-1] ** 0.5
        s = torch.exp(s - s.detach().amax(-1, keepdim=True))
        gaussian = torch.exp(-decay[..., None] * d.square())
        at_node = gaussian * (s @ m)
        at_pair = s * (gaussian @ m_transposed)
        encoded = torch.einsum("nhg,hgd->nhd", at_node, b @ weight.mT)
        return (torch.einsum("nhp,nphd->nhd", at_pair, values) + encoded) / at_pair.sum(-1, keepdim=True)

    return attend


def _spread(x: Problem, step: float, nodes: int, largest: int) -> tuple[Tensor, Tensor]:
    """M (N, largest, nodes), rounded from fp64, and the atoms j (N, largest) of its rows, the last one repeated."""
    images, device = x.images, x.device
    crystals = x.crystals.to(torch.float64)
    i = torch.repeat_interleave(images.row_ptr.diff())
    j, crystal = images.col.long(), torch.repeat_interleave(images.ptr.diff())
    shift = (images.shift.double()[:, None] @ crystals.lattice[crystal[i]])[:, 0]
    at = (crystals.positions[j] - crystals.positions[i] + shift).norm(dim=-1) / step
    first = at.floor().long() - POINTS // 2 + 1
    # Barycentric Lagrange weights on even nodes: binomials of alternating signs.
    node = torch.arange(POINTS, device=device)
    sign = [(-1.0) ** p * math.comb(POINTS - 1, p) for p in range(POINTS)]
    away = at[:, None] - (first[:, None] + node)
    on_node = away.abs() < 1e-12
    part = torch.tensor(sign, dtype=torch.float64, device=device) / torch.where(on_node, 1.0, away)
    part = torch.where(on_node.any(1, keepdim=True), on_node.double(), part)
    part = part / part.sum(1, keepdim=True)
    row = i * largest + j - images.ptr[crystal[i]]
    place = row[:, None] * nodes + first[:, None] + POINTS // 2 + node
    m = torch.zeros(images.num_atoms * largest * nodes, dtype=torch.float64, device=device)
    m = m.index_add(0, place.flatten(), part.flatten()).view(images.num_atoms, largest, nodes).to(x.dtype)
    local = torch.arange(largest, device=device)
    size = images.ptr.diff()[crystal]
    return m, images.ptr[crystal][:, None] + torch.minimum(local, size[:, None] - 1)


def _grid(x: Problem) -> Case:
    return attention_case(x, grid_attention(x))


PROVIDERS = [
    Provider("radial-grid", "attention", BOUND, _grid),
    Provider("radial-grid", "training", BOUND, training_with(grid_attention)),
]
