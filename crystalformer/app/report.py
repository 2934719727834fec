"""What a training leaves to read: errors, predictions, plots and a model card."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import storage
from ..common.elements import SYMBOLS
from ..common.version import version
from ..common.words import count, short, some
from ..data.dataset import CrystalDataset
from ..data.samples import Problem, Samples
from ..training import predict
from . import plots
from .metrics import METRICS, SCORES, cell, known_values, not_learnt, scores
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
    predictions = {}
    for name in ("val", "test"):
        if name in datasets:
            loader = datasets[name].loader(batch_size, max_images=settings["max_images_per_batch"])
            predictions[name] = predict(predictor.model, loader)
            if bad := not_finite(parts[name].ids, predictions[name]):
                raise FloatingPointError(f"the predictions of {name} are not finite for {some(bad)}")
    found = {name: scores(names, x, parts[name].targets) for name, x in predictions.items()}
    baseline = {name: scores(names, mean, parts[name].targets) for name in predictions}
    metrics = {
        **{score.key: {name: x[score.key] for name, x in found.items()} for score in SCORES},
        **{f"baseline_{score.key}": {name: x[score.key] for name, x in baseline.items()} for score in SCORES},
        "baseline": dict(zip(names, mean.tolist(), strict=True)),
        "values": {name: known_values(names, samples.targets) for name, samples in parts.items()},
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
    shown = "test" if "test" in predictions else "val"
    pictures = _plot(out, predictor, parts[shown].targets, predictions[shown], history, metrics)
    storage.write(out / CARD, _card(metrics, settings, shown, predictor, pictures))
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    return metrics


def _plot(
    out: Path,
    predictor: Predictor,
    targets: Tensor,
    predictions: Tensor,
    history: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Any],
) -> dict[str, str]:
    """Draws what is known of each target (C,T); the titles of the pictures by their files."""
    pictures = {}
    for column, (name, label) in enumerate(zip(predictor.names, predictor.labels, strict=True)):
        stem = file_stems(predictor.names)[name]
        known = ~targets[:, column].isnan()
        true, predicted = targets[known, column], predictions[known, column]
        if known.any():
            pictures[f"parity_{stem}.png"] = f"Predictions of {name}"
            plots.parity(out / f"parity_{stem}.png", true, predicted, label)
            pictures[f"residuals_{stem}.png"] = f"Errors of {name}"
            plots.residuals(out / f"residuals_{stem}.png", true, predicted, label)
        pictures[f"learning_curve_{stem}.png"] = f"Learning curve of {name}"
        error, baseline = f"mean absolute error of {label}", metrics["baseline_mae"]["val"].get(name)
        plots.learning_curve(out / f"learning_curve_{stem}.png", history, name, error, baseline)
    return pictures


def nothing_learnt(metrics: Mapping[str, Any], name: str) -> str:
    """What is to be said of a target that `not_learnt` names."""
    mae, mean = (short(metrics[key]["val"][name]) for key in ("mae", "baseline_mae"))
    return f"Nothing was learnt of {name}: its validation error, {mae}, is no smaller than that of the mean, {mean}."


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
            pairs = (("" if isnan(x) else x, y) for x, y in zip(true, row, strict=True))
            table.append([id, part, *(x for pair in pairs for x in pair)])
    storage.write(path, storage.csv_text(table))


def _card(
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    shown: str,
    predictor: Predictor,
    pictures: Mapping[str, str],
) -> str:
    names, labels = predictor.names, predictor.labels
    keys = [key for score in SCORES for key in (score.key, f"baseline_{score.key}")]
    rows = "\n".join(
        row_of_table(label, part, metrics["values"][part][name], *(cell(metrics[key][part], name) for key in keys))
        for name, label in zip(names, labels, strict=True)
        for part in metrics["mae"]
    )
    columns = " | ".join(f"{score.title} | predicting the mean" for score in SCORES)
    nothing = "\n".join(f"\n**{nothing_learnt(metrics, name)}**\n" for name in not_learnt(metrics))
    units = "" if any(predictor.units) else ", in the units of the data it was trained on"
    images = "\n".join(f"![{title}]({file})" for file, title in pictures.items())
    shareable = shareable_settings(settings)
    files = [shareable[name] for name in ("train", "val", "test") if shareable[name]]
    source = shareable["data"] or ", ".join(files)
    crystals = ", ".join(f"{number:,} {part}" for part, number in metrics["crystals"].items())
    left_out = f"{count(metrics['left_out'], 'row')} could not be used"
    left_out += " (problems.csv)" if metrics["left_out"] else ""
    options = rows_of_settings(settings)
    values = [(name, {part: x[name] for part, x in metrics["values"].items()}) for name in names]
    incomplete = "".join(
        f"\n{name} is known of " + ", ".join(f"{number:,} {part}" for part, number in known.items()) + " crystals."
        for name, known in values
        if known != metrics["crystals"]
    )
    libraries = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    elements = ", ".join(SYMBOLS[z - 1] for z in predictor.model.config.elements)
    return f"""---
library_name: crystalformer
tags: [crystals, materials, regression]
---

# Crystalformer for {", ".join(names)}

Predicts {", ".join(labels)} of a crystal from its structure{units}.

| target | set | known values | {columns} |
{"|---" * (3 + len(keys))}|
{rows}
{nothing}
```python
import crystalformer

crystalformer.load("this-folder").predict(structures)  # pymatgen Structures or ase Atoms; (crystals, {len(names)})
```

```
crystalformer predict this-folder crystals.cif
```

## Data

{source}: {crystals} crystals; {left_out}. Elements: {elements}.
{metrics["atoms"]:,} atoms, of which symmetry makes {metrics["rows"]:,} rows.{incomplete}
The model has seen the training crystals' targets only; the plots are of the {shown} crystals.

{images}

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
