"""How much work an operation is, by its equations, and how fast the device could do it.

N atoms, M images, P pairs of atoms with an image in the list, H heads of dimension D = Dv, K basis functions. An
exponential, a root and a division count as one operation, a multiply-add as two.

Forward, equations (2) to (5) of docs/math.md: per image d² and d (9), per head its score, weight and part of the sum
(2 + 1 + 1), b(d) (4 K) and the sum c (2 H K); per pair q·k and p v (4 H D); per atom W c (2 H D K):

    F = M (9 + 4 H + 4 K + 2 H K) + 4 P H D + 2 N H D K

Backward: per image the weights and b once more (9 + 3 H + 4 K), u·b (2 H K), ds and the sums of p, ds and ds d² (6 H);
per pair q·k, g·v, dq, dk and dv (10 H D); per atom u, dW (4 H D K) and delta (2 H D):

    B = M (9 + 9 H + 4 K + 2 H K) + 10 P H D + N (4 H D K + 2 H D)

Bytes are those of the inputs read once and the outputs written once: for M images 16 bytes each (col and shift), for
atoms forward q, k, v, y (4 H D), decay (H), positions (3); backward q, k, v, y, g, dq, dk, dv (8 H D), decay, lse and
their gradients (3 H), c (H K); W once, and its gradient. The encoding has pairs in the place of atoms in y: it writes
alpha and beta, (1 + D) P H numbers, and has no q·k.

A kernel that is bound by instructions takes at least as long as all warps' schedulers need to issue them: its shells,
images of one pair at one distance, by the instructions a warp issues for one (as compiled for sm_90, see `Provider`),
over 4 a cycle and multiprocessor at the highest clock. `issue_percent` is this time over the measured one, for problems
in tiles of 4 groups of 8 shells. Not in it are what a loop does not hold, places of a tile without a shell, and that
the gradients of the geometry go over images, not shells, once more. But for `triton-graph` the measured time is that of
the host as well, of which small problems have more.

An implementation that leaves out terms below its tolerance does less than this, and may pass 100 % of the roofline.
"""

import functools
import math
from dataclasses import dataclass

import torch

from .measure import clock
from .problems import Problem
from .results import first_line

# (G, BG) of the tiles that the instructions are counted for.
COUNTED_TILE = (8, 4)


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def seconds(self, roof: "Roof") -> float:
        """The shortest time for it: of the arithmetic, or of the traffic, whichever is longer."""
        return max(self.flops / roof.flops, self.bytes / roof.bytes)


@dataclass(frozen=True)
class Roof:
    """What the device reaches: fp32 FLOP/s of a matrix product, bytes/s of a copy, as measured."""

    flops: float
    bytes: float


def work(x: Problem, op: str, direction: str) -> Work | None:
    """Of an operation forward, or forward and backward; None for what has no formula here."""
    size, n, m = x.size, x.crystals.num_atoms, x.images.num_images
    h, d, k, number = size.heads, size.dim, size.num_basis, x.upstream.itemsize
    if op == "encoding":
        m, p = x.pair_images.num_images, x.images.num_pairs
        forward = Work(m * (9 + 4 * h + 4 * k + 2 * h * k) + 2 * p * h * d * k, 16 * m + number * p * h * (1 + d))
        backward = Work(m * (9 + 9 * h + 4 * k + 2 * h * k) + 4 * p * h * d * k, 16 * m + number * p * h * (1 + d))
    elif op == "attention":
        p = x.pairs_in_reach
        forward = Work(
            m * (9 + 4 * h + 4 * k + 2 * h * k) + 4 * p * h * d + 2 * n * h * d * k,
            16 * m + number * (n * (4 * h * d + h + 3) + h * d * k),
        )
        backward = Work(
            m * (9 + 9 * h + 4 * k + 2 * h * k) + 10 * p * h * d + n * (4 * h * d * k + 2 * h * d),
            16 * m + number * (n * (8 * h * d + 3 * h + h * k) + 2 * h * d * k),
        )
    else:
        return None
    if direction == "forward":
        return forward
    if direction == "forward and backward":
        return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return None


def measure_roof(device: torch.device, smoke: bool = False) -> Roof:
    """The best of 40 fp32 products of square matrices (without tf32), and of 40 copies of 64 MiB, on a GPU of 1 GiB.

    Small matrices on a CPU: a product of 512 rows fits between two interruptions of a busy machine.
    """
    edge, numbers = (4096, 2**28) if device.type == "cuda" else (512, 2**24)
    if smoke:
        edge, numbers = 64, 2**16
    a = torch.randn(edge, edge, device=device)
    x = torch.empty(numbers, device=device)
    y = torch.empty_like(x)

    def best(function) -> float:
        return min(clock(function, device) for _ in range(40)) / 1e3

    return Roof(2 * edge**3 / best(lambda: a @ a), 2 * x.numel() * 4 / best(lambda: y.copy_(x)))


@functools.lru_cache
def issue_rate(device: torch.device) -> float:
    """Instructions a second that the warps of a GPU can issue together; NaN where its clock is not known."""
    query = ("--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    try:
        megahertz = float(first_line("nvidia-smi", "-i", str(device.index or 0), *query))
    except ValueError:
        return math.nan
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count * 1e6 * megahertz


def issue_percent(x: Problem, instructions: float, milliseconds: float, rate: float) -> float:
    """The share of a time that the issue of so many instructions a shell needs."""
    return 1e5 * x.shells * instructions / rate / milliseconds
