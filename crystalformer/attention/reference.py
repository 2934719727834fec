"""The theory in plain PyTorch, which every kernel is compared with. Equation numbers are those of docs/math.md.

`attention_rows`, `encoding_pairs` and `reciprocal_rows` are the three sums, differentiable to any order in all their
floating-point arguments. Each works on some consecutive rows (atoms) or pairs, so that memory stays bounded: the
`_parts` functions cut the whole into such pieces, and `ops` evaluates and differentiates them one after another.

Shapes: N atoms, C crystals, M images, P = sum_c n_c² pairs, H heads, D and Dv head dimensions, K basis functions.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.ragged import crystal_of_atom, offsets, ordinals
from ..geometry.image_list import ImageList
from ..geometry.lattice import reciprocal
from ..geometry.wave_vectors import WaveVectors
from .basis import RadialBasis

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


def distances(
    positions: Tensor, lattice: Tensor, images: ImageList, entry: Tensor, crystal: Tensor, i: Tensor, j: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """r (...,3), d² (...) and log m (...) of entries of a list, their places and atoms i and j given, each (...).

    Each is one image, m = 1, but of orbits: then r is not one vector, and here it is zero.
    """
    if images.distance is None or images.repeats is None:
        r = displacement(positions, lattice, crystal, i, j, images.shift[entry])
        return r, r.square().sum(-1), r.new_zeros(entry.shape)
    d2 = images.distance[entry].square().to(positions.dtype)
    return positions.new_zeros(*entry.shape, 3), d2, images.repeats[entry].to(positions.dtype).log()


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
        j, r, d2, log_count: (n,m), (n,m,3), (n,m), (n,m) of each entry.
        partner: (n,p) all atoms of the crystal, the last one repeated where it has fewer.
        place: (n,m) where in `partner` j is.
    """

    i: Tensor
    crystal: Tensor
    j: Tensor
    r: Tensor
    d2: Tensor
    log_count: Tensor
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
    j = images.col[rows.entry].long()
    r, d2, log_count = distances(positions, lattice, images, rows.entry, crystal_of, i[:, None].expand_as(j), j)
    first, size = images.ptr[crystal_of[i]], images.ptr.diff()[crystal_of[i]]
    partner = torch.arange(int(size.max()), device=i.device)
    partner = first[:, None] + torch.minimum(partner, size[:, None] - 1)
    return RowImages(i, crystal_of[i], j, r, d2, log_count, partner, j - first[:, None])


def attention_scores(q: Tensor, k: Tensor, decay: Tensor, x: RowImages, rows: Segments) -> tuple[Tensor, Tensor]:
    """s_e = q_i·k_j / sqrt(D) - a_i d_e² + log m_e - t_i, (n,H,m), and t_i (n,H).  Equations (2) and (19).

    t_i is the row's largest content score: so the distance is not lost where content scores are large. In the padding
    s is minus infinity.
    """
    content = torch.einsum("nhd,nphd->nhp", q[x.i], k[x.partner]) / math.sqrt(q.shape[-1])
    content = x.by_image(content)
    top = content.detach().amax(-1)
    s = content - top[..., None] - decay[x.i][:, :, None] * x.d2[:, None] + x.log_count[:, None]
    return s.masked_fill(~rows.real[:, None], -math.inf), top


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
    s, top = attention_scores(q, k, decay, x, rows)
    lse = torch.logsumexp(s, -1) + top
    p = torch.softmax(s, -1)
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
    return offsets(count)


def pair_atoms(images: ImageList) -> tuple[Tensor, Tensor]:
    """(P), (P): atoms i and j of each pair."""
    crystal = crystal_of_atom(images.ptr, images.num_atoms)
    size, first = images.ptr.diff()[crystal], images.ptr[crystal]
    i = torch.repeat_interleave(size)
    return i, ordinals(size, i) + first[i]


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
    _, d2, log_count = distances(positions, lattice, images, pairs.entry, crystal, i, j)
    s = log_count[:, None] - decay[i[:, 0]][:, :, None] * d2[:, None]
    s = s.masked_fill(~pairs.real[:, None], -math.inf)
    alpha = torch.logsumexp(s, -1)
    if basis is None:
        return alpha, alpha.new_zeros(*alpha.shape, 0)
    c = torch.softmax(s, -1) @ basis(root(d2))
    return alpha, torch.einsum("hdk,nhk->nhd", edge_weight, c)


def encoding_parts(decay: Tensor, images: ImageList, basis: RadialBasis | None) -> Iterator[Part]:
    """`encoding_pairs` cut into pairs: functions of decay, edge_weight, positions, lattice."""
    made = decay.shape[1] * (1 + (basis.num if basis else 0))
    for pairs in chunks(pair_ptr(images), made):
        yield part(slice(pairs.first, pairs.last), encoding_pairs, images=images, basis=basis, pairs=pairs)


@dataclass(frozen=True)
class PaddedCrystals:
    """Rows of c consecutive crystals, padded to n atoms, r rows and G wave vectors each.

    Attributes:
        crystals: which.
        atom: (c,n) their atoms, the last one repeated; real: (c,n) whether it is an atom, not padding.
        column: (c,n) the row of each of these atoms, whose key and value it has: the atom itself where rows are atoms.
        row: (c,r) the rows, the last one repeated; place: (rows) where in (c,r) each row is.
        first: (c,r) the atom that is each row's.
        g: (c,G,3) the wave vectors; count: (c,G) 1 for the zero vector, 2 for G and -G, 0 for padding.
        positions: (P,3) the atoms of a list of orbits; None where positions are an argument.
    """

    crystals: slice
    atom: Tensor
    real: Tensor
    column: Tensor
    row: Tensor
    place: Tensor
    first: Tensor
    g: Tensor
    count: Tensor
    positions: Tensor | None

    def rows(self, x: Tensor) -> Tensor:
        """(rows, ...) of (c,r, ...)."""
        return x.flatten(0, 1)[self.place]

    def pad(self, x: Tensor) -> Tensor:
        """(c,r, ...) of (rows, ...), zero in the padding."""
        zeros = x.new_zeros(self.row.numel(), *x.shape[1:])
        return zeros.index_copy(0, self.place, x).unflatten(0, self.row.shape)

    def _pairs(self, number: int) -> tuple[Tensor, Tensor]:
        """(pairs) where in (c,r) the row of each pair is, and in n its column; of the rows, with all their atoms."""
        count = self.real.sum(1)[self.place // self.row.shape[1]]
        row = torch.repeat_interleave(count, output_size=number)
        return self.place[row], ordinals(count, row)

    def pairs(self, x: Tensor, number: int) -> Tensor:
        """(pairs,H) of (c,r,H,n), so many pairs."""
        return x.transpose(2, 3).flatten(0, 1)[self._pairs(number)]

    def pad_pairs(self, x: Tensor) -> Tensor:
        """(c,r,H,n) of (pairs,H), zero in the padding."""
        zeros = x.new_zeros(self.row.numel(), self.atom.shape[1], x.shape[1])
        return zeros.index_put(self._pairs(len(x)), x).unflatten(0, self.row.shape).transpose(2, 3)


def pad_segments(ptr: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(s,longest) the entries of s segments, the last one repeated, and whether it is an entry, not padding."""
    entry = ptr[:-1, None] + torch.arange(longest, device=ptr.device)
    return torch.minimum(entry, ptr[1:, None] - 1), entry < ptr[1:, None]


def pad_crystals(
    waves: WaveVectors, crystals: slice, rows: slice, max_atoms: int, max_rows: int, max_vectors: int
) -> PaddedCrystals:
    atom, real = pad_segments(waves.column_ptr[crystals.start : crystals.stop + 1], max_atoms)
    ptr = waves.ptr[crystals.start : crystals.stop + 1]
    row_ptr = ptr.clamp(rows.start, rows.stop)
    row, _ = pad_segments(row_ptr, min(max_rows, rows.stop - rows.start))
    column, first = atom, row
    if waves.atom_ptr is not None and waves.positions is not None:
        column = torch.repeat_interleave(waves.atom_ptr.diff(), output_size=len(waves.positions))[atom]
        first = waves.atom_ptr[row]
    here = torch.arange(rows.start, rows.stop, device=ptr.device)
    segment = torch.repeat_interleave(row_ptr.diff(), output_size=len(here))
    entry, real_vector = pad_segments(waves.g_ptr[crystals.start : crystals.stop + 1], max_vectors)
    g = waves.g[entry]
    count = torch.where((g == 0).all(-1), 1, 2) * real_vector
    place = segment * row.shape[1] + here - row_ptr[segment]
    return PaddedCrystals(crystals, atom, real, column, row, place, first, g, count, waves.positions)


@dataclass(frozen=True)
class ReciprocalSums:
    """Of c crystals: vectors (c,G,3); phase_i (c,r,G), phase_j (c,n,G); weight (c,r,H,G) of each vector; total
    (c,r,H,n), the sum over G."""

    vectors: Tensor
    phase_i: Tensor
    phase_j: Tensor
    weight: Tensor
    total: Tensor


def reciprocal_sums(decay_reciprocal: Tensor, positions: Tensor, lattice: Tensor, x: PaddedCrystals) -> ReciprocalSums:
    """S_ij = sum_G exp(-c_i |G|²) cos(G·r_ij), of equation (13).

    cos(G·(p_j - p_i)) = cos G·p_i cos G·p_j + sin G·p_i sin G·p_j makes the sum a matrix product.
    """
    vectors = x.g.to(lattice.dtype) @ reciprocal(lattice[x.crystals])
    where = positions if x.positions is None else x.positions.to(positions.dtype)
    phase_i, phase_j = where[x.first] @ vectors.mT, where[x.atom] @ vectors.mT
    length2 = vectors.square().sum(-1)
    weight = torch.exp(-decay_reciprocal[x.row][..., None] * length2[:, None, None]) * x.count[:, None, None]
    by_cos, by_sin = (weight * f(phase_i)[:, :, None] for f in (torch.cos, torch.sin))
    total = by_cos.flatten(1, 2) @ phase_j.cos().mT + by_sin.flatten(1, 2) @ phase_j.sin().mT
    return ReciprocalSums(vectors, phase_i, phase_j, weight, total.unflatten(1, weight.shape[1:3]))


def reciprocal_weights(q: Tensor, k: Tensor, total: Tensor, x: PaddedCrystals) -> Tensor:
    """softmax_j( q_i·k_j / sqrt(D) + log max(S_ij, 1e-6) ), (c,r,H,n), of S.  Equation (13).

    The other terms of alpha are the same for a whole row, so they do not change the softmax.
    """
    content = torch.einsum("crhd,cnhd->crhn", q[x.row], k[x.column]) / math.sqrt(q.shape[-1])
    score = content + total.clamp(min=RECIPROCAL_CLAMP).log()
    return torch.softmax(score.masked_fill(~x.real[:, None, None], -math.inf), -1)


def reciprocal_rows(
    q: Tensor, k: Tensor, v: Tensor, decay_reciprocal: Tensor, positions: Tensor, lattice: Tensor, x: PaddedCrystals
) -> tuple[Tensor]:
    """y_i = softmax_j( q_i·k_j / sqrt(D) + alpha_ij ) v_j of some rows, (rows,H,Dv).  Equations (13) and (20)."""
    p = reciprocal_weights(q, k, reciprocal_sums(decay_reciprocal, positions, lattice, x).total, x)
    return (x.rows(torch.einsum("crhn,cnhd->crhd", p, v[x.column])),)


def padded_crystals(num_rows: int, heads: int, waves: WaveVectors) -> Iterator[tuple[slice, PaddedCrystals]]:
    """Cuts the rows into consecutive parts whose weights (c,r,H,G) keep to CHUNK_ELEMENTS: many crystals at once, or
    some rows of a large one. Only if one part does not hold them all is a GPU asked for the sizes of the crystals."""
    if not num_rows:
        return
    max_rows = waves.max_rows or waves.max_atoms
    if waves.num_crystals * max_rows * heads * waves.max_vectors <= CHUNK_ELEMENTS:
        everything = slice(0, num_rows)
        crystals = slice(0, waves.num_crystals)
        yield everything, pad_crystals(waves, crystals, everything, waves.max_atoms, max_rows, waves.max_vectors)
        return
    ptr, atoms = waves.ptr.tolist(), waves.column_ptr.diff().tolist()
    size, vectors = waves.ptr.diff().tolist(), waves.g_ptr.diff().tolist()
    first = 0
    while first < len(size):
        last, max_rows, max_vectors = first + 1, size[first], vectors[first]
        while last < len(size):
            larger = max(max_rows, size[last]), max(max_vectors, vectors[last])
            if (last + 1 - first) * heads * math.prod(larger) > CHUNK_ELEMENTS:
                break
            last, (max_rows, max_vectors) = last + 1, larger
        step = ptr[last] - ptr[first] if last > first + 1 else max(1, CHUNK_ELEMENTS // (heads * max_vectors))
        for row in range(ptr[first], ptr[last], step):
            rows = slice(row, min(row + step, ptr[last]))
            yield rows, pad_crystals(waves, slice(first, last), rows, max(atoms[first:last]), max_rows, max_vectors)
        first = last


def reciprocal_parts(q: Tensor, waves: WaveVectors) -> Iterator[Part]:
    """`reciprocal_rows` cut into rows: functions of q, k, v, decay_reciprocal, positions, lattice."""
    for rows, x in padded_crystals(len(q), q.shape[1], waves):
        yield part(rows, reciprocal_rows, x=x)


def reciprocal_pairs(
    decay_reciprocal: Tensor, positions: Tensor, lattice: Tensor, x: PaddedCrystals, num_pairs: int
) -> tuple[Tensor]:
    """S of the pairs of some rows, (pairs,H).  Equation (13)."""
    return (x.pairs(reciprocal_sums(decay_reciprocal, positions, lattice, x).total, num_pairs),)


def reciprocal_pairs_parts(decay_reciprocal: Tensor, waves: WaveVectors, num_pairs: int) -> Iterator[Part]:
    """`reciprocal_pairs` cut into rows: functions of decay_reciprocal, positions, lattice."""
    num_atoms, heads = decay_reciprocal.shape
    for rows, x in padded_crystals(num_atoms, heads, waves):
        pairs = slice(0, num_pairs)
        if rows != slice(0, num_atoms):
            size = waves.ptr.diff()[crystal_of_atom(waves.ptr, num_atoms)]
            pairs = slice(int(size[: rows.start].sum()), int(size[: rows.stop].sum()))
        yield part(pairs, reciprocal_pairs, x=x, num_pairs=pairs.stop - pairs.start)
