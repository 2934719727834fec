"""Forces and stresses of a trained model: its calculator for ase gives exact derivatives of its energy."""

import torch
from pymatgen.io.ase import AseAtomsAdaptor

import crystalformer as cf
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import CrystalDataset, Regression, fit, standardisation


def trained_model() -> cf.Crystalformer:
    """A small model of the energy per atom of ionic crystals, trained for seconds."""
    torch.manual_seed(0)
    crystals = ionic_crystals(150)
    targets = torch.tensor([[crystal.energy] for crystal in crystals])
    named = {"target_names": ("energy",), "target_units": ("eV/atom",)}
    model = cf.Crystalformer(cf.CrystalformerConfig(model_dim=64, num_blocks=2, **named))
    data = CrystalDataset([crystal.structure for crystal in crystals], targets, model)
    loader = data.loader(batch_size=16, seed=0)
    model.calibrate(next(iter(loader))[0])
    fit(Regression(model, *standardisation(targets), lr=2e-3), loader, data.loader(64), epochs=10)
    return model


def main() -> tuple[float, float, float]:
    """Returns, in eV/Å, the largest force, the largest sum of all forces, and the difference to finite differences."""
    calculator = cf.ase.Calculator(trained_model())
    atoms = AseAtomsAdaptor.get_atoms(ionic_crystals(1, seed=3)[0].structure)
    atoms.calc = calculator
    forces, stress = atoms.get_forces(), atoms.get_stress()
    largest, total = abs(forces).max(), abs(forces.sum(0)).max()

    step, energies = 1e-4, []
    for sign in (1, -1):
        atoms.positions[0, 0] += sign * step
        energies.append(atoms.get_potential_energy())
        atoms.positions[0, 0] -= sign * step
    difference = abs((energies[1] - energies[0]) / (2 * step) - forces[0, 0])
    print(f"largest force {largest:.3f} eV/Å, largest stress {abs(stress).max():.4f} eV/Å³")
    print(f"sum of the forces {total:.0e}, difference to finite differences {difference:.0e} eV/Å")
    return largest, total, difference


if __name__ == "__main__":
    main()
