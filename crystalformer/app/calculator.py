"""A trained model as a calculator of ase: energy, forces and stress of a crystal."""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ..common import checks
from ..common.elements import SYMBOLS
from ..data import CrystalBatch
from ..model.forces import differentiate
from ..model.model import Crystalformer
from .predictor import Predictor, load

# The units of energies that need no factor, and whether they are of an atom.
PER_ATOM = {"eV": False, "eV/atom": True}


class Calculator(AseCalculator):
    """Energy, forces and stress of crystals by a trained model, for ase.

        atoms.calc = cf.ase.Calculator("run")
        atoms.get_forces()                          # eV/Å

    The results are `energy` and the equal `free_energy` of the cell, eV; `forces`, eV/Å, and `stress`, eV/Å³, in ase's
    order and sign, are its exact derivatives. Image lists and wave vectors are used again while their certificate bears
    how far atoms and cell have moved (`ImageList.bearable`), and built anew beyond that.

    Args:
        run: folder of a training or a model, what `cf.load` gave, or a Crystalformer.
        target: the model's target that is the energy; not needed if it has only one.
        per_atom: whether that is the energy of an atom, not of the cell; its unit says so if it is eV or eV/atom.
        factor: eV for a unit of the target; with any other unit than these two it has to be given, with per_atom.
        dtype: fp32 or fp64, of the network. By default fp64 on the CPU, where energies are smooth enough for any
            optimiser, and fp32 elsewhere.
        device: as for `cf.load`, unless that was called before.

    Attributes:
        lists_built: how often lists were built.

    Raises:
        ValueError: for a model whose energy is not known to be one, naming the argument that must say so; in a
            calculation for atoms that are not periodic in all directions.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  # as ase has it

    def __init__(
        self,
        run: str | Path | Predictor | Crystalformer,
        *,
        target: str | None = None,
        per_atom: bool | None = None,
        factor: float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        super().__init__()
        if isinstance(run, Crystalformer):
            run = Predictor(run)
        predictor = run if isinstance(run, Predictor) else load(run, device)
        names = predictor.names
        if target is None and len(names) > 1:
            raise ValueError(f"target must say which of {', '.join(names)} is the energy")
        if target is not None and target not in names:
            raise ValueError(f"target must be one of {', '.join(names)}, not {target}")
        self.column = 0 if target is None else names.index(target)
        unit = predictor.units[self.column]
        if unit not in PER_ATOM and (per_atom is None or factor is None):
            raise ValueError(
                f"per_atom and factor must be given unless the unit of {names[self.column]} is eV or eV/atom, "
                f"not {unit!r}"
            )
        self.per_atom = PER_ATOM[unit] if per_atom is None else bool(per_atom)
        self.factor = 1.0 if factor is None else checks.check_number("factor", factor)
        self.device = next(predictor.model.parameters()).device
        if dtype is None:
            dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        self.dtype, self.predictor = dtype, predictor
        self.model = copy.deepcopy(predictor.single("of a calculator")).to(dtype).eval().requires_grad_(False)
        self.kept: CrystalBatch | None = None
        self.lists_built = 0

    def calculate(
        self,
        atoms: Any = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """All results, whatever properties are asked for; ase keeps them until the atoms change."""
        super().calculate(atoms, properties, system_changes)
        batch = CrystalBatch.from_structures([self.atoms], self.dtype).to(self.device)
        if "numbers" in system_changes and (unseen := self.predictor.unseen_elements([self.atoms])[0]):
            elements = ", ".join(SYMBOLS[z - 1] for z in unseen)
            warnings.warn(f"no crystal of the training had {elements}: energies and forces are guesses", stacklevel=2)
        energy, forces, stress = (x.double().cpu() for x in differentiate(self._energy, self._with_lists(batch)))
        self.results = {
            "energy": float(energy[0]),
            "free_energy": float(energy[0]),
            "forces": forces.numpy(),
            "stress": full_3x3_to_voigt_6_stress(stress[0].numpy()),
        }

    def _energy(self, batch: CrystalBatch) -> Tensor:
        """(1) eV, of the cell."""
        energy = self.model(batch)[:, self.column] * self.factor
        return energy * batch.num_atoms if self.per_atom else energy

    def _with_lists(self, batch: CrystalBatch) -> CrystalBatch:
        """The batch with the lists of before, if they serve it, else with new ones."""
        if self.kept is not None:
            images, waves = self.kept.images, self.kept.wave_vectors
            with contextlib.suppress(ValueError), checks.debug_checks(True):  # look at a GPU's values, too
                if images is not None:
                    images.check_built_for(batch.positions, batch.lattice)
                if waves is not None:
                    waves.check_built_for(batch.lattice)
                return replace(batch, images=images, wave_vectors=waves)
        self.kept = self.model.prepare(batch)
        self.lists_built += 1
        return self.kept
