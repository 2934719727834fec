"""How exact a truncated sum is: against a fixed cutoff, against `tol`, and by the rules of the paper's code: `error`.

The error of an atom is |y - exact| / |exact| over all its heads and channels; exact is the sum over a list for tol
1e-15, in fp64, all heads with one decay. Rules:

cutoff R      all images within R
tol           this library's lists, certified for the decay and the tolerance
box n         all images that are at most n cells away along each axis: the paper's PyTorch path, with n = 2
adaptive s    a box that reaches s standard deviations, sigma = (2 a)^-1/2: n_k = ceil((s sigma + 0.01 Å) |b_k|), b_k
              the reciprocal vectors without 2 pi, and at least 2: the paper's CUDA path, with s = 3.5. `adaptive-bare`
              is without the minimum.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import crystalformer as cf

from .cases import GEOMETRY, WEIGHTS
from .problems import CERTIFICATE, Problem, make
from .truth import Images, attention

COLUMNS = ("problem", "decay", "rule", "value", "images", "images_per_atom", "median", "p90", "max", "note")
DECAYS = (0.1276, 0.2551)  # the smallest of the paper's model, and where its training starts
CUTOFFS = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)
TOLS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10)
TRUTH_TOL = 1e-15
SIGMAS, LEAST, SLACK = 3.5, 2, 0.01
BOXES = (1, 2, 3, 4)


def box_images(x: Problem, reach: Tensor) -> Images:
    """All images at most reach (C,3) cells away along the axes."""
    parts: list[tuple[Tensor, ...]] = []
    for crystal, (first, last) in enumerate(itertools.pairwise(x.crystals.ptr.tolist())):
        ranges = [torch.arange(-n, n + 1) for n in reach[crystal].tolist()]
        n = torch.cartesian_prod(*ranges)
        atoms = torch.arange(first, last)
        i, j = torch.cartesian_prod(atoms, atoms).T
        each = len(n)
        shift = n.repeat(len(i), 1).double()
        repeated = i.repeat_interleave(each), j.repeat_interleave(each)
        parts.append((*repeated, torch.full_like(repeated[0], crystal), shift))
    return Images(*(torch.cat(column) for column in zip(*parts, strict=True)))


def adaptive_reach(lattice: Tensor, decay: float, sigmas: float = SIGMAS, least: int = LEAST) -> Tensor:
    """(C,3) cells along each axis of the paper's adaptive box."""
    radius = sigmas / math.sqrt(2 * decay)
    reciprocal = torch.linalg.inv(lattice).norm(dim=1)
    return torch.ceil((radius + SLACK) * reciprocal).long().clamp(min=least)


def rules(x: Problem, decay: float) -> Iterator[tuple[str, float, Images]]:
    """Name, parameter and images of every rule."""
    batch = x.crystals
    geometry = (batch.positions, batch.lattice, batch.ptr)
    for cutoff in CUTOFFS:
        yield "cutoff", cutoff, Images.of(cf.build_images(*geometry, cutoff=float(cutoff)))
    for tol in TOLS:
        certificate = CERTIFICATE | {"tol": tol, "decay_min": decay}
        yield "tol", tol, Images.of(cf.build_images(*geometry, **certificate))
    for cells in BOXES:
        yield "box", cells, box_images(x, torch.full((batch.num_crystals, 3), cells))
    yield "adaptive", SIGMAS, box_images(x, adaptive_reach(batch.lattice, decay))
    yield "adaptive-bare", SIGMAS, box_images(x, adaptive_reach(batch.lattice, decay, least=0))


def measure(problems: tuple[str, ...] = ("w32", "needle"), smoke: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS, printed as they come."""
    for problem, decay in itertools.product(problems, DECAYS):
        x = make(problem, "smoke" if smoke else "paper", torch.float64, smoke=smoke)
        inputs = {name: x.inputs[name] for name in (*WEIGHTS, *GEOMETRY)}
        inputs["decay"] = torch.full_like(x.inputs["decay"], decay)
        batch, basis = x.crystals, x.size.basis
        certificate = CERTIFICATE | {"tol": TRUTH_TOL, "decay_min": decay}
        images = Images.of(cf.build_images(batch.positions, batch.lattice, batch.ptr, **certificate))
        exact = attention(images, basis, **inputs).flatten(1)
        for rule, value, images in rules(x, decay):
            y = attention(images, basis, **inputs).flatten(1)
            error = (y - exact).norm(dim=1) / exact.norm(dim=1)
            row = {
                "problem": problem, "decay": f"{decay:.4f}", "rule": rule, "value": float(value),
                "images": len(images.i), "images_per_atom": len(images.i) / batch.num_atoms,
                "median": float(error.median()), "p90": float(error.quantile(0.9)), "max": float(error.max()),
            }  # fmt: skip
            what = f"{problem:8} decay {decay:.4f}  {rule:13} {value:<8g} {row['images_per_atom']:7.0f} images an atom"
            print(f"{what}  median {row['median']:.0e}  largest {row['max']:.0e}", flush=True)
            yield row
