"""An ensemble: models that differ in their seed alone; their mean predicts, their deviation says how surely."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..common import checks, storage
from ..common.words import short
from ..data.samples import DataError
from ..model.config import CrystalformerConfig
from ..training import Recipe
from . import calibration, plots
from .data_source import DataSource
from .fine_tuning import Start, read_model
from .metrics import METRICS, REGRESSION, Score, cell, kind_of, read_metrics, scores
from .predictions import PREDICTIONS, Predictions, read_predictions, write_predictions
from .predictor import ENSEMBLE, labels_of
from .report import CARD, draw, duration, file_stems, row_of_table, rows_of_settings
from .run_folder import CONFIG
from .train import check_arguments, check_cache, settings_of
from .trainings import Training, check_jobs, folder_of_trainings, settings_of_start, train_all, write_settings

MOST_MEMBERS = 1000


def train_ensemble(
    out: str | Path,
    target: str | Sequence[str],
    source: DataSource,
    ensemble: int,
    recipe: Recipe | None = None,
    model: CrystalformerConfig | None = None,
    *,
    start: Start | None = None,
    unit: str | Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    jobs: int = 1,
    **machine: Any,
) -> dict[str, Any]:
    """Trains several models on the same crystals, with seeds of their own.

    Args:
        out: a folder, new or empty unless resumed. It gets a folder of a training for each member, member-0, ..., and
            predictions.csv, metrics.json, plots and README.md of the ensemble.
        ensemble: how many members.
        target, source, recipe, model, start, unit: as for `train`.
        seed: of the split and of member-0; the next members have the next seeds.
        resume: go on: members that are done stay, begun ones are resumed.
        jobs: members at once, in processes of their own that share torch's threads; 1 for one after another.
        machine: accelerator, devices, nodes and loaders, as for `train`.

    Returns:
        What metrics.json says: as that of a training, of the members' mean; with "members_" before the name of a
        score, the mean of their own; and "calibration", see `calibration.summary`.

    Raises:
        As `train`; DataError for a member that failed in a process of its own.
    """
    out = Path(out)
    names, units = check_arguments(target, unit, source, recipe, model, start)
    check_members(ensemble)
    if twice := [name for name in names if f"{name}_deviation" in names]:
        raise DataError(f"target must not be {twice[0]}_deviation beside {twice[0]}, whose deviation is called so")
    if start is not None and start.sha256 is None:  # so that all members start from the same
        start = dataclasses.replace(start, sha256=storage.sha256({}, read_model(start.folder).state_dict()))
    check_jobs(jobs)
    check_cache(source, out, resume)
    recipe, model = recipe or Recipe(), model or (read_model(start.folder).config if start else CrystalformerConfig())
    with folder_of_trainings(out, resume):
        about = {"ensemble": ensemble, "jobs": jobs}
        settings = about | settings_of(names, units, source, recipe, model, seed, machine) | settings_of_start(start)
        write_settings(out / CONFIG, settings, resume)
        train_all(members_of(out, source, ensemble, seed), jobs, names, units, recipe, model, machine, start)
        return combine(out, names, units, settings)


def check_members(ensemble: int, least: int = 2) -> None:
    try:
        checks.check_integer("ensemble", ensemble, least, MOST_MEMBERS)
    except ValueError as error:
        raise DataError(str(error)) from error


def members_of(out: Path, source: DataSource, ensemble: int, seed: int) -> list[Training]:
    """The trainings of an ensemble in a folder, split as the first of them is."""
    if source.data is not None and source.split is None and source.split_seed is None:
        source = dataclasses.replace(source, split_seed=seed)
    return [Training(out / f"member-{i}", source, seed + i) for i in range(ensemble)]


def combine(out: Path, names: tuple[str, ...], units: tuple[str, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes what the trained members of the ensemble in a folder say together, and returns what metrics.json says."""
    folders = [out / f"member-{i}" for i in range(settings["ensemble"])]
    try:
        runs = [read_metrics(folder) for folder in folders]
    except ValueError as error:
        raise DataError(str(error)) from error
    of_members = [read_predictions(folder / PREDICTIONS, names) for folder in folders]
    parts = {part: _mean(part, of_members) for part in of_members[0]}
    kind, labels = kind_of(settings["loss"] == "bce"), labels_of(names, units)
    shown = "test" if "test" in parts else "val"
    scales = _calibrate(out, names, parts) if kind is REGRESSION else dict.fromkeys(names, 1.0)
    write_predictions(out / PREDICTIONS, names, parts)
    found = {part: scores(kind, names, x.predicted, x.true) for part, x in parts.items()}
    metrics: dict[str, Any] = {"deviation_scale": scales, "members": len(runs)}
    for key in (score.key for score in kind):
        metrics[key] = {part: x[key] for part, x in found.items()}
        metrics[f"members_{key}"] = {
            part: {name: fmean(run[key][part][name] for run in runs) for name in x[key]} for part, x in found.items()
        }
        metrics[f"baseline_{key}"] = runs[0][f"baseline_{key}"]
    metrics |= {key: runs[0][key] for key in ("baseline", "values", "crystals", "epochs", "versions")}
    metrics["seconds"] = math.fsum(run["seconds"] for run in runs)
    pictures = draw(out, kind, names, labels, parts[shown].true, parts[shown].predicted)
    if kind is REGRESSION:
        metrics["calibration"] = {
            part: {
                name: calibration.summary(*_errors(x, column))
                for column, name in enumerate(names)
                if metrics["values"][part][name]
            }
            for part, x in parts.items()
        }
        pictures |= _draw_calibration(out, names, parts[shown], scales)
    storage.write(out / CARD, _card(kind, metrics, names, labels, shown, settings, pictures))
    about = {"members": [folder.name for folder in folders], "deviation_scale": scales}
    storage.write(out / ENSEMBLE, json.dumps(storage.sealed(about), indent=2) + "\n")
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    for name, label in zip(names, labels, strict=True):
        mine, single = (cell(metrics[f"{prefix}{kind[0].key}"][shown], name) for prefix in ("", "members_"))
        print(f"{shown} {kind[0].word} of {label}: {mine} by {len(runs)} members, {single} by one")
    print(f"all of it: {out / CARD}")
    return metrics


def _calibrate(out: Path, names: Sequence[str], parts: dict[str, Predictions]) -> dict[str, float]:
    """Multiplies the deviations of all sets by what makes them fit the validation errors, and returns that."""
    scales = {}
    for column, name in enumerate(names):
        try:
            scales[name] = calibration.scale(*_errors(parts["val"], column))
        except ValueError as error:
            raise DataError(f"{out}: {name}: {error}") from error
    factors = torch.tensor([scales[name] for name in names], dtype=torch.float64)
    for part, x in parts.items():
        assert x.deviation is not None
        parts[part] = dataclasses.replace(x, deviation=x.deviation * factors)
    return scales


def _draw_calibration(
    out: Path, names: Sequence[str], tested: Predictions, scales: Mapping[str, float]
) -> dict[str, str]:
    """Draws how well the deviations fit the errors of a set; the titles of the pictures by their files."""
    pictures, stems = {}, file_stems(names)
    for column, name in enumerate(names):
        errors, deviations = _errors(tested, column)
        if not len(errors):
            continue
        curves = {"as they are": deviations / scales[name], f"times {short(scales[name])}": deviations}
        observed = {text: calibration.coverage(errors, x) for text, x in curves.items()}
        file = f"calibration_{stems[name]}.png"
        pictures[file] = f"Calibration of {name}"
        plots.calibration(out / file, calibration.EXPECTED, observed)
    return pictures


def _mean(part: str, of_members: Sequence[Mapping[str, Predictions]]) -> Predictions:
    """Mean and deviation of the members' predictions for one set."""
    found = [x.get(part) for x in of_members]
    first = found[0]
    assert first is not None
    if any(x is None or x.ids != first.ids for x in found):
        raise DataError(f"the members of an ensemble must have the same {part} crystals")
    predicted = torch.stack([x.predicted for x in found if x is not None])
    return Predictions(first.ids, first.true, predicted.mean(0), predicted.std(0))


def _errors(x: Predictions, column: int) -> tuple[Tensor, Tensor]:
    """Errors and deviations of a target, of the crystals where it is known."""
    assert x.deviation is not None
    known = ~x.true[:, column].isnan()
    return (x.predicted - x.true)[known, column], x.deviation[known, column]


def _card(
    kind: Sequence[Score],
    metrics: Mapping[str, Any],
    names: Sequence[str],
    labels: Sequence[str],
    shown: str,
    settings: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    rows = []
    for name, label in zip(names, labels, strict=True):
        for part in metrics[kind[0].key]:
            keys = (f"{prefix}{score.key}" for score in kind for prefix in ("", "members_", "baseline_"))
            cells = (cell(metrics[key][part], name) for key in keys)
            rows.append(row_of_table(label, part, metrics["values"][part][name], *cells))
    columns = " | ".join(f"{score.title} | of one member | predicting the mean" for score in kind)
    images = "\n".join(f"![{title}]({file})" for file, title in pictures.items())
    return f"""# Ensemble for {", ".join(names)}

The mean of {metrics["members"]} models predicts, which differ in their seed; the deviation of their predictions says
how surely. Trained in {duration(metrics["seconds"])}.

| target | set | known values | {columns} |
{"|---" * (3 + 3 * len(kind))}|
{chr(10).join(rows)}
{_calibration_of(metrics, names, labels)}
The plots are of the {shown} crystals.

{images}

| setting | value |
|---|---|
{rows_of_settings(settings)}
"""


def _calibration_of(metrics: Mapping[str, Any], names: Sequence[str], labels: Sequence[str]) -> str:
    """Of the card; of probabilities there is none."""
    rows = []
    for name, label in zip(names, labels, strict=True):
        for part, of_targets in metrics.get("calibration", {}).items():
            if name not in of_targets:
                continue
            x = of_targets[name]
            shares = (f"{x[key]:.3f}" for key in ("within_1", "within_2", "miscalibration"))
            ranks = f"{x['rank_correlation']:.2f}" if "rank_correlation" in x else "-"
            rows.append(row_of_table(label, part, short(metrics["deviation_scale"][name]), *shares, ranks))
    if not rows:
        return ""
    return f"""
Deviations are multiplied by a number that makes them fit the errors on the validation crystals. Of normal errors 0.683
are within one deviation and 0.954 within two; the miscalibration is the mean difference from such shares; the rank
correlation is that of errors and deviations.

| target | set | multiplied by | within one | within two | miscalibration | rank correlation |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
