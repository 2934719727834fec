"""How far fp32 may be off where sums cancel: the bound that the docstring of `reciprocal_attention` states."""

import pytest
import torch

import crystalformer as cf

# The reference makes G·p in fp32, which loses digits as it grows.
ROUNDING = {"cpu": 4e-6, "reference": 2e-5}


@pytest.mark.parametrize("edge", [12.0, 20.0, 40.0])
def test_reciprocal_sums_in_fp32(edge, backend):
    """S within so much of S_ii, and y within what that moves where scores of ±50 favour atoms that are far away."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    uniform = lambda *shape: torch.rand(*shape, generator=rng)
    n, heads = (24, 2) if edge < 40 else (9, 1)
    lattice = (edge * torch.eye(3) + 0.05 * edge * normal(3, 3))[None]
    positions, ptr = uniform(n, 3) @ lattice[0], torch.tensor([0, n])
    k, v, decay = 100 * uniform(n, heads, 1) - 50, normal(n, heads, 3), 1.21 + 2.42 * uniform(n, heads)
    waves = cf.build_wave_vectors(lattice, ptr, 1.21)
    lists = (waves.packed(), waves.largest)

    def run(backend, dtype):
        inputs = [t.to(dtype) for t in (torch.ones_like(k), k, v, decay, positions, lattice)]
        sums = getattr(torch.ops.crystalformer, f"{backend}_reciprocal_sum")(*inputs[3:], *lists, n * n)
        return sums.view(n, n, heads).double(), cf.reciprocal_attention(
            *inputs, ptr, backend=backend, wave_vectors=waves
        ).double()

    (sums, y), (exact_sums, exact_y) = run(backend, torch.float32), run("reference", torch.float64)
    own = exact_sums.diagonal().T  # (n,heads)
    error = ((sums - exact_sums).abs() / own[:, None]).max()
    assert 1e-8 < error < ROUNDING[backend]
    favour = torch.exp((k - k.max()).double())[None, ..., 0]  # (1,n,heads)
    moved = ROUNDING[backend] * (own[:, None] * favour).sum(1) / (exact_sums.clamp(min=1e-6) * favour).sum(1)
    apart = (v[:, None] - v[None]).norm(dim=-1).amax((0, 1)).double()  # (heads)
    assert ((y - exact_y).norm(dim=-1) <= moved * apart).all()
    assert edge < 20 or moved.max() > 1  # so fp64, with such scores
