"""Attention to all periodic images as a layer of your own model."""

import torch
from torch import nn

import crystalformer as cf
from crystalformer.data.ionic import ionic_crystals

DECAY_MIN = 0.1275  # Å⁻²: no decay of the layer is smaller, so a list with this bound serves it


class Layer(nn.Module):
    """Attention with 4 heads of 8, whose queries decide how fast the weights decay with the distance."""

    def __init__(self, dim: int = 32, heads: int = 4, num: int = 32) -> None:
        super().__init__()
        self.heads, self.basis = heads, cf.RadialBasis(num=num, r_max=14.0)
        self.qkv, self.decay, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, heads), nn.Linear(dim, dim)
        self.edge_weight = nn.Parameter(0.1 * torch.randn(heads, dim // heads, num))

    def forward(self, x: torch.Tensor, batch: cf.CrystalBatch, images: cf.ImageList) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each (atoms, heads, 8)
        decay = DECAY_MIN + nn.functional.softplus(self.decay(x))  # (atoms, heads)
        y = cf.periodic_attention(q, k, v, decay, batch.positions, batch.lattice, images, self.edge_weight, self.basis)
        return x + self.out(y.flatten(1))


def main() -> float:
    """Fits the volume per atom of 16 crystals; returns the last loss as a part of the first."""
    torch.manual_seed(0)
    structures = [crystal.structure for crystal in ionic_crystals(16)]
    batch = cf.CrystalBatch.from_structures(structures)
    images = cf.build_images(batch.positions, batch.lattice, batch.ptr, decay_min=DECAY_MIN, tol=1e-6)
    volume = torch.tensor([structure.volume / len(structure) for structure in structures])
    target = (volume - volume.mean()) / volume.std()

    embedding, layer, readout = nn.Embedding(100, 32), Layer(), nn.Linear(32, 1)
    model = nn.ModuleList([embedding, layer, readout])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    size = batch.ptr.diff()
    crystal = torch.repeat_interleave(size)  # the crystal of each atom
    losses = []
    for _ in range(60):
        x = layer(embedding(batch.species), batch, images)
        mean = torch.zeros(len(structures), 32).index_add(0, crystal, x) / size[:, None]
        loss = (readout(mean)[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"mean squared error: {losses[0]:.3f} at the beginning, {losses[-1]:.4f} after 60 steps")
    return losses[-1] / losses[0]


if __name__ == "__main__":
    main()
