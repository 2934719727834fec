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
from .force_report import LABELS, UNITS, known_components, write_forces
from .metrics import AUC, METRICS, Score, cell, guess, keys, kind_in, kind_of, known_values, notes, scores
from .predictions import PREDICTIONS, Predictions, write_predictions
from .predictor import Predictor, not_finite

CARD = "README.md"
# Settings that are paths of the machine: the card, which goes to others, has their last part only, or nothing.
PATHS, PRIVATE = ("data", "train", "val", "test", "split", "folds", "from"), ("cache",)
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
    names, kind = predictor.names, kind_of(predictor.model.config.probabilities)
    predictions, loaders = {}, {}
    for name in ("val", "test"):
        if name in datasets:
            loaders[name] = datasets[name].loader(batch_size, max_images=settings["max_images_per_batch"])
            predictions[name] = predict(predictor.model, loaders[name])
            if bad := not_finite(parts[name].ids, predictions[name]):
                raise FloatingPointError(f"the predictions of {name} are not finite for {some(bad)}")
    shown = "test" if "test" in predictions else "val"
    found = {name: scores(kind, names, x, parts[name].targets) for name, x in predictions.items()}
    baseline = {name: scores(kind, names, mean, parts[name].targets) for name in predictions}
    values = {name: known_values(names, samples.targets) for name, samples in parts.items()}
    if isinstance(datasets["train"], ForceDataset):
        for mine, others in zip(
            (found, baseline), write_forces(out, predictor.model, parts, loaders, shown, history), strict=True
        ):
            for name, of_set in others.items():
                mine[name] = {key: mine[name][key] | x for key, x in of_set.items()}
        values = {name: x | known_components(parts[name]) for name, x in values.items()}
    metrics: dict[str, Any] = {
        **{score.key: {name: x[score.key] for name, x in found.items()} for score in kind},
        **{f"baseline_{score.key}": {name: x[score.key] for name, x in baseline.items()} for score in kind},
        "baseline": dict(zip(names, mean.tolist(), strict=True)),
        "values": values,
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
    if settings["best_epoch"]:
        metrics["best_epoch"] = min(history, key=lambda row: row["val_loss"])["epoch"]
    tested = {part: Predictions(parts[part].ids, parts[part].targets, x) for part, x in predictions.items()}
    write_predictions(out / PREDICTIONS, names, tested)
    pictures = draw(out, kind, names, predictor.labels, parts[shown].targets, predictions[shown])
    pictures |= draw_learning(out, kind, names, predictor.labels, history, metrics[f"baseline_{kind[0].key}"]["val"])
    for name in (x for x in metrics[kind[0].key][shown] if x not in names):
        pictures |= {
            f"parity_{name}.png": f"Predictions of {name}",
            f"learning_curve_{name}.png": f"Learning curve of {name}",
        }
    storage.write(out / CARD, _card(metrics, settings, shown, predictor, pictures))
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    return metrics


def draw(
    out: Path, kind: Sequence[Score], names: Sequence[str], labels: Sequence[str], targets: Tensor, predictions: Tensor
) -> dict[str, str]:
    """Draws predictions (C,T) over the targets (C,T) that are known; the titles of the pictures by their files."""
    pictures = {}
    for name, label, true, predicted in zip(names, labels, targets.T, predictions.T, strict=True):
        stem, known = file_stems(names)[name], ~true.isnan()
        true, predicted = true[known], predicted[known]
        if kind[0] is AUC:
            if len(true.unique()) == 2:
                pictures[f"roc_{stem}.png"] = f"ROC curve of {name}"
                plots.roc(out / f"roc_{stem}.png", true, predicted, label)
        elif len(true):
            pictures[f"parity_{stem}.png"] = f"Predictions of {name}"
            plots.parity(out / f"parity_{stem}.png", true, predicted, label)
            pictures[f"residuals_{stem}.png"] = f"Errors of {name}"
            plots.residuals(out / f"residuals_{stem}.png", true, predicted, label)
    return pictures


def draw_learning(
    out: Path,
    kind: Sequence[Score],
    names: Sequence[str],
    labels: Sequence[str],
    history: Sequence[Mapping[str, float]],
    baseline: Mapping[str, float],
) -> dict[str, str]:
    """Draws the score of each target over the epochs; the titles of the pictures by their files."""
    pictures, first = {}, kind[0]
    for name, label in zip(names, labels, strict=True):
        file = f"learning_curve_{file_stems(names)[name]}.png"
        pictures[file] = f"Learning curve of {name}"
        title = f"{first.title} of {label}"
        plots.learning_curve(out / file, history, f"{first.key}/{name}", title, baseline.get(name))
    return pictures


def last_lines(metrics: Mapping[str, Any], predictor: Predictor) -> list[str]:
    """What a training ends with on the terminal: the first score of each target."""
    score, units, lines = kind_in(metrics)[0], UNITS | dict(zip(predictor.names, predictor.units, strict=True)), []
    part = "test" if "test" in metrics[score.key] else "val"
    for name, value in metrics[score.key][part].items():
        mean = short(metrics[f"baseline_{score.key}"][part][name])
        found = f"{short(value)} {units[name]}".rstrip()
        lines.append(f"{part} {score.word} of {name} {found}, of predicting {guess(metrics, name)} {mean}")
    return lines


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


def _card(
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    shown: str,
    predictor: Predictor,
    pictures: Mapping[str, str],
) -> str:
    names, labels, kind = predictor.names, predictor.labels, kind_in(metrics)
    with_forces = [x for x in metrics[kind[0].key][shown] if x not in names]
    rows = "\n".join(
        row_of_table(
            label, part, metrics["values"][part][name], *(cell(metrics[key][part], name) for key in keys(kind))
        )
        for name, label in zip((*names, *with_forces), (*labels, *map(LABELS.get, with_forces)), strict=True)
        for part in metrics[kind[0].key]
    )
    columns = " | ".join(f"{score.title} | predicting the mean" for score in kind)
    said = "\nBeside the errors of forces and stress stand those of predicting 0.\n" if with_forces else ""
    said += "".join(f"\n**{note}**\n" for note in notes(metrics))
    learnt = "classification" if kind[0] is AUC else "regression"
    predicted = ", ".join(f"the probability of {x}" if kind[0] is AUC else x for x in labels)
    units = "" if any(predictor.units) or kind[0] is AUC else ", in the units of the data it was trained on"
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
    best = f" (the weights are those of epoch {metrics['best_epoch']})" if "best_epoch" in metrics else ""
    libraries = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    elements = ", ".join(SYMBOLS[z - 1] for z in predictor.model.config.elements)
    return f"""---
library_name: crystalformer
tags: [crystals, materials, {learnt}]
---

# Crystalformer for {", ".join(names)}

Predicts {predicted} of a crystal from its structure{units}.

| target | set | known values | {columns} |
{"|---" * (3 + 2 * len(kind))}|
{rows}
{said}
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

{count(metrics["epochs"], "epoch")}{best} in {duration(metrics["seconds"])} on {metrics["device"]};
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
