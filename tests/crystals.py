"""Crystals that the tests share: random ones of awkward shapes, packed batches, and real prototypes.

Everything is seeded: the same arguments give the same crystal. Nothing here uses the library under test.
"""

import functools
import importlib
import itertools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

KINDS = ("cubic", "skewed", "needle", "plate", "left_handed")
NUM_ELEMENTS = 98
AXIS_RATIO = 30.0
CLOSE = 0.09  # Å, the distance of the first two atoms of a random crystal
# A site that gold and copper share, a whole sodium atom, and a site that chlorine fills half of the time.
DISORDERED = [{79: 0.75, 29: 0.25}, {11: 1.0}, {17: 0.5}]

Geometry = tuple[Tensor, Tensor]


def import_or_skip(name: str, reason: str) -> ModuleType:
    """`pytest.importorskip` that forgives the warnings another library gives while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.split(".")[0] in ("pymatgen", "ase"):
            pytest.importorskip(name.split(".")[0], reason=reason, exc_type=ImportError)
            return importlib.import_module(name)
        module: ModuleType = pytest.importorskip(name, reason=reason, exc_type=ImportError)
        return module


def rotation(rng: np.random.Generator) -> np.ndarray:
    """(3,3) a random proper rotation."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def cell(lengths: Sequence[float], angles: Sequence[float]) -> np.ndarray | None:
    """(3,3) the right-handed cell of three lengths (Å) and three angles (degrees), or None if there is none."""
    alpha, beta, gamma = np.cos(np.radians(np.asarray(angles, dtype=float)))
    sine = np.sqrt(1 - gamma**2)
    y = (alpha - beta * gamma) / sine
    z2 = 1 - beta**2 - y**2
    if z2 <= 0:
        return None
    return np.asarray(lengths, dtype=float)[:, None] * np.array([[1, 0, 0], [gamma, sine, 0], [beta, y, np.sqrt(z2)]])


def _triclinic(rng: np.random.Generator, volume: float, extreme: bool) -> np.ndarray:
    """A cell with angles from 20 to 160 degrees, one of them near an end if `extreme`; else from 60 to 120."""
    while True:
        lengths = rng.uniform(0.6, 1.6, size=3)
        angles = rng.uniform(20, 160, size=3) if extreme else rng.uniform(60, 120, size=3)
        if extreme:
            angles[rng.integers(3)] = rng.choice([20, 25, 30, 150, 155, 160])
        lattice = cell(lengths, angles)
        # Flatter cells than this exist for such angles, and cost the oracles minutes.
        if lattice is not None and np.linalg.det(lattice) / lengths.prod() > 0.05:
            return lattice * (volume / np.linalg.det(lattice)) ** (1 / 3)


def random_crystal(kind: str, seed: int, num_atoms: int) -> Geometry:
    """A random crystal, turned at random.

    Atoms lie anywhere from one and a half cells before the cell to one and a half behind it; the first two, if there
    are two, are closer than 0.1 Å, up to a lattice vector.

    Args:
        kind: "cubic"; "skewed", angles from 20 to 160 degrees, one of them extreme; "needle", one axis 30 times the
            others; "plate", two axes 30 times the other; "left_handed", triclinic.

    Returns:
        positions (num_atoms,3) and lattice (3,3), fp64, Å.
    """
    rng = np.random.default_rng([KINDS.index(kind), seed, num_atoms])
    volume = num_atoms * rng.uniform(10, 30)
    if kind == "cubic":
        lattice = np.eye(3) * volume ** (1 / 3)
    elif kind in ("needle", "plate"):
        edges = np.full(3, rng.uniform(2, 3))
        edges[rng.permutation(3)[: 1 if kind == "needle" else 2]] *= AXIS_RATIO
        lattice = np.diag(edges)
    else:
        lattice = _triclinic(rng, volume, kind == "skewed")
    lattice = lattice @ rotation(rng)
    if kind == "left_handed":
        lattice = lattice[[1, 0, 2]]
    positions = rng.uniform(-1.5, 2.5, size=(num_atoms, 3)) @ lattice
    if num_atoms > 1:
        positions[1] = positions[0] + CLOSE * rotation(rng)[0] + rng.integers(-1, 2, size=3) @ lattice
    return torch.from_numpy(positions), torch.from_numpy(lattice)


def occupancies(mixtures: list[dict[int, float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """(n,98) the share of each element on each site, from {atomic number: share}."""
    result = torch.zeros(len(mixtures), NUM_ELEMENTS, dtype=dtype)
    for row, mixture in zip(result, mixtures, strict=True):
        for z, share in mixture.items():
            row[z - 1] = share
    return result


def pack(crystals: Sequence[Geometry]) -> tuple[Tensor, Tensor, Tensor]:
    """positions (N,3), lattice (C,3,3) and ptr (C+1) of crystals given as (positions, lattice)."""
    size = torch.tensor([0] + [len(positions) for positions, _ in crystals])
    if not crystals:
        return torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, 3, dtype=torch.float64), size
    return torch.cat([p for p, _ in crystals]), torch.stack([m for _, m in crystals]), size.cumsum(0)


def geometry(structure: Any) -> Geometry:
    """positions (n,3) and lattice (3,3), fp64, Å, of a pymatgen Structure."""
    return torch.tensor(structure.cart_coords.tolist()).double(), torch.tensor(
        structure.lattice.matrix.tolist()
    ).double()


@functools.lru_cache
def aflow_prototypes(limit: int | None = None, max_atoms: int | None = None) -> list[Any]:
    """Ordered pymatgen Structures of the AFLOW prototypes with elements up to 98; skips the test without pymatgen.

    Args:
        limit: at most so many, spread evenly over the library.
        max_atoms: none with more atoms in the cell.
    """
    module = import_or_skip("pymatgen.analysis.prototypes", reason="the AFLOW prototypes come with pymatgen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [entry["snl"].structure for entry in module.AFLOW_PROTOTYPE_LIBRARY]
    found = [s for s in found if s.is_ordered and all(e.Z <= NUM_ELEMENTS for e in s.composition.elements)]
    found = [s for s in found if max_atoms is None or len(s) <= max_atoms]
    if limit is not None and limit < len(found):
        found = [found[k * len(found) // limit] for k in range(limit)]
    return found


def box_images(positions: Tensor, lattice: Tensor, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images with d <= radius of one crystal, from a box of translations that covers the sphere.

    Returns:
        pair (M), i·n + j; shift (M,3); d² (M), Å². Sorted by pair, then by shift.
    """
    p, m = positions.double().numpy(), lattice.double().numpy()
    inverse = np.linalg.inv(m)
    # A sphere of radius R reaches R |b_k| cells along axis k, b_k the k-th reciprocal vector.
    reach = radius * np.linalg.norm(inverse, axis=0)
    found = []
    for pair, (i, j) in enumerate(itertools.product(range(len(p)), repeat=2)):
        fraction = (p[j] - p[i]) @ inverse
        axes = [np.arange(np.floor(-f - r), np.ceil(-f + r) + 1) for f, r in zip(fraction, reach, strict=True)]
        # |x + y + z|² over the box without storing its points three times.
        planes = [(p[j] - p[i]) + axes[0][:, None] * m[0]]
        for axis in (1, 2):
            planes.append((planes[-1][..., None, :]) + axes[axis][:, None] * m[axis])
        d2 = (planes[-1] ** 2).sum(-1)
        index = np.nonzero(d2 <= radius**2)
        shift = np.stack([a[k] for a, k in zip(axes, index, strict=True)], 1).astype(np.int64)
        found.append((np.full(len(shift), pair), shift, d2[index]))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def list_images(images: Any, positions: Tensor, lattice: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The images of a list of one crystal in the form of `box_images`, distances computed anew."""
    p, m = positions.double().numpy(), lattice.double().numpy()
    row = np.repeat(np.arange(len(p)), np.diff(images.row_ptr.numpy()))
    col, shift = images.col.numpy().astype(np.int64), images.shift.numpy().astype(np.int64)
    d2 = ((p[col] - p[row] + shift @ m) ** 2).sum(1)
    return row * len(p) + col, shift, d2


def between_shells(distances: np.ndarray, near: float) -> float:
    """A radius within 15 % of `near` that no distance is close to: the middle of the widest gap."""
    edges = np.concatenate([[0.85 * near], np.sort(distances[np.abs(distances / near - 1) < 0.15]), [1.15 * near]])
    k = int(np.diff(edges).argmax())
    return float(edges[k] + edges[k + 1]) / 2
