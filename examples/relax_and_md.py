"""An interatomic potential: learnt from energies, forces and stresses, then a relaxation and molecular dynamics."""

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import crystalformer as cf
from crystalformer.training import ForceDataset, ForceRegression, fit


def alloy(random: np.random.Generator) -> Atoms:
    """A distorted cell of copper and gold, with ase's EMT in the place of DFT."""
    atoms = bulk("Cu", a=random.uniform(3.6, 4.1), cubic=True)
    atoms.numbers[: random.integers(0, 5)] = 79
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.normal(0, 0.02, (3, 3))), scale_atoms=True)
    atoms.positions += random.normal(0, 0.1, atoms.positions.shape)
    atoms.calc = EMT()
    return atoms


def trained_model(epochs: int) -> cf.Crystalformer:
    torch.manual_seed(0)
    crystals = [alloy(np.random.default_rng(seed)) for seed in range(120)]
    energies = torch.tensor([[x.get_potential_energy() / len(x)] for x in crystals])
    forces = [torch.from_numpy(x.get_forces()) for x in crystals]
    stress = [torch.from_numpy(x.get_stress(voigt=False)) for x in crystals]
    model = cf.Crystalformer(cf.CrystalformerConfig(model_dim=32, num_blocks=2, ff_dim=64, activation="silu"))
    data = ForceDataset(crystals, energies, model, forces, stress)
    loader = data.loader(batch_size=8, seed=0)
    model.calibrate(next(iter(loader)).crystals)
    fit(ForceRegression(model, data, lr=5e-3), loader, data.loader(64), epochs)
    return model


def main(epochs: int = 10, picoseconds: float = 0.2) -> tuple[float, float]:
    """Returns the largest force after the relaxation, eV/Å, and the drift of the energy, meV per atom and ps."""
    atoms = alloy(np.random.default_rng(120))
    atoms.calc = cf.ase.Calculator(trained_model(epochs))
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=500)
    largest = abs(atoms.get_forces()).max()

    crystal = atoms * (2, 2, 2)
    crystal.calc = atoms.calc
    MaxwellBoltzmannDistribution(crystal, temperature_K=300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(crystal, timestep=2 * units.fs)
    energies = [1000 * crystal.get_total_energy() / len(crystal) for _ in dynamics.irun(int(500 * picoseconds))]
    drift = np.polyfit(np.arange(len(energies)) / 500, energies, 1)[0]
    print(f"relaxed to {largest:.4f} eV/Å; {picoseconds} ps of NVE drift by {drift:.0e} meV per atom and ps")
    return largest, drift


if __name__ == "__main__":
    main()
