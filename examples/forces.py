"""Forces and stresses of a trained model: exact derivatives of its energy by positions and lattice."""

from dataclasses import replace

import torch

import crystalformer as cf
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import CrystalDataset, Regression, fit, standardisation


def trained_model() -> cf.Crystalformer:
    """A small model of the energy per atom of ionic crystals, trained for seconds."""
    torch.manual_seed(0)
    crystals = ionic_crystals(150)
    targets = torch.tensor([[crystal.energy] for crystal in crystals])
    model = cf.Crystalformer(cf.CrystalformerConfig(model_dim=64, num_blocks=2))
    data = CrystalDataset([crystal.structure for crystal in crystals], targets, model)
    loader = data.loader(batch_size=16, seed=0)
    model.calibrate(next(iter(loader))[0])
    fit(Regression(model, *standardisation(targets), lr=2e-3), loader, data.loader(64), epochs=10)
    return model.eval()


def energy_and_forces(model: cf.Crystalformer, batch: cf.CrystalBatch) -> tuple[torch.Tensor, ...]:
    """(C) energies of the cells, eV; (N,3) forces, eV/Å; (C,3,3) stresses, eV/Å³."""
    batch = model.prepare(batch)  # with the image list, which bears small movements and stays differentiable
    size = batch.ptr.diff()
    positions = batch.positions.clone().requires_grad_()
    strain = torch.zeros_like(batch.lattice, requires_grad=True)
    deformation = torch.eye(3).to(strain) + (strain + strain.mT) / 2
    placed = (positions[:, None] @ deformation.repeat_interleave(size, 0))[:, 0]
    energy = model(replace(batch, positions=placed, lattice=batch.lattice @ deformation))[:, 0] * size
    d_positions, d_strain = torch.autograd.grad(energy.sum(), (positions, strain))
    return energy.detach(), -d_positions, d_strain / batch.lattice.det().abs()[:, None, None]


def main() -> tuple[float, float, float]:
    """Returns, in eV/Å, the largest force, sum of the forces of a crystal, and difference to finite differences."""
    model = trained_model().double()
    batch = cf.CrystalBatch.from_structures([x.structure for x in ionic_crystals(4, seed=3)], torch.float64)
    _, forces, stresses = energy_and_forces(model, batch)
    total = torch.stack([x.sum(0) for x in forces.split(batch.ptr.diff().tolist())]).abs().max().item()

    step = torch.zeros_like(batch.positions)
    step[0, 0] = 1e-4  # Å
    there = [replace(batch, positions=batch.positions + sign * step) for sign in (1, -1)]
    ahead, behind = (energy_and_forces(model, x)[0][0] for x in there)
    difference = abs((behind - ahead) / 2e-4 - forces[0, 0]).item()
    largest = forces.abs().max().item()
    print(f"largest force {largest:.3f} eV/Å, largest stress {stresses.abs().max():.4f} eV/Å³")
    print(f"sum of the forces of a crystal {total:.0e}, difference to finite differences {difference:.0e} eV/Å")
    return largest, total, difference


if __name__ == "__main__":
    main()
