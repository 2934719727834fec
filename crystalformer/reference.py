"""The theory in plain PyTorch: what every kernel is held against. Equation numbers are those of docs/math.md.

`attention_rows`, `encoding_pairs` and `reciprocal_rows` are the three sums, differentiable to any order in all their
floating-point arguments. Each works on some consecutive rows (atoms) or pairs, so that memory stays bounded: the
`_parts` functions cut the whole into such pieces, and `ops` evaluates and differentiates them one after another.

Shapes: N atoms, C crystals, M images, P = sum_c n_c² pairs, H heads, D and Dv head dimensions, K basis functions.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .basis import RadialBasis
from .images import ImageList, crystal_of_atom
from .lattice import points_in_spheres, triangular
from .truncation import tail_radius2

# Images, or elements of the pair matrices, worked on at once.
CHUNK_IMAGES = 1 << 16
CHUNK_ELEMENTS = 1 << 24
# The paper's code clamps the sum over reciprocal vectors here; below it the gradient is zero.
RECIPROCAL_CLAMP = 1e-6


@dataclass(frozen=True)
class Part:
    """Some rows or pairs of a sum.

    Attributes:
        span: which.
        forward: their outputs, of all inputs.
        settings: what `forward` got besides, for the backward of `reference_backward`.
    """

    span: slice
    forward: Callable[..., tuple[Tensor, ...]]
    settings: dict[str, Any]


def part(span: slice, forward: Callable[..., tuple[Tensor, ...]], **settings: Any) -> Part:
    return Part(span, partial(forward, **settings), settings)


@dataclass(frozen=True)
class Segments:
    """Some consecutive rows (or pairs) with their images, padded to the longest.

    Attributes:
        first, last: the rows are first..last-1.
        entry: (n, m) place of each image in the list; padding repeats an image of the row.
        real: (n, m) whether it is an image, not padding.
    """

    first: int
    last: int
    entry: Tensor
    real: Tensor


def chunks(ptr: Tensor, elements_per_segment: int) -> Iterator[Segments]:
    """Cuts the segments ptr[s]..ptr[s+1] into chunks that keep to CHUNK_IMAGES and CHUNK_ELEMENTS."""
    count = ptr.diff()
    if not len(count):
        return
    longest = int(count.max())
    step = max(1, min(CHUNK_IMAGES // max(longest, 1), CHUNK_ELEMENTS // max(elements_per_segment, 1)))
    for first in range(0, len(count), step):
        last = min(first + step, len(count))
        m = torch.arange(int(count[first:last].max()), device=ptr.device)
        real = m < count[first:last, None]
        yield Segments(first, last, torch.where(real, ptr[first:last, None] + m, ptr[first:last, None]), real)


def displacement(positions: Tensor, lattice: Tensor, crystal: Tensor, i: Tensor, j: Tensor, shift: Tensor) -> Tensor:
    """r = (p_j - p_i) + n·L, (..., 3), Å, of images given by i, j (...) and n (..., 3).  Equation (1).

    In this order the image (j, i, -n) has exactly the negative r.
    """
    return positions[j] - positions[i] + (shift.to(positions.dtype)[..., None, :] @ lattice[crystal[i]]).squeeze(-2)


def root(d2: Tensor) -> Tensor:
    """sqrt(d²) whose derivatives of all orders are zero at d = 0, where an atom meets itself and r/d has no value."""
    positive = d2 > 0
    return torch.where(positive, torch.where(positive, d2, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class RowImages:
    """The images of n rows, padded to m, and the p atoms that they are images of.

    Attributes:
        i, crystal: (n) the rows' atoms and their crystals.
        j, shift, r, d2: (n,m), (n,m,3), (n,m,3), (n,m) of each image.
        partner: (n,p) all atoms of the crystal, the last one repeated where it has fewer.
        place: (n,m) where in `partner` j is.
    """

    i: Tensor
    crystal: Tensor
    j: Tensor
    shift: Tensor
    r: Tensor
    d2: Tensor
    partner: Tensor
    place: Tensor

    def by_image(self, x: Tensor) -> Tensor:
        """(n,H,m) of (n,H,p): q·k and g·v go by pair of atoms, because each pair has tens of images."""
        return x.gather(2, self.place[:, None].expand(-1, x.shape[1], -1))

    def sum_by_partner(self, x: Tensor) -> Tensor:
        """(n,H,p) of (n,H,m)."""
        zeros = x.new_zeros(*x.shape[:2], self.partner.shape[1])
        return zeros.scatter_add(2, self.place[:, None].expand_as(x), x)


def row_images(positions: Tensor, lattice: Tensor, images: ImageList, rows: Segments) -> RowImages:
    crystal_of = crystal_of_atom(images.ptr, images.num_atoms)
    i = torch.arange(rows.first, rows.last, device=positions.device)
    j, shift = images.col[rows.entry].long(), images.shift[rows.entry]
    r = displacement(positions, lattice, crystal_of, i[:, None].expand_as(j), j, shift)
    first, size = images.ptr[crystal_of[i]], images.ptr.diff()[crystal_of[i]]
    partner = torch.arange(int(size.max()), device=i.device)
    partner = first[:, None] + torch.minimum(partner, size[:, None] - 1)
    return RowImages(i, crystal_of[i], j, shift, r, r.square().sum(-1), partner, j - first[:, None])


def attention_scores(q: Tensor, k: Tensor, decay: Tensor, x: RowImages, rows: Segments) -> Tensor:
    """s_e = q_i·k_j / sqrt(D) - a_i d_e², (n,H,m), minus infinity in the padding.  Equation (2)."""
    content = torch.einsum("nhd,nphd->nhp", q[x.i], k[x.partner]) / math.sqrt(q.shape[-1])
    s = x.by_image(content) - decay[x.i][:, :, None] * x.d2[:, None]
    return s.masked_fill(~rows.real[:, None], -math.inf)


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    edge_weight: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    basis: RadialBasis | None,
    rows: Segments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Infinitely connected attention of some rows.  Equations (3) to (5).

        p_e = exp(s_e) / sum_e' exp(s_e')      lse_i = log sum_e exp(s_e)
        y_i = sum_e p_e v_j + W c_i            c_i = sum_e p_e b(d_e)

    Returns:
        y (n,H,Dv), lse (n,H), c (n,H,K); K = 0 without a basis.
    """
    x = row_images(positions, lattice, images, rows)
    s = attention_scores(q, k, decay, x, rows)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None])
    y = torch.einsum("nhp,nphd->nhd", x.sum_by_partner(p), v[x.partner])
    if basis is None:
        return y, lse, p[..., :0]
    c = p @ basis(root(x.d2))
    return y + torch.einsum("hdk,nhk->nhd", edge_weight, c), lse, c


def attention_parts(q: Tensor, v: Tensor, images: ImageList, basis: RadialBasis | None) -> Iterator[Part]:
    """`attention_rows` cut into rows: functions of q, k, v, decay, edge_weight, positions, lattice."""
    largest = int(images.ptr.diff().max()) if images.num_crystals else 0
    gathered = largest * q.shape[1] * (q.shape[2] + v.shape[2])
    for rows in chunks(images.row_ptr, gathered):
        yield part(slice(rows.first, rows.last), attention_rows, images=images, basis=basis, rows=rows)


def pair_ptr(images: ImageList) -> Tensor:
    """(P+1) where the images of each pair start: the list is sorted by row, then by col."""
    size = images.ptr.diff()
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    first_pair = size[crystal].cumsum(0) - size[crystal]
    row = torch.repeat_interleave(images.row_ptr.diff(), output_size=images.num_images)
    pair = first_pair[row] + images.col - images.ptr[crystal[row]]
    count = torch.bincount(pair, minlength=int(size.square().sum()))
    return torch.nn.functional.pad(count.cumsum(0), (1, 0))


def pair_atoms(images: ImageList) -> tuple[Tensor, Tensor]:
    """(P), (P): atoms i and j of each pair."""
    size = images.ptr.diff()[crystal_of_atom(images.ptr, images.num_atoms)]
    i = torch.repeat_interleave(size)
    first = images.ptr[:-1][crystal_of_atom(images.ptr, images.num_atoms)]
    return i, torch.arange(len(i), device=i.device) - (size.cumsum(0) - size)[i] + first[i]


def encoding_pairs(
    decay: Tensor,
    edge_weight: Tensor,
    positions: Tensor,
    lattice: Tensor,
    images: ImageList,
    basis: RadialBasis | None,
    pairs: Segments,
) -> tuple[Tensor, Tensor]:
    """Periodic spatial encodings of some pairs.  Equations (6) and (7).

        alpha_ij = log sum_n exp(-a_i d_ijn²)       beta_ij = W sum_n [exp(-a_i d_ijn²) / exp(alpha_ij)] b(d_ijn)

    Returns:
        alpha (n,H), beta (n,H,Dv); Dv = 0 without a basis.
    """
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    i, j = (x[pairs.first : pairs.last, None].expand_as(pairs.entry) for x in pair_atoms(images))
    d2 = displacement(positions, lattice, crystal, i, j, images.shift[pairs.entry]).square().sum(-1)
    s = -decay[i[:, 0]][:, :, None] * d2[:, None]
    s = s.masked_fill(~pairs.real[:, None], -math.inf)
    alpha = torch.logsumexp(s, -1)
    if basis is None:
        return alpha, alpha.new_zeros(*alpha.shape, 0)
    c = torch.exp(s - alpha[..., None]) @ basis(root(d2))
    return alpha, torch.einsum("hdk,nhk->nhd", edge_weight, c)


def encoding_parts(decay: Tensor, images: ImageList, basis: RadialBasis | None) -> Iterator[Part]:
    """`encoding_pairs` cut into pairs: functions of decay, edge_weight, positions, lattice."""
    made = decay.shape[1] * (1 + (basis.num if basis else 0))
    for pairs in chunks(pair_ptr(images), made):
        yield part(slice(pairs.first, pairs.last), encoding_pairs, images=images, basis=basis, pairs=pairs)


def reciprocal_vectors(lattice: Tensor, decay_min: float, tol: float) -> Tensor:
    """Half of the reciprocal lattice vectors that matter, as integers (G,3), the zero vector first.

    What is left out of sum_G exp(-c |G|²) cos(G·r) is at most `tol`, for every c >= decay_min and r. Equation (14).

    Args:
        lattice: (3,3), rows are the lattice vectors, Å.
        decay_min: smallest c that will be used, Å².
    """
    t, _ = triangular(reciprocal(lattice.detach().double())[None])
    radius2 = tail_radius2(t, decay_min, t.new_tensor([math.log(tol)]))
    _, g, _ = points_in_spheres(t, torch.zeros(1, dtype=torch.long, device=t.device), t.new_zeros(1, 3), radius2)
    return g[len(g) // 2 :]  # sorted, so the zero vector is in the middle and the rest is its mirror image


def reciprocal(lattice: Tensor) -> Tensor:
    """Rows are the reciprocal lattice vectors, Å^-1, 2 pi included: lattice @ result.T = 2 pi."""
    return 2 * math.pi * torch.linalg.inv(lattice).mT


@dataclass(frozen=True)
class ReciprocalTerms:
    """Of n rows of a crystal of m atoms: vectors (G,3); phase_i (n,G), phase_j (m,G); weight (n,H,G) of each vector;
    total (n,H,m), the sum over G; score (n,H,m)."""

    vectors: Tensor
    phase_i: Tensor
    phase_j: Tensor
    weight: Tensor
    total: Tensor
    score: Tensor


def reciprocal_terms(
    q: Tensor,
    k: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    crystal: int,
    atoms: slice,
    g: Tensor,
    rows: slice,
) -> ReciprocalTerms:
    """alpha_ij = log max( sum_G exp(-c_i |G|²) cos(G·r_ij), 1e-6 ) + 1.5 log(4 pi c_i) - log V.  Equation (13).

    cos(G·(r_j - r_i)) = cos G·r_i cos G·r_j + sin G·r_i sin G·r_j makes the sum a matrix product.

    Args:
        atoms, g: the crystal's atoms and its vectors from `reciprocal_vectors`; rows: some of the atoms.
    """
    cell, c = lattice[crystal], decay_reciprocal[rows][..., None]
    vectors = g.to(cell.dtype) @ reciprocal(cell)
    phase_i, phase_j = positions[rows] @ vectors.mT, positions[atoms] @ vectors.mT
    both = torch.where((g == 0).all(-1), 1.0, 2.0).to(cell.dtype)  # G and -G
    weight = both * torch.exp(-c * vectors.square().sum(-1))
    total = (weight * phase_i.cos()[:, None]) @ phase_j.cos().mT + (weight * phase_i.sin()[:, None]) @ phase_j.sin().mT
    alpha = total.clamp(min=RECIPROCAL_CLAMP).log() + 1.5 * (4 * math.pi * c).log()
    # Not linalg.det: inside torch.func its second derivative goes through an SVD, which is NaN for a cubic cell.
    alpha = alpha - (torch.linalg.cross(cell[0], cell[1]) * cell[2]).sum().abs().log()
    score = torch.einsum("ihd,jhd->ihj", q[rows], k[atoms]) / math.sqrt(q.shape[-1]) + alpha
    return ReciprocalTerms(vectors, phase_i, phase_j, weight, total, score)


def reciprocal_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_reciprocal: Tensor,
    positions: Tensor,
    lattice: Tensor,
    crystal: int,
    atoms: slice,
    g: Tensor,
    rows: slice,
) -> tuple[Tensor]:
    """y_i = softmax_j( q_i·k_j / sqrt(D) + alpha_ij ) v_j of some rows of one crystal, (n,H,Dv)."""
    terms = reciprocal_terms(q, k, decay_reciprocal, positions, lattice, crystal, atoms, g, rows)
    return (torch.einsum("ihj,jhd->ihd", torch.softmax(terms.score, -1), v[atoms]),)


def reciprocal_parts(q: Tensor, lattice: Tensor, ptr: Tensor, decay_min: float, tol: float) -> Iterator[Part]:
    """`reciprocal_rows` cut into rows: functions of q, k, v, decay_reciprocal, positions, lattice."""
    bounds = ptr.tolist()
    for crystal, (first, last) in enumerate(itertools.pairwise(bounds)):
        g = reciprocal_vectors(lattice[crystal], decay_min, tol)
        step = max(1, CHUNK_ELEMENTS // (len(g) * q.shape[1]))
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            yield part(rows, reciprocal_rows, crystal=crystal, atoms=slice(first, last), g=g, rows=rows)
