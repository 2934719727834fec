"""The layers of the Crystalformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.functional import Precision, dual_space_attention, periodic_attention, reciprocal_attention
from .batch import CrystalBatch
from .config import CrystalformerConfig

# Slope of rho at 0, the paper's positive_func "elu=0.1".
RHO_SLOPE = 0.1
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class Decay(nn.Module):
    """From queries to what says how fast the attention's weight decays: x (N,H), of which `rho` makes the decay.

        x = (q·w + shift) scale

    Equation (8) of docs/math.md. `shift` and `scale` make x of mean 0 and deviation 1 on the batch that `calibrate`
    sees, and stay as they are afterwards. Before that they are 0 and 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        nn.init.normal_(self.weight, std=head_dim**-0.5)

    def project(self, q: Tensor) -> Tensor:
        """q·w, (N,H), of queries (N,H,D)."""
        return (q * self.weight).sum(-1)

    def forward(self, q: Tensor) -> Tensor:
        return (self.project(q) + self.shift) * self.scale

    @torch.no_grad()
    def calibrate(self, q: Tensor) -> None:
        projected = self.project(q)
        deviation = projected.std() if projected.numel() > 1 else projected.new_zeros(())
        if not deviation > 0:
            raise ValueError("batch must hold atoms that differ, to calibrate on, but all have the same features")
        self.shift.copy_(-projected.mean())
        self.scale.copy_(1 / deviation)


def rho(x: Tensor, bound: float) -> Tensor:
    """(1 - b) ELU(0.1 x / (1 - b)) + 1, positive and larger than the bound b.  Equation (8) of docs/math.md."""
    return (1 - bound) * F.elu(x * (RHO_SLOPE / (1 - bound))) + 1


class PeriodicAttention(nn.Module):
    """Multi-head infinitely connected attention; the first heads in real space, the rest in reciprocal space."""

    def __init__(self, config: CrystalformerConfig, block: int, backend: str, precision: Precision) -> None:
        super().__init__()
        dim, heads, head_dim = config.model_dim, config.num_heads, config.head_dim
        self.num_heads, self.num_real = heads, config.num_real_heads(block)
        self.r0, self.r0_reciprocal = config.block_r0(block), config.block_r0_reciprocal(block)
        self.bound, self.bound_reciprocal = config.decay_bound, config.decay_bound_reciprocal
        self.backend, self.precision = backend, precision
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.decay = Decay(heads, head_dim)
        self.basis = config.block_basis(block)
        self.edge_weight: nn.Parameter | None = None
        if self.basis is not None:
            self.edge_weight = nn.Parameter(torch.empty(self.num_real, head_dim, config.num_basis))
        self.reset_parameters(config)

    def reset_parameters(self, config: CrystalformerConfig) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.edge_weight is not None:
            # Xavier over (heads · head_dim, K) with gain K^-1/2, as in the paper's code.
            num_basis = config.num_basis
            bound = (6 / (num_basis + config.model_dim) / num_basis) ** 0.5
            nn.init.uniform_(self.edge_weight, -bound, bound)

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        """(N,model_dim) to (N,model_dim)."""
        # In half precision under autocast. What is summed over the images is in the dtype of the geometry.
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        raw_decay, real = self.decay(q), self.num_real
        positions, lattice, images, waves = batch.positions, batch.lattice, batch.images, batch.wave_vectors
        encoding, backend, precision = (self.edge_weight, self.basis), self.backend, self.precision
        if not real:
            c = self._reciprocal_decay(raw_decay)
            y = reciprocal_attention(q, k, v, c, positions, lattice, batch.ptr, backend=backend, wave_vectors=waves)
        elif real == self.num_heads:
            assert images is not None
            a = self._real_decay(raw_decay)
            y = periodic_attention(q, k, v, a, positions, lattice, images, *encoding, backend, precision=precision)
        else:
            assert images is not None
            assert waves is not None
            a, c = self._real_decay(raw_decay[:, :real]), self._reciprocal_decay(raw_decay[:, real:])
            y = dual_space_attention(q, k, v, a, c, positions, lattice, images, waves, *encoding, backend, precision)
        return self.out_proj(y.flatten(1))

    def _real_decay(self, raw: Tensor) -> Tensor:
        """a, Å^-2."""
        return rho(raw, self.bound) / (2 * self.r0**2)

    def _reciprocal_decay(self, raw: Tensor) -> Tensor:
        """c, Å²."""
        return rho(raw, self.bound_reciprocal) * self.r0_reciprocal**2 / 2

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def calibrate(self, x: Tensor) -> None:
        self.decay.calibrate(self._heads(self.q_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward with residuals and no normalisation, initialised by T-Fixup (Huang et al., 2020)."""

    def __init__(self, config: CrystalformerConfig, block: int, backend: str, precision: Precision) -> None:
        super().__init__()
        self.attention = PeriodicAttention(config, block, backend, precision)
        self.linear1 = nn.Linear(config.model_dim, config.ff_dim)
        self.linear2 = nn.Linear(config.ff_dim, config.model_dim)
        self.dropout, self.activation = nn.Dropout(config.dropout), ACTIVATIONS[config.activation]()
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in (self.linear1, self.linear2, self.attention.v_proj, self.attention.out_proj):
                linear.weight *= 0.67 * config.num_blocks**-0.25

    def forward(self, x: Tensor, batch: CrystalBatch) -> Tensor:
        x = x + self.dropout(self.attention(x, batch))
        return x + self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class Embedding(nn.Module):
    """A learnt feature of each element; a mixture of elements has the mixture of theirs."""

    def __init__(self, num_elements: int, config: CrystalformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_elements, config.model_dim))
        nn.init.normal_(self.weight, std=config.model_dim**-0.5 * (9 * config.num_blocks) ** -0.25)

    def forward(self, species: Tensor) -> Tensor:
        """(N,model_dim) of atomic numbers (N,) or occupancies (N,98)."""
        return species @ self.weight if species.is_floating_point() else self.weight[species - 1]


def mean_pool(x: Tensor, ptr: Tensor, multiplicity: Tensor | None = None) -> Tensor:
    """(C,d), the mean of x (N,d) over each crystal, as a matrix product: deterministic and differentiable twice.
    Each row counts `multiplicity` (N) times."""
    atom = torch.arange(len(x), device=x.device)
    member = (atom >= ptr[:-1, None]) & (atom < ptr[1:, None])
    if multiplicity is None:
        return member.to(x.dtype) @ x / ptr.diff()[:, None]
    times = member * multiplicity
    return times.to(x.dtype) @ x / times.sum(1)[:, None]


def max_pool(x: Tensor, ptr: Tensor) -> Tensor:
    """(C,d), the largest of each feature of x (N,d) over each crystal. Equal rows share its gradient, so that those of
    equivalent atoms have together what the row of their orbit has."""
    crystal = torch.arange(len(ptr) - 1, device=x.device).repeat_interleave(ptr.diff(), output_size=len(x))
    found = x.new_full((len(ptr) - 1, x.shape[1]), -torch.inf)
    return found.scatter_reduce(0, crystal[:, None].expand_as(x), x, "amax")


def mean_of_elements(batch: CrystalBatch, energies: Tensor) -> Tensor:
    """(C,1) fp64, the mean over the atoms of each crystal of what `energies` (98) fp64 has for their elements."""
    species, energies = batch.species, energies.to(batch.species.device)
    of_rows = species.double() @ energies if species.is_floating_point() else energies[species - 1]
    return mean_pool(of_rows[:, None], batch.ptr, batch.multiplicity)
