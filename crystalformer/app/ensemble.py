"""An ensemble: models that differ in their seed alone; their mean predicts, their deviation says how surely."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import checks, storage
from ..common.words import short
from ..data.samples import DataError
from ..model.config import CrystalformerConfig
from ..training import Recipe
from . import calibration, plots
from .metrics import METRICS, maes, read_metrics
from .predictions import PREDICTIONS, Predictions, read_predictions, write_predictions
from .predictor import ENSEMBLE
from .report import CARD, duration, file_stems, row_of_table, rows_of_settings
from .run_folder import CONFIG
from .train import DataSource, check_cache, check_types, settings_of
from .trainings import Training, check_jobs, folder_of_trainings, train_all, write_settings

MOST_MEMBERS = 1000


def train_ensemble(
    out: str | Path,
    target: str | Sequence[str],
    source: DataSource,
    ensemble: int,
    recipe: Recipe | None = None,
    model: CrystalformerConfig | None = None,
    *,
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
        target, source, recipe, model, unit: as for `train`.
        seed: of the split and of member-0; the next members have the next seeds.
        resume: go on: members that are done stay, begun ones are resumed.
        jobs: members at once, in processes of their own that share torch's threads; 1 for one after another.
        machine: accelerator, devices, nodes and loaders, as for `train`.

    Returns:
        What metrics.json says: as that of a training, of the members' mean; "members_mae", the mean of their own
        errors; and "calibration", see `calibration.summary`.

    Raises:
        As `train`; DataError for a member that failed in a process of its own.
    """
    out, names = Path(out), (target,) if isinstance(target, str) else tuple(target)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    check_types(source, recipe, model)
    check_members(ensemble)
    check_jobs(jobs)
    check_cache(source, out, resume)
    recipe, model = recipe or Recipe(), model or CrystalformerConfig()
    with folder_of_trainings(out, resume):
        about = {"ensemble": ensemble, "jobs": jobs}
        settings = about | settings_of(names, units, source, recipe, model, seed, machine)
        write_settings(out / CONFIG, settings, resume)
        train_all(members_of(out, source, ensemble, seed), jobs, names, units, recipe, model, machine)
        return combine(out, names, units, settings)


def check_members(ensemble: int, least: int = 2) -> None:
    try:
        checks.check_integer("ensemble", ensemble, least, MOST_MEMBERS)
    except ValueError as error:
        raise DataError(str(error)) from error


def members_of(out: Path, source: DataSource, ensemble: int, seed: int) -> list[Training]:
    """The trainings of an ensemble in a folder, split as the first of them is."""
    split = dataclasses.replace(source, split_seed=seed if source.split_seed is None else source.split_seed)
    return [Training(out / f"member-{i}", split, seed + i) for i in range(ensemble)]


def combine(out: Path, names: tuple[str, ...], units: tuple[str, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes what the trained members of the ensemble in a folder say together, and returns what metrics.json says."""
    folders = [out / f"member-{i}" for i in range(settings["ensemble"])]
    try:
        runs = [read_metrics(folder) for folder in folders]
    except ValueError as error:
        raise DataError(str(error)) from error
    of_members = [read_predictions(folder / PREDICTIONS, names) for folder in folders]
    parts = {part: _mean(part, of_members) for part in of_members[0]}
    scales = {}
    for column, name in enumerate(names):
        errors, deviations = _errors(parts["val"], column)
        try:
            scales[name] = calibration.scale(errors, deviations)
        except ValueError as error:
            raise DataError(f"{out}: {error}") from error
    factors = torch.tensor([scales[name] for name in names], dtype=torch.float64)
    for part, x in parts.items():
        assert x.deviation is not None
        parts[part] = dataclasses.replace(x, deviation=x.deviation * factors)
    write_predictions(out / PREDICTIONS, names, parts)
    metrics: dict[str, Any] = {
        "mae": {part: maes(names, x.predicted, x.true) for part, x in parts.items()},
        "members_mae": {
            part: {name: sum(run["mae"][part][name] for run in runs) / len(runs) for name in names} for part in parts
        },
        "calibration": {
            part: {name: calibration.summary(*_errors(x, column)) for column, name in enumerate(names)}
            for part, x in parts.items()
        },
        "deviation_scale": scales,
        "members": len(runs),
        "seconds": sum(run["seconds"] for run in runs),
    }
    metrics |= {key: runs[0][key] for key in ("baseline_mae", "baseline", "crystals", "epochs", "versions")}
    shown = "test" if "test" in parts else "val"
    stems, labels = file_stems(names), labels_of(names, units)
    for column, (name, label) in enumerate(zip(names, labels, strict=True)):
        x = parts[shown]
        errors, deviations = _errors(x, column)
        plots.parity(out / f"parity_{stems[name]}.png", x.true[:, column], x.predicted[:, column], label)
        curves = {"as they are": deviations / scales[name], "times " + short(scales[name]): deviations}
        observed = {text: calibration.coverage(errors, s) for text, s in curves.items()}
        plots.calibration(out / f"calibration_{stems[name]}.png", calibration.EXPECTED, observed)
    storage.write(out / CARD, _card(metrics, names, labels, shown, settings))
    about = {"members": [folder.name for folder in folders], "deviation_scale": scales}
    storage.write(out / ENSEMBLE, json.dumps(storage.sealed(about), indent=2) + "\n")
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    for name, label in zip(names, labels, strict=True):
        mae, single = (short(metrics[key][shown][name]) for key in ("mae", "members_mae"))
        print(f"{shown} MAE of {label}: {mae} by {len(runs)} members, {single} by one; all of it: {out / CARD}")
    return metrics


def labels_of(names: Sequence[str], units: Sequence[str]) -> list[str]:
    """Names of targets with their units, where these are known."""
    return [f"{name} ({unit})" if unit else name for name, unit in zip(names, units or [""] * len(names), strict=True)]


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
    """Errors and deviations (C) of a target."""
    assert x.deviation is not None
    return (x.predicted - x.true)[:, column], x.deviation[:, column]


def _card(
    metrics: Mapping[str, Any], names: Sequence[str], labels: Sequence[str], shown: str, settings: Mapping[str, Any]
) -> str:
    rows = []
    for name, label in zip(names, labels, strict=True):
        for part, mae in metrics["mae"].items():
            found = (mae[name], metrics["members_mae"][part][name], metrics["baseline_mae"][part][name])
            rows.append(row_of_table(label, part, metrics["crystals"][part], *map(short, found)))
    calibrated = []
    for name, label in zip(names, labels, strict=True):
        for part, of_targets in metrics["calibration"].items():
            x = of_targets[name]
            shares = (f"{x['within_1']:.3f}", f"{x['within_2']:.3f}", f"{x['miscalibration']:.3f}")
            ranks = f"{x['rank_correlation']:.2f}" if "rank_correlation" in x else ""
            calibrated.append(row_of_table(label, part, short(metrics["deviation_scale"][name]), *shares, ranks))
    stems = file_stems(names)
    pictures = "\n".join(
        f"![{title} of {name}]({kind}_{stems[name]}.png)"
        for name in names
        for kind, title in (("parity", "Predictions"), ("calibration", "Calibration"))
    )
    return f"""# Ensemble for {", ".join(names)}

The mean of {metrics["members"]} models predicts, which differ in their seed; the deviation of their predictions says how
surely. Trained in {duration(metrics["seconds"])}.

| target | set | crystals | mean absolute error | of one member | predicting the mean |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Deviations are multiplied by a number that makes them fit the errors on the validation crystals. Of normal errors 0.683 are
within one deviation and 0.954 within two; the miscalibration is the mean difference from such shares; the rank correlation
is that of errors and deviations.

| target | set | multiplied by | within one | within two | miscalibration | rank correlation |
|---|---|---|---|---|---|---|
{chr(10).join(calibrated)}

The plots are of the {shown} crystals.

{pictures}

| setting | value |
|---|---|
{rows_of_settings(settings)}
"""
