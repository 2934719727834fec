"""What a training with forces leaves to read beside the report of its energies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..common import storage
from ..data.dataset import Example
from ..data.forces import FORCES, STRESS, ForceDataset
from ..data.samples import Samples
from ..model.model import Crystalformer
from ..training.forces import predict_forces
from . import plots
from .metrics import MAE, REGRESSION
from .predictor import BATCH_SIZE, MAX_IMAGES

UNITS = {FORCES: "eV/Å", STRESS: "eV/Å³"}
LABELS = {name: f"{name} ({unit})" for name, unit in UNITS.items()}


def force_errors(
    model: Crystalformer, samples: Samples, loader: DataLoader[Example]
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Forces and, if they are known, stresses of the crystals of a loader, and their errors, flat.

    Raises:
        FloatingPointError: if one is not finite.
    """
    known = {name: x for name in LABELS if (x := getattr(samples, name))}
    predicted = {name: x for name, x in predict_forces(model, loader).items() if name in known}
    errors = {name: _flat(x) - _flat(known[name]) for name, x in predicted.items()}
    for name, x in errors.items():
        if not x.isfinite().all():
            raise FloatingPointError(f"the predictions of {name} are not all finite")
    return predicted, errors


def write_forces(
    out: Path,
    model: Crystalformer,
    parts: Mapping[str, Samples],
    loaders: Mapping[str, DataLoader[Example]],
    shown: str,
    history: Sequence[Mapping[str, float]],
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, dict[str, float]]]]:
    """Writes forces.csv, stress.csv and their plots; the scores of each set, and those of predicting 0."""
    found = {name: force_errors(model, parts[name], loader) for name, loader in loaders.items()}
    mine = {name: _scores(errors) for name, (_, errors) in found.items()}
    zero = {name: _scores({x: _flat(getattr(parts[name], x)) for x in errors}) for name, (_, errors) in found.items()}
    for quantity in found[shown][1]:
        table: list[list[object]] = [["id", "set", "row", "x", "y", "z", *(f"{i}_predicted" for i in "xyz")]]
        for name, (predicted, _) in found.items():
            crystals = zip(parts[name].ids, getattr(parts[name], quantity), predicted[quantity], strict=True)
            for id, *both in crystals:
                table += [[id, name, i, *row] for i, row in enumerate(torch.cat(both, 1).tolist())]
        storage.write(out / f"{quantity}.csv", storage.csv_text(table))
        known, label = _flat(getattr(parts[shown], quantity)), LABELS[quantity]
        plots.parity(out / f"parity_{quantity}.png", known, _flat(found[shown][0][quantity]), label, "component")
        error = f"mean absolute error of {label}"
        plots.learning_curve(
            out / f"learning_curve_{quantity}.png",
            history,
            f"{MAE.key}/{quantity}",
            error,
            zero["val"][MAE.key][quantity],
            guess="0",
        )
    return mine, zero


def _scores(errors: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Each score, by its key, of each quantity, of its errors."""
    return {score.key: {x: float(score.of(y, torch.zeros_like(y))) for x, y in errors.items()} for score in REGRESSION}


def known_components(samples: Samples) -> dict[str, int]:
    """How many components of forces and stress are known."""
    return {name: sum(y.numel() for y in x) for name in LABELS if (x := getattr(samples, name))}


def evaluate_forces(model: Crystalformer, samples: Samples) -> dict[str, tuple[Tensor, Tensor]]:
    """What is known of forces and, if it was read, stress, flat, and the errors of a model.

    Raises:
        FloatingPointError: as `force_errors`.
    """
    data = ForceDataset(samples.structures, samples.targets, model, samples.forces, samples.stress)
    _, errors = force_errors(model, samples, data.loader(BATCH_SIZE, max_images=MAX_IMAGES))
    return {name: (_flat(getattr(samples, name)), x) for name, x in errors.items()}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
