"""Attention over an edge list, as one writes it with index_add or in PyTorch Geometric, and by flex_attention.

`edge-list` takes its images from this library: it is as exact, and has a list made beforehand.
`flex-attention` takes alpha from `periodic_encoding` and adds it to the scores of torch's flex_attention. It has no
place for the values' encoding, so it does the paper's simplified model alone; on the CPU torch gives it no backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import crystalformer as cf

from ..cases import Absent, Case, Provider, attention_case, require_memory
from ..problems import Problem
from ..truth import edge_attention
from .swapped import training_with

BOUND = 1e-4


def edge_list(x: Problem) -> Callable[..., Tensor]:
    images, size = x.images, x.size
    # Gathered q, k and v, the messages and the gradients of these, one number each an edge and channel.
    channels = 8 * size.heads * size.dim + 2 * size.num_basis
    require_memory(images.num_images * channels * x.upstream.itemsize, x.device)
    i = torch.repeat_interleave(images.row_ptr.diff())
    j, shift = images.col.long(), images.shift.to(x.dtype)
    crystal = torch.repeat_interleave(images.ptr.diff())[i]

    def distances(positions: Tensor, lattice: Tensor) -> tuple[Tensor, Tensor | None]:
        r = positions[j] - positions[i] + (shift[:, None] @ lattice[crystal])[:, 0]
        d2 = r.square().sum(-1)
        itself = d2 == 0
        d = torch.where(itself, 0.0, torch.where(itself, 1.0, d2).sqrt())
        return d2, size.basis(d) if size.basis else None

    ready = distances(x.crystals.positions, x.crystals.lattice)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        positions: Tensor,
        lattice: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        d2, b = distances(positions, lattice) if positions.requires_grad else ready
        return edge_attention(q, k, v, decay, weight, i, j, d2, b)

    return attend


def _edge_list(x: Problem) -> Case:
    return attention_case(x, edge_list(x), geometry=True)


def _flex(x: Problem) -> Case:
    if x.size.num_basis:
        raise Absent("no place for the values' encoding: see size 'simple'")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Absent(f"torch has no flex_attention: {error}") from error
    n, ptr, images = x.crystals.num_atoms, x.crystals.ptr, x.pair_images
    crystal = torch.repeat_interleave(ptr.diff())
    size = ptr.diff()
    first_pair = (size[crystal].cumsum(0) - size[crystal]) - ptr[crystal]
    mask = create_block_mask(lambda b, h, i, j: crystal[i] == crystal[j], None, None, n, n, device=x.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, positions: Tensor, lattice: Tensor) -> Tensor:
        alpha, _ = cf.periodic_encoding(decay, positions, lattice, images)

        def add_alpha(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + alpha[torch.where(crystal[i] == crystal[j], first_pair[i] + j, 0), h]

        batch = (y.transpose(0, 1)[None] for y in (q, k, v))
        return compiled(*batch, score_mod=add_alpha, block_mask=mask)[0].transpose(0, 1)

    case = attention_case(x, attend, backward=x.device.type == "cuda")
    if x.device.type == "cpu":
        case.notes["forward and backward"] = "torch has no backward of flex_attention on the CPU"
    return case


PROVIDERS = [
    Provider("edge-list", "attention", BOUND, _edge_list),
    Provider("flex-attention", "attention", BOUND, _flex),
    Provider("edge-list", "training", BOUND, training_with(edge_list)),
]
