"""Attention as one writes it in PyTorch: all pairs times a box of ±2 cells, distances and basis made beforehand.

The box is that of the paper's code. It leaves out a few thousandths of the weight in small or flat cells, hence the
bound. `dense-compiled` is the same through torch.compile.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Absent, Case, Provider, attention_case, require_memory
from ..problems import Problem
from .swapped import training_with

BOX = 2
BOUND = 2e-2


def dense_attention(x: Problem) -> Callable[..., Tensor]:
    batch, size = x.crystals, x.size
    images = (2 * BOX + 1) ** 3
    # b (pairs, images, K), and scores, weights and their gradients (pairs, images, H), some at the same time.
    pairs = int(batch.ptr.diff().square().sum())
    require_memory(1.2 * pairs * images * (size.num_basis + 6 * size.heads) * batch.positions.itemsize, x.device)
    i, j, crystal = all_pairs(batch.ptr)
    cells = torch.arange(-BOX, BOX + 1, dtype=x.dtype, device=x.device)
    r = (batch.positions[j] - batch.positions[i])[:, None]
    r = r + (torch.cartesian_prod(cells, cells, cells) @ batch.lattice)[crystal]
    d2 = r.square().sum(-1)
    b = size.basis(d2.sqrt()) if size.basis else None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor | None = None, **geometry: Tensor
    ) -> Tensor:
        content = (q[i] * k[j]).sum(-1) / q.shape[-1] ** 0.5
        scores = content[:, None] - decay[i][:, None] * d2[:, :, None]
        largest = scores.detach().amax(1)
        largest = torch.full_like(decay, -torch.inf).scatter_reduce(0, i[:, None].expand_as(largest), largest, "amax")
        p = torch.exp(scores - largest[i][:, None])
        total = torch.zeros_like(decay).index_add(0, i, p.sum(1))
        y = torch.zeros_like(v).index_add(0, i, p.sum(1)[..., None] * v[j])
        if b is not None:
            c = q.new_zeros(*decay.shape, b.shape[-1]).index_add(0, i, p.mT @ b)
            y = y + torch.einsum("hdk,nhk->nhd", weight, c)
        return y / total[..., None]

    return attend


def all_pairs(ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms i and j (P) of all pairs and their crystal, crystal by crystal, row-major."""
    size = ptr.diff()
    crystal = torch.repeat_interleave(size.square())
    first = size.square().cumsum(0) - size.square()
    local = torch.arange(len(crystal), device=ptr.device) - first[crystal]
    return ptr[crystal] + local // size[crystal], ptr[crystal] + local % size[crystal], crystal


def _compiled(x: Problem) -> Callable[..., Tensor]:
    try:
        import torch._inductor.cpp_builder as builder

        if x.device.type == "cpu":
            builder.get_cpp_compiler()
    except Exception as error:
        raise Absent(f"torch.compile needs a C++ compiler: {error}") from error
    torch._dynamo.reset()
    return torch.compile(dense_attention(x), dynamic=False)


def _dense(x: Problem) -> Case:
    return attention_case(x, dense_attention(x))


def _dense_compiled(x: Problem) -> Case:
    return attention_case(x, _compiled(x))


PROVIDERS = [
    Provider("dense", "attention", BOUND, _dense),
    Provider("dense-compiled", "attention", BOUND, _dense_compiled),
    Provider("dense", "training", BOUND, training_with(dense_attention)),
]
