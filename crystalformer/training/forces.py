"""What is learnt of energies, forces and stresses: one model of the energy, and its derivatives."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..common import checks
from ..common.elements import NUM_ELEMENTS
from ..data import CrystalBatch
from ..data.dataset import BoundedBatches, Example
from ..data.forces import FORCES, STRESS, ForceDataset
from ..model.config import CrystalformerConfig
from ..model.forces import differentiate
from ..model.layers import mean_of_elements, mean_pool
from ..model.model import Crystalformer
from .losses import LOSSES, MEANS
from .regression import Regression

UNIT = "eV/atom"
# eV: energies of an atom that differ by less are equal, and the rest rounding.
EQUAL = 1e-6


def fit_element_energies(data: ForceDataset, known: Mapping[int, float] | None = None) -> Tensor:
    """(98) fp64, eV, an energy of each element: those whose means over the atoms are nearest to the crystals' energies.

    By least squares, the smallest where the data do not tell. An element that no crystal has gets the others' mean.

    Args:
        known: energies of elements, by atomic number, that stay as they are.
    """
    shares = torch.stack([x.occupancies().double().mean(0) for x in data.crystals])
    fixed, energies = torch.zeros(NUM_ELEMENTS, dtype=torch.bool), torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    for number, energy in (known or {}).items():
        fixed[number - 1], energies[number - 1] = True, energy
    new = shares.any(0) & ~fixed
    rest = data.targets - shares @ energies[:, None]
    if new.any():
        energies[new] = torch.linalg.lstsq(shares[:, new], rest, driver="gelsd").solution[:, 0]
    return energies.where(fixed | new, energies[fixed | new].mean())


class ForceRegression(Regression):
    """A Crystalformer learning energies, forces and stresses by the recipe.

    The model learns what energies of an atom are beside those of its elements (`fit_element_energies`), in standard
    deviations; forces and stresses are learnt in units of their root mean squares. The loss of a crystal is the mean of
    its three losses by the weights.

    Logs train_loss and val_loss; train_mae and val_mae of the energy, eV/atom, of "forces", eV/Å, over all components
    of all atoms, and of "stress", eV/Å³.

    Args:
        model: predicts the standardised rest of the energy while it is trained; `finish` makes it predict eV/atom.
        data: the training crystals, for the energies of elements and the scales.
        names: of the energy, for the log.
        energy_weight, forces_weight, stress_weight: of the errors in the loss; the last one counts where data have
            stresses.
        known: of a trained model that this one starts from, whose energies of elements stay as they are, and which
            therefore count as seen.
        recipe: lr and others, as for `Regression`.

    Raises:
        ValueError: for a model of several targets, weights that add up to 0, or the loss of classes.
    """

    def __init__(
        self,
        model: Crystalformer,
        data: ForceDataset,
        names: Sequence[str] = ("energy",),
        energy_weight: float = 1.0,
        forces_weight: float = 1.0,
        stress_weight: float = 1.0,
        known: CrystalformerConfig | None = None,
        **recipe: Any,
    ) -> None:
        quantities = (*names, FORCES, STRESS)[: 3 if data.stress else 2]
        weights = {"energy_weight": energy_weight, "forces_weight": forces_weight, "stress_weight": stress_weight}
        for name, weight in weights.items():
            checks.check_number(name, weight, closed=True)
        used = dict(list(weights.items())[: len(quantities)])
        if not sum(used.values()) > 0:
            raise ValueError(f"{', '.join(used)} must not all be 0")
        if recipe.get("loss") == "bce":
            raise ValueError("loss must be of numbers, not bce, which is of classes")
        fixed = dict(zip(known.elements, known.element_energies, strict=False)) if known is not None else None
        energies = fit_element_energies(data, fixed)
        rest = data.targets - torch.cat([mean_of_elements(x, energies) for x in data.crystals])
        deviation = rest.std(0, correction=0)
        deviation = torch.where(deviation > EQUAL, deviation, 1.0)
        measured = [f"mae/{name}" for name in quantities]
        super().__init__(model, torch.zeros(1), deviation, names, measured=measured, **recipe)
        self.energies, self.elements = energies, torch.zeros(NUM_ELEMENTS, dtype=torch.bool)
        self.elements[torch.tensor(sorted({*data.elements, *(fixed or {})})) - 1] = True
        self.weights = [x / sum(used.values()) for x in used.values()]
        self.units = [_root_mean_square(x) for x in (data.forces, data.stress) if x]

    # Checkpoints keep what energies are measured by: a resumed training does not read the model it started from.
    def get_extra_state(self) -> Tensor:
        return torch.cat([self.energies, self.deviation, self.elements])

    def set_extra_state(self, state: Tensor) -> None:
        self.energies, self.deviation, elements = state.cpu().split([NUM_ELEMENTS, 1, NUM_ELEMENTS])
        self.elements = elements > 0
        self.scales = tuple(self.deviation.tolist())

    def forward(self, batch: CrystalBatch) -> Tensor:
        """(C,1) fp64, eV/atom."""
        return super().forward(batch) + mean_of_elements(batch, self.energies)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The example with its energies standardised, and forces and stresses in their units."""
        targets = (batch.targets - mean_of_elements(batch.crystals, self.energies)) / self.deviation
        scaled = {name: getattr(batch, name) / unit for name, unit in zip((FORCES, STRESS), self.units, strict=False)}
        labels = {name: x.to(batch.weight.dtype) for name, x in (scaled | {"targets": targets}).items()}
        return batch._replace(**labels)

    def _step(self, stage: str, metrics: nn.ModuleList, example: Any) -> Tensor:
        crystals, targets, weight, forces, stress = example
        size = crystals.ptr.diff()
        with self._finite_features():
            energy = partial(_energy_of_cells, self.model)
            found = differentiate(energy, crystals, create_graph=stage == "train")
        scale = self.scales[0]
        pairs = [(found.energy / size, targets[:, 0]), (found.forces * (scale / self.units[0]), forces)]
        if len(self.units) > 1:
            pairs.append((found.stress * (scale / self.units[1]), stress))
        losses = crystals.lattice.new_zeros(len(size), dtype=found.energy.dtype)
        logged = []
        for part, (x, y), unit in zip(self.weights, pairs, (scale, *self.units), strict=True):
            losses = losses + part * _of_crystals(LOSSES[self.loss](x, y.to(x.dtype), reduction="none"), crystals)
            logged.append(_of_crystals((x - y).detach().abs(), crystals) * unit)
        counted = [(weight > 0).to(MEANS)] * len(logged)
        counted[1] = counted[1] * size  # components of forces count alike, whatever crystal they are of
        self._log(stage, metrics, [(losses.detach(), counted[0]), *zip(logged, counted, strict=True)])
        return losses @ weight.to(losses.dtype)

    def finish(
        self, elements: Iterable[int] = (), largest_cell: int = 0, atom_volumes: Sequence[float] = ()
    ) -> Crystalformer:
        """The model, predicting eV/atom from now on, in eval mode; arguments as for `Regression`."""
        model = super().finish(elements, largest_cell, atom_volumes)
        mine = (self.elements.nonzero()[:, 0] + 1).tolist()
        known = tuple(sorted({*model.config.elements, *mine, *elements}))
        energies = (model.element_energies + self.energies)[torch.tensor(known) - 1]
        known_energies = tuple(energies.tolist())
        model.config = replace(model.config, elements=known, element_energies=known_energies, target_units=(UNIT,))
        return model


def _energy_of_cells(model: Crystalformer, batch: CrystalBatch) -> Tensor:
    """(C), of a model of the energy of an atom."""
    return model(batch)[:, 0] * batch.ptr.diff()


def _of_crystals(x: Tensor, crystals: CrystalBatch) -> Tensor:
    """(C), the means of what is of atoms (N,3), or of crystals (C) or (C,3,3), over each crystal."""
    if x.dim() == 2:
        return mean_pool(x.mean(1, keepdim=True), crystals.ptr)[:, 0]
    return x.flatten(1).mean(1) if x.dim() > 1 else x


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Over all numbers; 1 if they are all 0."""
    numbers = torch.cat([x.flatten() for x in tensors])
    return float(numbers.square().mean().sqrt()) or 1.0


def predict_forces(model: Crystalformer, loader: DataLoader[Example]) -> dict[str, list[Tensor]]:
    """What a model of the energy of an atom gives as "forces", (n,3) eV/Å, and "stress", (3,3) eV/Å³: those of each
    crystal of a loader, in order, fp64, on the CPU.

    Every process computes all of them, also where a training has several.
    """
    model.eval()
    device, sampler = next(model.parameters()).device, loader.sampler
    assert isinstance(sampler, BoundedBatches)
    found: dict[str, list[Tensor]] = {FORCES: [], STRESS: []}
    for batch in sampler.batches:
        crystals = loader.dataset[sampler.shard(batch, 0, 1)].crystals.to(device)
        _, forces, stress = differentiate(partial(_energy_of_cells, model), crystals)
        found[FORCES] += forces.double().cpu().split(crystals.ptr.diff().tolist())
        found[STRESS] += stress.double().cpu().unbind()
    return found
