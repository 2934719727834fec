"""Seeded inputs of the three ops on random crystals."""

from dataclasses import dataclass, replace

import torch
from crystals import pack, random_crystal
from torch import Tensor

import crystalformer as cf
from crystalformer.attention.layouts import layout as make_layout
from crystalformer.attention.settings import Settings

MIXED = (("cubic", 1), ("skewed", 3), ("left_handed", 2))


@dataclass(frozen=True)
class Problem:
    """Inputs in the order of `periodic_attention`, for `q.shape` = (N,H,D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    positions: Tensor
    lattice: Tensor
    edge_weight: Tensor
    ptr: Tensor
    images: cf.ImageList
    basis: cf.RadialBasis

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything differentiable."""
        return (self.q, self.k, self.v, self.decay, self.positions, self.lattice, self.edge_weight)

    @property
    def op_inputs(self) -> tuple[Tensor, ...]:
        """The same in the order of the attention op."""
        return (self.q, self.k, self.v, self.decay, self.edge_weight, self.positions, self.lattice)

    @property
    def settings(self) -> Settings:
        """Of the ops; they may leave out nothing but what rounding loses."""
        return Settings(r_max=self.basis.r_max, width=self.basis.width)

    def lists(self, backend: str, by_pair: bool = False) -> tuple[Tensor, Tensor]:
        """The image list as the ops of a backend take it."""
        settings = (self.basis.num, self.settings, by_pair, False)
        layout = make_layout(backend, self.images, self.positions, self.lattice, *settings)
        return self.images.packed(), layout

    def wave_vectors(self, decay_min: float = 0.5, tol: float = 1e-6) -> tuple[Tensor, tuple[int, int]]:
        """The wave vectors as the ops take them."""
        x = cf.build_wave_vectors(self.lattice, self.ptr, decay_min, tol)
        return x.packed(), x.largest

    def attention(self, *inputs: Tensor, backend: str = "reference", **options):
        q, k, v, decay, positions, lattice, edge_weight = inputs or self.inputs
        values = {"edge_weight": edge_weight, "basis": self.basis, "backend": backend, **options}
        return cf.periodic_attention(q, k, v, decay, positions, lattice, self.images, **values)

    def encoding(self, *inputs: Tensor, backend: str = "reference"):
        """alpha and beta, of decay, positions, lattice, edge_weight."""
        decay, positions, lattice, edge_weight = inputs or (self.decay, self.positions, self.lattice, self.edge_weight)
        return cf.periodic_encoding(decay, positions, lattice, self.images, edge_weight, self.basis, backend)

    def reciprocal(self, *inputs: Tensor, backend: str = "reference", **options):
        """y, of all inputs but edge_weight."""
        return cf.reciprocal_attention(*(inputs or self.inputs)[:6], self.ptr, backend=backend, **options)

    def to(self, dtype: torch.dtype) -> "Problem":
        names = ("q", "k", "v", "decay", "positions", "lattice", "edge_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def half(self, dtype: torch.dtype) -> "Problem":
        """The same with q, k, v in half precision."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def problem(
    kinds=MIXED,
    heads: int = 2,
    dim: int = 3,
    value_dim: int = 4,
    num_basis: int = 5,
    decay_min: float = 0.5,
    tol: float = 1e-6,
    seed: int = 0,
    **options,
) -> Problem:
    """A fp64 problem on crystals of some kinds and sizes; decays from decay_min to three times that."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    positions, lattice, ptr = pack([random_crystal(kind, seed, size) for kind, size in kinds])
    n = len(positions)
    decay = decay_min * (1 + 2 * torch.rand(n, heads, generator=rng, dtype=torch.float64))
    return Problem(
        q=normal(n, heads, dim),
        k=normal(n, heads, dim),
        v=normal(n, heads, value_dim),
        decay=decay,
        positions=positions,
        lattice=lattice,
        edge_weight=normal(heads, value_dim, num_basis),
        ptr=ptr,
        images=cf.build_images(positions, lattice, ptr, decay_min=decay_min, tol=tol, **options),
        basis=cf.RadialBasis(num=num_basis, r_max=6.0, width=1.1),
    )


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Largest error over largest value, in fp64; a zero result has the error 1."""
    exact = exact.double()
    return float((x.double() - exact).abs().max() / exact.abs().max())
