"""Block sizes and warps of the attention kernels, by shape: a fixed rule, no tuning at run time."""

import triton
from torch import Tensor

from .images import Layout, padded


def blocks(q: Tensor, v: Tensor, num: int, layout: Layout) -> dict[str, int]:
    """The compile-time sizes of the attention kernels: H, D, Dv, K, each padded to a power of two, and the tile."""
    heads, dim, value_dim = q.shape[1], q.shape[2], v.shape[2]
    group, groups = layout.shape
    sizes = {"H": heads, "D": dim, "DV": value_dim, "K": num, "G": group, "BG": groups}
    return sizes | {
        "BH": triton.next_power_of_2(heads),
        "BD": triton.next_power_of_2(dim),
        "BV": triton.next_power_of_2(value_dim),
        "BK": padded(num),
    }
