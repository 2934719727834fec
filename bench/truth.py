"""The equations once more, in fp64 and plain PyTorch, differentiated by autograd: what `gradients` and `error` hold
everything against. Nothing here is the library's but the image list, and that only as a list of which images there are.
"""

import itertools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import crystalformer as cf


@dataclass(frozen=True)
class Images:
    """i, j, crystal (M) and n (M,3), fp64."""

    i: Tensor
    j: Tensor
    crystal: Tensor
    shift: Tensor

    @classmethod
    def of(cls, images: cf.ImageList) -> "Images":
        i = torch.repeat_interleave(images.row_ptr.diff())
        crystal = torch.repeat_interleave(images.ptr.diff())[i]
        return cls(i, images.col.long(), crystal, images.shift.double())

    def of_rows(self, stop: int) -> "Images":
        """Those of the atoms before `stop`."""
        few = int(torch.searchsorted(self.i, stop))
        return Images(*(getattr(self, part.name)[:few] for part in fields(self)))

    def squared_distances(self, positions: Tensor, lattice: Tensor) -> Tensor:
        r = positions[self.j] - positions[self.i] + (self.shift[:, None] @ lattice[self.crystal])[:, 0]
        return r.square().sum(-1)


def encoded(d2: Tensor, basis: cf.RadialBasis | None) -> Tensor | None:
    """b(d) of squared distances; its derivative at d = 0 is zero."""
    itself = d2 == 0
    return basis(torch.where(itself, 0.0, torch.where(itself, 1.0, d2).sqrt())) if basis else None


def attention(
    images: Images,
    basis: cf.RadialBasis | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """y (N,H,D), equations (2) to (5)."""
    d2 = images.squared_distances(positions, lattice)
    return edge_attention(q, k, v, decay, weight, images.i, images.j, d2, encoded(d2, basis))


def encoding(
    images: Images,
    basis: cf.RadialBasis | None,
    ptr: Tensor,
    decay: Tensor,
    positions: Tensor,
    lattice: Tensor,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """alpha (P,H) and beta (P,H,D), equations (6) and (7)."""
    size = ptr.diff()
    first_pair = (size.square().cumsum(0) - size.square())[images.crystal]
    first_atom = ptr[images.crystal]
    pair = first_pair + (images.i - first_atom) * size[images.crystal] + images.j - first_atom
    d2 = images.squared_distances(positions, lattice)
    s = -decay[images.i] * d2[:, None]
    nearest = s.detach().new_full((int(size.square().sum()), s.shape[1]), -torch.inf)
    nearest = nearest.scatter_reduce(0, pair[:, None].expand_as(s), s.detach(), "amax")
    p = torch.exp(s - nearest[pair])
    total = torch.zeros_like(nearest).index_add(0, pair, p)
    alpha = total.log() + nearest
    b = encoded(d2, basis)
    if b is None or weight is None:
        return alpha, None
    encodings = (b @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2])
    beta = p.new_zeros(*nearest.shape, weight.shape[1]).index_add(0, pair, (p / total[pair])[..., None] * encodings)
    return alpha, beta


def reciprocal(
    ptr: Tensor, q: Tensor, k: Tensor, v: Tensor, decay_reciprocal: Tensor, positions: Tensor, lattice: Tensor
) -> Tensor:
    """y (N,H,D), equation (13)."""
    outputs = []
    for crystal, (first, last) in enumerate(itertools.pairwise(ptr.tolist())):
        atoms = slice(first, last)
        alpha = _alpha_over_waves(decay_reciprocal[atoms], positions[atoms], lattice[crystal])
        score = torch.einsum("ihd,jhd->ihj", q[atoms], k[atoms]) / q.shape[-1] ** 0.5 + alpha
        outputs.append(torch.einsum("ihj,jhd->ihd", score.softmax(-1), v[atoms]))
    return torch.cat(outputs)


def slow_alpha(ptr: Tensor, decay: Tensor, positions: Tensor, lattice: Tensor) -> Tensor:
    """alpha (P,H) of `encoding` for decays so small that the images would be millions: Poisson's sum, c = 1/(4 a)."""
    outputs = []
    for crystal, (first, last) in enumerate(itertools.pairwise(ptr.tolist())):
        alpha = _alpha_over_waves(1 / (4 * decay[first:last]), positions[first:last], lattice[crystal])
        outputs.append(alpha.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _alpha_over_waves(c: Tensor, positions: Tensor, cell: Tensor, tol: float = 1e-14) -> Tensor:
    """alpha (n,H,n) of one crystal over a box of reciprocal vectors that leaves out less than tol; c (n,H) in Å²."""
    vectors = 2 * math.pi * torch.linalg.inv(cell).mT
    # |G| >= |n_k| 2 pi / |a_k|: beyond this box all terms are small.
    reach = math.sqrt((3 - math.log(tol)) / float(c.detach().min()))
    most = [math.ceil(reach * float(row.norm()) / (2 * math.pi)) for row in cell.detach()]
    ranges = [torch.arange(-n, n + 1, dtype=c.dtype, device=c.device) for n in most]
    g = torch.cartesian_prod(*ranges)
    # Chosen without its derivative: which vectors are there does not depend on the cell.
    g = g[(g @ vectors.detach()).norm(dim=-1) <= reach] @ vectors
    r = positions[None] - positions[:, None]
    cosine = torch.cos(r @ g.mT)  # (n,n,G)
    total = torch.einsum("ihg,ijg->ihj", torch.exp(-c[..., None] * g.square().sum(-1)), cosine)
    volume = (torch.linalg.cross(cell[0], cell[1]) * cell[2]).sum().abs()
    return total.clamp(min=1e-6).log() + 1.5 * (4 * math.pi * c).log()[..., None] - volume.log()


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    weight: Tensor | None,
    i: Tensor,
    j: Tensor,
    d2: Tensor,
    b: Tensor | None,
) -> Tensor:
    """softmax over the edges i <- j of q·k/sqrt(D) - a d², of v_j + W b(d): one message an edge and head."""
    scores = (q[i] * k[j]).sum(-1) / q.shape[-1] ** 0.5 - decay[i] * d2[:, None]
    largest = torch.full_like(decay, -torch.inf)
    largest = largest.scatter_reduce(0, i[:, None].expand_as(scores), scores.detach(), "amax")
    p = torch.exp(scores - largest[i])
    p = p / torch.zeros_like(decay).index_add(0, i, p)[i]
    message = v[j] if b is None else v[j] + (b @ weight.flatten(0, 1).T).unflatten(1, v.shape[1:])
    return torch.zeros_like(v).index_add(0, i, p[..., None] * message)
