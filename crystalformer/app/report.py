"""What a training leaves to read: errors, predictions, plots and a model card."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import storage
from ..common.elements import SYMBOLS
from ..common.version import version
from ..common.words import count, short, some
from ..data.dataset import CrystalDataset
from ..data.forces import ForceDataset
from ..data.samples import Problem, Samples
from ..training import predict
from . import plots
from .force_report import LABELS, write_forces
from .metrics import METRICS, guess, maes, not_learnt
from .predictor import Predictor, not_finite

PREDICTIONS, HISTORY, CARD = "predictions.csv", "history.csv", "README.md"
# Settings that are paths of the machine: the card, which goes to others, has their last part only, or nothing.
PATHS, PRIVATE = ("data", "train", "val", "test", "split", "folds"), ("cache",)
LIBRARIES = ("crystalformer", "torch", "triton", "numpy", "lightning", "pymatgen", "ase")


def write(
    out: Path,
    predictor: Predictor,
    parts: Mapping[str, Samples],
    datasets: Mapping[str, CrystalDataset],
    mean: Tensor,
    history: Sequence[Mapping[str, float]],
    settings: Mapping[str, Any],
    problems: Sequence[Problem],
    device: torch.device,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Writes the report of a training into its folder, metrics.json last, and returns what that says.

    Args:
        out: the folder.
        predictor: the trained model.
        parts: the crystals by set, "train", "val" and perhaps "test".
        datasets: the same, ready for the model.
        mean: (T) fp64, of the training targets; predicting it is the baseline.
        history: one row an epoch, as `fit` returns them.
        settings: of the training.
        problems: the rows that were left out.
        device: that the model was trained on.

    Raises:
        FloatingPointError: if a prediction is not finite.
    """
    names = predictor.names
    predictions, loaders = {}, {}
    for name in ("val", "test"):
        if name in datasets:
            loaders[name] = datasets[name].loader(batch_size, max_images=settings["max_images_per_batch"])
            predictions[name] = predict(predictor.model, loaders[name])
            if bad := not_finite(parts[name].ids, predictions[name]):
                raise FloatingPointError(f"the predictions of {name} are not finite for {some(bad)}")
    shown = "test" if "test" in predictions else "val"
    mae = {name: maes(names, x, parts[name].targets) for name, x in predictions.items()}
    baseline = {name: maes(names, mean, parts[name].targets) for name in predictions}
    if isinstance(datasets["train"], ForceDataset):
        errors, zero = write_forces(out, predictor.model, parts, loaders, shown, history)
        mae, baseline = ({name: x[name] | y[name] for name in x} for x, y in ((mae, errors), (baseline, zero)))
    metrics = {
        "mae": mae,
        "baseline_mae": baseline,
        "baseline": dict(zip(names, mean.tolist(), strict=True)),
        "crystals": {name: len(samples) for name, samples in parts.items()},
        "atoms": sum(data.num_atoms for data in datasets.values()),
        "rows": sum(x.num_atoms for data in datasets.values() for x in data.crystals),
        "left_out": len(problems),
        "parameters": sum(x.numel() for x in predictor.model.parameters()),
        "epochs": len(history),
        "seconds": sum(row["seconds"] for row in history),
        "device": device_name(device),
        "versions": versions(),
    }
    _write_predictions(out / PREDICTIONS, names, parts, predictions)
    columns = list(history[0])
    storage.write(out / HISTORY, storage.csv_text([columns, *([row[name] for name in columns] for row in history)]))
    stems = file_stems(names)
    for column, (name, label) in enumerate(zip(names, predictor.labels, strict=True)):
        stem = stems[name]
        targets, predicted = parts[shown].targets[:, column], predictions[shown][:, column]
        plots.parity(out / f"parity_{stem}.png", targets, predicted, label)
        plots.residuals(out / f"residuals_{stem}.png", targets, predicted, label)
        error = f"mean absolute error of {label}"
        plots.learning_curve(out / f"learning_curve_{stem}.png", history, name, error, baseline["val"][name])
    storage.write(out / CARD, _card(metrics, settings, shown, predictor))
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    return metrics


def nothing_learnt(metrics: Mapping[str, Any], name: str) -> str:
    """What is to be said of a target that `not_learnt` names."""
    mae, mean = (short(metrics[key]["val"][name]) for key in ("mae", "baseline_mae"))
    of = guess(metrics, name)
    return f"Nothing was learnt of {name}: its validation error, {mae}, is no smaller than that of {of}, {mean}."


def versions() -> dict[str, str]:
    """Of what matters for the numbers, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "crystalformer":  # run from a checkout
                found[name] = version
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    return f"{name}, {count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else f"{name}, {device.type}"


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """The names of targets as parts of files' names, all different, also where case does not count."""
    stems: dict[str, str] = {}
    for name in names:
        stem = plain = re.sub(r"[^\w.+-]+", "_", name)
        number = 1
        while stem.casefold() in {x.casefold() for x in stems.values()}:
            number += 1
            stem = f"{plain}_{number}"
        stems[name] = stem
    return stems


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _write_predictions(
    path: Path, names: Sequence[str], parts: Mapping[str, Samples], predictions: Mapping[str, Tensor]
) -> None:
    table: list[list[object]] = [["id", "set", *(column for name in names for column in (name, f"{name}_predicted"))]]
    for part, predicted in predictions.items():
        samples = parts[part]
        for id, true, row in zip(samples.ids, samples.targets.tolist(), predicted.tolist(), strict=True):
            table.append([id, part, *(x for pair in zip(true, row, strict=True) for x in pair)])
    storage.write(path, storage.csv_text(table))


def _card(metrics: Mapping[str, Any], settings: Mapping[str, Any], shown: str, predictor: Predictor) -> str:
    names, labels, baseline = predictor.names, predictor.labels, metrics["baseline_mae"]
    with_forces = [x for x in metrics["mae"][shown] if x not in names]
    stems = file_stems(names)
    rows = "\n".join(
        row_of_table(label, part, metrics["crystals"][part], short(mae[name]), short(baseline[part][name]))
        for name, label in zip((*names, *with_forces), (*labels, *map(LABELS.get, with_forces)), strict=True)
        for part, mae in metrics["mae"].items()
    )
    notes = ["Beside the errors of forces and stress stand those of predicting 0."] if with_forces else []
    notes += [f"**{nothing_learnt(metrics, name)}**" for name in not_learnt(metrics)]
    told = "\n".join(f"\n{note}\n" for note in notes)
    units = "" if any(predictor.units) else ", in the units of the data it was trained on"
    pictures = "\n".join(
        f"![{title} of {name}]({kind}_{stems[name]}.png)"
        for name in names
        for kind, title in (("parity", "Predictions"), ("residuals", "Errors"), ("learning_curve", "Learning curve"))
    )
    pictures += "".join(
        f"\n![{title} of {name}]({kind}_{name}.png)"
        for name in with_forces
        for kind, title in (("parity", "Predictions"), ("learning_curve", "Learning curve"))
    )
    shareable = shareable_settings(settings)
    files = [shareable[name] for name in ("train", "val", "test") if shareable[name]]
    source = shareable["data"] or ", ".join(files)
    crystals = ", ".join(f"{number:,} {part}" for part, number in metrics["crystals"].items())
    left_out = f"{count(metrics['left_out'], 'row')} could not be used"
    left_out += " (problems.csv)" if metrics["left_out"] else ""
    options = rows_of_settings(settings)
    libraries = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    elements = ", ".join(SYMBOLS[z - 1] for z in predictor.model.config.elements)
    return f"""---
library_name: crystalformer
tags: [crystals, materials, regression]
---

# Crystalformer for {", ".join(names)}

Predicts {", ".join(labels)} of a crystal from its structure{units}.

| target | set | crystals | mean absolute error | predicting the mean |
|---|---|---|---|---|
{rows}
{told}
```python
import crystalformer

crystalformer.load("this-folder").predict(structures)  # pymatgen Structures or ase Atoms; (crystals, {len(names)})
```

```
crystalformer predict this-folder crystals.cif
```

## Data

{source}: {crystals} crystals; {left_out}. Elements: {elements}.
{metrics["atoms"]:,} atoms, of which symmetry makes {metrics["rows"]:,} rows.
The model has seen the training crystals' targets only; the plots are of the {shown} crystals.

{pictures}

## Training

{count(metrics["epochs"], "epoch")} in {duration(metrics["seconds"])} on {metrics["device"]};
{metrics["parameters"]:,} parameters.
{libraries}.

| setting | value |
|---|---|
{options}

The model is Crystalformer (T. Taniai et al., *Crystalformer: Infinitely Connected Attention for Periodic Structure
Encoding*, ICLR 2024).
"""


def shareable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without paths of this machine."""
    shareable = {name: value for name, value in settings.items() if name not in PRIVATE}
    return shareable | {name: Path(settings[name]).resolve().name for name in PATHS if settings.get(name)}


def rows_of_settings(settings: Mapping[str, Any]) -> str:
    """Of a table with the columns setting and value."""
    flat = {name: value for name, value in shareable_settings(settings).items() if name != "model"}
    flat |= {f"model.{name}": value for name, value in settings["model"].items()}
    return "\n".join(row_of_table(name, value) for name, value in flat.items() if value is not None)


def row_of_table(*cells: object) -> str:
    """A row of a Markdown table; a column of the data may be named |x|."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
