"""The derivatives of `reference`, written out.  Equations (B1) to (B12) of docs/math.md.

Each function takes the gradients of the outputs, the inputs, the results and the settings of one part, and adds the
part's share to `totals`: the gradients of all inputs, the last two of them, of positions and lattice, empty when
`geometry` is false. Higher derivatives don't come this way: they differentiate the reference twice.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.ragged import crystal_of_atom
from ..geometry.image_list import ImageList
from ..geometry.lattice import reciprocal
from .basis import RadialBasis
from .reference import (
    RECIPROCAL_CLAMP,
    PaddedCrystals,
    ReciprocalSums,
    Segments,
    attention_scores,
    distances,
    pair_atoms,
    reciprocal_sums,
    reciprocal_weights,
    root,
    row_images,
)

Tensors = Sequence[Tensor]


def add_displacement(
    d_positions: Tensor, d_lattice: Tensor, dr: Tensor, i: Tensor, j: Tensor, crystal: Tensor, shift: Tensor
) -> None:
    """Shares out the gradient dr (..., 3) of r = p_j + n·L - p_i.  Equation (B9)."""
    d_positions.index_add_(0, j.flatten(), dr.flatten(0, -2))
    d_positions.index_add_(0, i.flatten(), -dr.flatten(0, -2))
    outer = shift.to(dr.dtype)[..., :, None] * dr[..., None, :]
    d_lattice.index_add_(0, crystal.flatten(), outer.flatten(0, -3))


def times_basis(u: Tensor, d2: Tensor, basis: RadialBasis | None) -> Tensor:
    """u·b(d), (n,H,m), of u (n,H,K), the gradient of c, and d² (n,m)."""
    return u @ basis(root(d2)).mT if basis else u.new_zeros(*u.shape[:2], d2.shape[1])


def along_r(u: Tensor, d2: Tensor, basis: RadialBasis | None, p: Tensor, a_ds: Tensor) -> Tensor:
    """f (n,m), where f r is the gradient of r: f = (dd_e)/d = -2 sum_h a ds + sum_h p u·b'(d)/d.  Equation (B8).

    At d = 0 the second term is zero: an atom's distance to itself does not change.

    Args:
        u (n,H,K), d2 (n,m): as above.  p (n,H,m).  a_ds: (n,m), the sum over heads of a ds.
    """
    if basis is None:
        return -2 * a_ds
    d = root(d2)
    slope = (p * (u @ basis.derivative(d, basis(d)).mT)).sum(1)
    return torch.where(d > 0, slope / torch.where(d > 0, d, 1.0), 0.0) - 2 * a_ds


def attention_rows_backward(
    grads: Tensors,
    inputs: Tensors,
    results: Tensors,
    totals: Tensors,
    geometry: bool,
    images: ImageList,
    basis: RadialBasis | None,
    rows: Segments,
) -> None:
    """ds_e = p_e (g_i·v_j + u_i·b_e - delta_i) and what follows from it.  Equations (B1) to (B9)."""
    (g, g_lse), (q, k, v, decay, edge_weight, positions, lattice), (y, _, c) = grads, inputs, results
    dq, dk, dv, d_decay, d_edge_weight, d_positions, d_lattice = totals
    x = row_images(positions, lattice, images, rows)
    p = torch.softmax(attention_scores(q, k, decay, x, rows)[0], -1)
    delta = (g * y).sum(-1) - g_lse
    u = torch.einsum("hdk,nhd->nhk", edge_weight, g)
    g_v = x.by_image(torch.einsum("nhd,nphd->nhp", g, v[x.partner]))
    ds = p * (g_v + times_basis(u, x.d2, basis) - delta[..., None])

    pair_ds = x.sum_by_partner(ds) / math.sqrt(q.shape[-1])
    dq[x.i] += torch.einsum("nhp,nphd->nhd", pair_ds, k[x.partner])
    d_decay[x.i] -= (ds * x.d2[:, None]).sum(-1)
    partner = x.partner.flatten()
    dk.index_add_(0, partner, torch.einsum("nhp,nhd->nphd", pair_ds, q[x.i]).flatten(0, 1))
    dv.index_add_(0, partner, torch.einsum("nhp,nhd->nphd", x.sum_by_partner(p), g).flatten(0, 1))
    d_edge_weight += torch.einsum("nhd,nhk->hdk", g, c)
    if geometry:
        f = along_r(u, x.d2, basis, p, (decay[x.i][..., None] * ds).sum(1))
        i, crystal = (y[:, None].expand_as(x.j) for y in (x.i, x.crystal))
        add_displacement(d_positions, d_lattice, f[..., None] * x.r, i, x.j, crystal, images.shift[rows.entry])


def encoding_pairs_backward(
    grads: Tensors,
    inputs: Tensors,
    results: Tensors,
    totals: Tensors,
    geometry: bool,
    images: ImageList,
    basis: RadialBasis | None,
    pairs: Segments,
) -> None:
    """ds_e = p_e (g_alpha + u_ij·(b_e - c_ij)), p_e the share of image e in its own pair.  Equation (B11)."""
    (g_alpha, g_beta), (decay, edge_weight, positions, lattice), _ = grads, inputs, results
    d_decay, d_edge_weight, d_positions, d_lattice = totals
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    i, j = (x[pairs.first : pairs.last, None].expand_as(pairs.entry) for x in pair_atoms(images))
    r, d2, log_count = distances(positions, lattice, images, pairs.entry, crystal, i, j)
    a = decay[i[:, 0]]
    p = torch.softmax(
        (log_count[:, None] - a[:, :, None] * d2[:, None]).masked_fill(~pairs.real[:, None], -math.inf), -1
    )
    u = torch.einsum("hdk,nhd->nhk", edge_weight, g_beta)
    u_b = times_basis(u, d2, basis)
    ds = p * (g_alpha[..., None] + u_b - (p * u_b).sum(-1, keepdim=True))
    d_decay.index_add_(0, i[:, 0], -(ds * d2[:, None]).sum(-1))
    if basis is not None:
        d_edge_weight += torch.einsum("nhd,nhk->hdk", g_beta, p @ basis(root(d2)))
    if geometry:
        f = along_r(u, d2, basis, p, (a[..., None] * ds).sum(1))
        add_displacement(d_positions, d_lattice, f[..., None] * r, i, j, crystal[i], images.shift[pairs.entry])


def reciprocal_rows_backward(
    grads: Tensors, inputs: Tensors, results: Tensors, totals: Tensors, geometry: bool, x: PaddedCrystals
) -> None:
    """Dense attention with alpha = log S + ..., S = sum_G w cos(G·r): dS = ds / S unclamped.  Equation (B12).

    The terms of alpha that do not depend on j do not change the softmax, so they have no gradient.
    """
    if geometry and x.positions is not None:
        raise ValueError("wave_vectors must be of all atoms, not of orbits, for the gradients of positions and lattice")
    (grad,), (q, k, v, decay_reciprocal, positions, lattice) = grads, inputs
    dq, dk, dv, d_decay, d_positions, d_lattice = totals
    t = reciprocal_sums(decay_reciprocal, positions, lattice, x)
    p = reciprocal_weights(q, k, t.total, x)
    grad = x.pad(grad)
    gamma = torch.einsum("crhd,cnhd->crhn", grad, v[x.column])
    ds = p * (gamma - (p * gamma).sum(-1, keepdim=True))
    column, row = x.column.flatten(), x.row.flatten()
    scaled = ds / math.sqrt(q.shape[-1])
    dq.index_add_(0, row, torch.einsum("crhn,cnhd->crhd", scaled, k[x.column]).flatten(0, 1))
    dk.index_add_(0, column, torch.einsum("crhn,crhd->cnhd", scaled, q[x.row]).flatten(0, 1))
    dv.index_add_(0, column, torch.einsum("crhn,crhd->cnhd", p, grad).flatten(0, 1))

    d_total = torch.where(t.total > RECIPROCAL_CLAMP, ds / t.total, 0.0)
    add_sums(t, d_total, inputs[3:], (d_decay, d_positions, d_lattice), geometry, x)


def reciprocal_pairs_backward(
    grads: Tensors,
    inputs: Tensors,
    results: Tensors,
    totals: Tensors,
    geometry: bool,
    x: PaddedCrystals,
    num_pairs: int,
) -> None:
    """The sums S alone."""
    decay_reciprocal, positions, lattice = inputs
    t = reciprocal_sums(decay_reciprocal, positions, lattice, x)
    add_sums(t, x.pad_pairs(grads[0]), inputs, totals, geometry, x)


def add_sums(
    t: ReciprocalSums, d_total: Tensor, inputs: Tensors, totals: Tensors, geometry: bool, x: PaddedCrystals
) -> None:
    """From dS (c,r,H,n) to the gradients of decay_reciprocal, positions and lattice.  Equation (B12)."""
    decay_reciprocal, positions, lattice = inputs
    d_decay, d_positions, d_lattice = totals
    atom, row = x.atom.flatten(), x.row.flatten()
    cos_i, sin_i, cos_j, sin_j = t.phase_i.cos(), t.phase_i.sin(), t.phase_j.cos(), t.phase_j.sin()
    by_cos, by_sin = ((d_total.flatten(1, 2) @ y).unflatten(1, d_total.shape[1:3]) for y in (cos_j, sin_j))  # (c,r,H,G)
    d_exponent = t.weight * (by_cos * cos_i[:, :, None] + by_sin * sin_i[:, :, None])
    length2 = t.vectors.square().sum(-1)
    d_decay.index_add_(0, row, -torch.einsum("crhg,cg->crh", d_exponent, length2).flatten(0, 1))
    if not geometry:
        return
    d_phase_i = (t.weight * (by_sin * cos_i[:, :, None] - by_cos * sin_i[:, :, None])).sum(2)
    from_cos, from_sin = (
        d_total.flatten(1, 2).mT @ (t.weight * y[:, :, None]).flatten(1, 2) for y in (cos_i, sin_i)
    )  # (c,n,G)
    d_phase_j = from_sin * cos_j - from_cos * sin_j
    d_length2 = -torch.einsum("crh,crhg->cg", decay_reciprocal[x.row], d_exponent)
    d_positions.index_add_(0, row, (d_phase_i @ t.vectors).flatten(0, 1))
    d_positions.index_add_(0, atom, (d_phase_j @ t.vectors).flatten(0, 1))
    d_vectors = d_phase_i.mT @ positions[x.row] + d_phase_j.mT @ positions[x.atom]
    d_vectors = d_vectors + 2 * d_length2[..., None] * t.vectors
    # B = 2 pi L^-T, so dL = -B dB^T B / (2 pi)
    b = reciprocal(lattice[x.crystals])
    d_lattice[x.crystals] -= b @ (x.g.to(b.dtype).mT @ d_vectors).mT @ b / (2 * math.pi)
