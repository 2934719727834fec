"""The problems by name: crystals from a seed or from w32.json, without a download and without pymatgen.

w32           the first 32 ordered prototypes with at most 20 atoms of the AFLOW library (Mehl et al., Comput. Mater.
              Sci. 2017), in the order of pymatgen, which w32.json was written from: 303 atoms
jarvis256     256 random crystals of 10 atoms on average
mp128         128 random crystals of 30 atoms on average
tiny          32 random crystals of 1 or 2 atoms
needle        one crystal of 40 atoms, 2.6 x 2.8 x 120 Å
bigcell-N     one crystal of N atoms in a nearly cubic cell
FILE          the first 128 crystals of a file or folder of yours, of any format that crystalformer.data.read_samples
              takes; this one needs pymatgen and ase

Random crystals have 10 to 25 Å³ an atom and no two atoms nearer than 0.7 times the edge of that volume. Their cells are
cubic, hexagonal, orthorhombic or triclinic with angles from 55 to 125 degrees, and their sizes follow a log-normal
distribution.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import crystalformer as cf
from crystalformer.attention.settings import Settings
from crystalformer.geometry.orbits import SYMMETRY_TOL
from crystalformer.model.structures import Crystal

if TYPE_CHECKING:
    from crystalformer.kernels.layout import Layout

W32 = Path(__file__).parent / "w32.json"
NAMES = ("w32", "jarvis256", "mp128", "tiny", "needle", "bigcell-320", "bigcell-1000", "bigcell-4000")
# What the lists are certified for: the paper's model.
CERTIFICATE = {"decay_min": 0.1275, "tol": 1e-6, "logit_range": 4.0}
DECAY_MIN = 0.1276
NEAREST = 0.7
# Of a cell with more atoms than the one, the other are checked, with all the gradients that they contribute to.
BIG, CHECKED = 2000, 256
# How far beyond the smallest decay the random ones go: the paper's model starts at twice the smallest.
DECAY_SPREAD = 0.3
# Å²: the smallest of the paper's model in reciprocal space, 0.5·2.2²/2, and how far beyond it the random ones go.
DECAY_RECIPROCAL_MIN, DECAY_RECIPROCAL_SPREAD = 1.21, 2.42


@dataclass(frozen=True)
class Size:
    """Heads H, their dimension D = Dv, basis functions K (0: the paper's simplified model), blocks of the model."""

    heads: int
    dim: int
    num_basis: int
    blocks: int = 4

    @property
    def basis(self) -> cf.RadialBasis | None:
        return cf.RadialBasis(self.num_basis, r_max=14.0) if self.num_basis else None

    @property
    def config(self) -> cf.CrystalformerConfig:
        width = self.heads * self.dim
        return cf.CrystalformerConfig(
            model_dim=width,
            num_heads=self.heads,
            num_blocks=self.blocks,
            ff_dim=4 * width,
            readout_dims=(width,),
            num_basis=self.num_basis,
        )


SIZES = {"paper": Size(8, 16, 64), "simple": Size(8, 16, 0), "wide": Size(8, 32, 128), "smoke": Size(2, 4, 8, blocks=1)}


@dataclass(frozen=True, eq=False)
class Problem:
    """Seeded inputs on some crystals.

    Attributes:
        crystals: in `dtype`, on the device.
        images: the list of the paper's model, tol 1e-6.
        inputs: q, k, v (N,H,D), decay and decay_reciprocal (N,H), weight (H,D,K) or None, positions, lattice: what is
            differentiated.
        upstream: (N,H,D) gradient of the output; zero but for the atoms that are checked.
        checked: how many, the first ones; None for all. The truth of a whole very big cell would take minutes.
    """

    name: str
    size_name: str
    crystals: cf.CrystalBatch
    images: cf.ImageList
    inputs: dict[str, Tensor | None]
    upstream: Tensor
    checked: int | None = None

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    @property
    def device(self) -> torch.device:
        return self.upstream.device

    @property
    def dtype(self) -> torch.dtype:
        return self.upstream.dtype

    @functools.cached_property
    def pair_images(self) -> cf.ImageList:
        """The list for `periodic_encoding`, where every pair has what its own sum needs."""
        x = self.crystals
        return cf.build_images(x.positions.double(), x.lattice.double(), x.ptr, **CERTIFICATE, every_pair=True)

    @functools.cached_property
    def wave_vectors(self) -> cf.WaveVectors:
        x = self.crystals
        return cf.build_wave_vectors(x.lattice.double(), x.ptr, DECAY_RECIPROCAL_MIN, CERTIFICATE["tol"])

    @functools.cached_property
    def orbits(self) -> cf.CrystalBatch:
        """The same crystals with one row for each orbit of equivalent atoms; needs spglib."""
        x = self.crystals.to(torch.float64).to(torch.device("cpu"))
        bounds = x.ptr.tolist()
        found = [
            Crystal([{z: 1.0} for z in x.species[start:end].tolist()], x.positions[start:end].numpy(), cell.numpy())
            for start, end, cell in zip(bounds, bounds[1:], x.lattice, strict=False)
        ]
        return cf.CrystalBatch.from_structures(found, self.dtype, SYMMETRY_TOL).to(self.device)

    @functools.cached_property
    def pairs_in_reach(self) -> int:
        """How many pairs of atoms have an image in the list."""
        row = torch.repeat_interleave(self.images.row_ptr.diff())
        return len(torch.unique_consecutive(row * self.crystals.num_atoms + self.images.col))

    @functools.cached_property
    def tiles(self) -> "Layout":
        """The list as the Triton kernels have it."""
        from crystalformer.kernels.layout import pack, unpack

        x, images, basis = self.crystals, self.images, self.size.basis
        num, settings = (basis.num, Settings(r_max=basis.r_max, width=basis.width)) if basis else (0, Settings())
        layout = pack(x.positions, x.lattice, images.packed(), images.num_pairs, num, settings, by_pair=False)
        return unpack(layout, x.num_atoms, images.num_images, num)

    @property
    def shells(self) -> int:
        """How many shells these hold: images of one pair at one distance are one."""
        return len(self.tiles.place.unique())


def make(
    name: str,
    size_name: str = "paper",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    smoke: bool = False,
) -> Problem:
    """A problem by its name; with `smoke` on so few atoms that everything takes milliseconds.

    Raises:
        ValueError: for a name that is not a problem's.
    """
    exact, size = crystals(name, smoke), SIZES[size_name]
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    n = exact.num_atoms
    q, k, v, upstream = (normal(n, size.heads, size.dim) for _ in range(4))
    decay = DECAY_MIN + DECAY_SPREAD * torch.rand(n, size.heads, generator=rng, dtype=torch.float64)
    weight = 0.1 * normal(size.heads, size.dim, size.num_basis) if size.num_basis else None
    inputs = {"q": q, "k": k, "v": v, "decay": decay, "weight": weight}
    inputs["decay_reciprocal"] = DECAY_RECIPROCAL_MIN + DECAY_RECIPROCAL_SPREAD * torch.rand(
        n, size.heads, generator=rng, dtype=torch.float64
    )
    inputs |= {"positions": exact.positions, "lattice": exact.lattice}
    here = exact.to(torch.device(device))
    checked = CHECKED if int(exact.ptr.diff().max()) > BIG else None
    upstream[checked or n :] = 0
    return Problem(
        name,
        size_name,
        here.to(dtype),
        cf.build_images(here.positions, here.lattice, here.ptr, **CERTIFICATE),
        {key: x if x is None else x.to(device, dtype) for key, x in inputs.items()},
        upstream.to(device, dtype),
        checked,
    )


@functools.lru_cache(maxsize=2)
def crystals(name: str, smoke: bool = False) -> cf.CrystalBatch:
    """The crystals of a problem, fp64, on the CPU; with `smoke` the first two, or a smaller cell."""
    few = 2 if smoke else None
    if name == "w32":
        return _w32(few)
    if name == "jarvis256":
        return _many(few or 256, mean=10, spread=0.7, seed=1)
    if name == "mp128":
        return _many(few or 128, mean=30, spread=0.6, seed=2)
    if name == "tiny":
        rng = np.random.default_rng(3)
        return _pack([_random_crystal(rng, int(n)) for n in rng.integers(1, 3, few or 32)])
    if name == "needle":
        rng = np.random.default_rng(4)
        n = 8 if smoke else 40
        return _pack([_fill(rng, np.diag([2.6, 2.8, 3.0 * n]), n)])
    if match := re.fullmatch(r"bigcell-([1-9]\d*)", name):
        n, rng = int(match[1]), np.random.default_rng(5)
        n = min(n, 12) if smoke else n
        edge = (18.0 * n) ** (1 / 3)
        return _pack([_fill(rng, edge * (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), n)])
    if Path(name).exists():
        from crystalformer.data import read_samples

        structures = read_samples(name)[0].structures[: few or 128]
        return cf.CrystalBatch.from_structures(structures, dtype=torch.float64)
    raise ValueError(f"problem must be one of {', '.join(NAMES)}, bigcell-N or a file of crystals, not {name!r}")


def _w32(few: int | None) -> cf.CrystalBatch:
    found = json.loads(W32.read_text())[:few]
    lattices = [np.array(x["lattice"]) for x in found]
    positions = [np.array(x["fractional"]) @ lattice for x, lattice in zip(found, lattices, strict=True)]
    return _pack([(np.array(x["species"]), p, m) for x, p, m in zip(found, positions, lattices, strict=True)])


def _many(number: int, mean: float, spread: float, seed: int) -> cf.CrystalBatch:
    """Crystals of log-normal sizes; the sizes are quantiles, so that their mean is the one asked for."""
    rng = np.random.default_rng(seed)
    quantiles = torch.special.ndtri((torch.arange(number).double() + 0.5) / number).numpy()
    sizes = np.exp(spread * rng.permutation(quantiles))
    sizes = np.maximum(1, np.rint(mean * sizes / sizes.mean()).astype(int))
    return _pack([_random_crystal(rng, int(n)) for n in sizes])


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # species, positions, lattice


def _random_crystal(rng: np.random.Generator, num_atoms: int) -> Arrays:
    kind = rng.choice(["cubic", "hexagonal", "orthorhombic", "triclinic"], p=[0.3, 0.25, 0.2, 0.25])
    if kind == "cubic":
        shape = np.eye(3)
    elif kind == "hexagonal":
        shape = np.array([[1, 0, 0], [-0.5, math.sqrt(0.75), 0], [0, 0, rng.uniform(0.8, 2.5)]])
    elif kind == "orthorhombic":
        shape = np.diag(rng.uniform(0.7, 1.6, size=3))
    else:
        alpha, beta, gamma = np.cos(np.radians(rng.uniform(55, 125, size=3)))
        sine = math.sqrt(1 - gamma**2)
        y = (alpha - beta * gamma) / sine
        z2 = max(1 - beta**2 - y**2, 0.1)
        shape = rng.uniform(0.8, 1.4, size=(3, 1)) * np.array([[1, 0, 0], [gamma, sine, 0], [beta, y, math.sqrt(z2)]])
    volume = num_atoms * rng.uniform(10, 25)
    return _fill(rng, shape * (volume / abs(np.linalg.det(shape))) ** (1 / 3), num_atoms)


def _fill(rng: np.random.Generator, lattice: np.ndarray, num_atoms: int) -> Arrays:
    """Atoms at random places of the cell, each where it is not too near to those before."""
    nearest = NEAREST * (abs(np.linalg.det(lattice)) / num_atoms) ** (1 / 3)
    # In a big cell of even edges the nearest image is the one that rounding finds.
    reach = range(-1, 2) if num_atoms <= 64 else range(1)
    box = np.array([(a, b, c) for a in reach for b in reach for c in reach])
    placed = np.empty((num_atoms, 3))
    count = 0
    while count < num_atoms:
        trial = rng.random(3)
        away = placed[:count] - trial
        away -= np.rint(away)
        d2 = (((away[:, None] + box) @ lattice) ** 2).sum(-1)
        if not (d2 < nearest**2).any():
            placed[count] = trial
            count += 1
    return rng.integers(1, 90, size=num_atoms), placed @ lattice, lattice


def _pack(found: list[Arrays]) -> cf.CrystalBatch:
    size = torch.tensor([0] + [len(species) for species, _, _ in found])
    return cf.CrystalBatch(
        species=torch.from_numpy(np.concatenate([species for species, _, _ in found])),
        positions=torch.from_numpy(np.concatenate([positions for _, positions, _ in found])),
        lattice=torch.from_numpy(np.stack([lattice for _, _, lattice in found])),
        ptr=size.cumsum(0),
    )
