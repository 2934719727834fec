"""Cross-validation: a training for each fold, whose crystals test it, and the means of their errors."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common import checks, storage
from ..common.words import count
from ..data.folds import in_order, random_folds, read_folds, split_of_fold
from ..data.samples import DataError
from ..data.splits import read_split, write_split
from ..model.config import CrystalformerConfig
from ..training import Recipe
from .data_source import DataSource
from .ensemble import check_members, combine, members_of
from .metrics import METRICS, Score, cell, kind_of, known_values, read_metrics, scores
from .predictions import PREDICTIONS, Predictions, read_predictions, write_predictions
from .predictor import labels_of
from .report import CARD, draw, draw_learning, duration, row_of_table, rows_of_settings
from .run_folder import CONFIG, HISTORY
from .train import check_arguments, check_cache, settings_of
from .trainings import Training, check_jobs, folder_of_trainings, train_all, write_settings

# Of a DataSource: crossval makes the sets itself.
SETS_OF_SOURCE = ("train", "val", "test", "split", "split_seed", "fractions")


def crossval(
    out: str | Path,
    target: str | Sequence[str],
    source: DataSource,
    folds: int | str | Path,
    recipe: Recipe | None = None,
    model: CrystalformerConfig | None = None,
    *,
    val_fraction: float = 0.1,
    unit: str | Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    ensemble: int = 1,
    jobs: int = 1,
    **machine: Any,
) -> dict[str, Any]:
    """Trains once for each fold, on the crystals of the others, and tests on those of the fold.

    Args:
        out: a folder, new or empty unless resumed. It gets a folder of a training for each fold, fold-0, ...,
            predictions.csv with what each crystal's own test gave, metrics.json, README.md and plots, of which the
            learning curve is the mean of all trainings.
        target, recipe, model, unit, seed: as for `train`; the seed is also that of random folds.
        source: with `data`, not split.
        folds: how many, drawn at random; or a file with the columns id and `fold`, such as the data themselves.
        val_fraction: share of each training's crystals that validate it.
        resume: go on: folds that are done stay, begun ones are resumed.
        ensemble: how many models are trained for each fold, with seeds of their own; their mean is tested.
        jobs: trainings at once, in processes of their own that share torch's threads; 1 for one after another.
        machine: accelerator and loaders, as for `train`.

    Returns:
        What metrics.json says: "folds", for each its scores; "mae", "rmse" (of classes "auc", "accuracy") and those of
        predicting the mean, "baseline_mae", ..., their means over the folds; and with "_deviation" behind these names
        their standard deviations; of each target.

    Raises:
        DataError: for data or folds that cannot be used, or a fold that failed.
        Otherwise as `train`.
    """
    out = Path(out)
    names, units = check_arguments(target, unit, source, recipe, model, None)
    for name in ("devices", "nodes"):
        if machine.get(name, 1) != 1:
            raise DataError(f"{name} must be 1 in a cross-validation, not {machine[name]}")
    check_members(ensemble, 1)
    check_jobs(jobs)
    check_cache(source, out, resume)
    if source.data is None or source.split is not None:
        raise DataError("source must have data without split: the folds say which crystals test")
    try:
        if not 0 < checks.check_number("val_fraction", val_fraction) < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    except ValueError as error:
        raise DataError(str(error)) from error
    recipe, model = recipe or Recipe(), model or CrystalformerConfig()
    with folder_of_trainings(out, resume):
        fold_of, left_out = _folds(folds, names, source, seed, recipe.loss == "bce")
        order = in_order(list(fold_of.values()))
        about = {"folds": str(folds), "val_fraction": val_fraction, "ensemble": ensemble, "jobs": jobs}
        settings = about | settings_of(names, units, source, recipe, model, seed, machine)
        settings = {name: value for name, value in settings.items() if name not in SETS_OF_SOURCE}
        write_settings(out / CONFIG, settings, resume)
        trainings = []
        for fold in order:
            folder = out / f"fold-{fold}"
            _write_sets(folder.with_suffix(".json"), _sets(fold_of, fold, val_fraction, seed))
            of_fold = dataclasses.replace(source, split=folder.with_suffix(".json"))
            one = [Training(folder, of_fold, seed)]
            trainings += one if ensemble == 1 else members_of(folder, of_fold, ensemble, seed)
        if left_out:
            print(f"{count(left_out, 'row')} cannot be used; problems.csv of each fold says why", flush=True)
        train_all(trainings, jobs, names, units, recipe, model, machine)
        if ensemble > 1:
            for fold in order:
                combine(out / f"fold-{fold}", names, units, settings)
        history = _mean_history([x.out / HISTORY for x in trainings])
        return _report(out, names, units, order, settings, history)


def _folds(
    folds: int | str | Path, names: tuple[str, ...], source: DataSource, seed: int, classes: bool
) -> tuple[dict[str, str], int]:
    """The fold of each crystal that can be used, and how many rows cannot."""
    assert source.data is not None
    try:
        samples, problems = source.read_file(source.data, names, classes)
        if isinstance(folds, int) or str(folds).isdecimal():
            return random_folds(samples.ids, int(str(folds)), seed), len(problems)
        found = read_folds(folds, source.id_column)
    except ValueError as error:
        raise DataError(str(error)) from error
    known = {*samples.ids, *(problem.id for problem in problems)}
    for what, ids in (
        ("crystals that the data do not have", found.keys() - known),
        ("no fold of", set(samples.ids) - found.keys()),
    ):
        if ids:
            shown = ", ".join(sorted(ids)[:5])
            raise DataError(
                f"{folds}: has {what}: {shown}{', ...' if len(ids) > 5 else ''} ({count(len(ids), 'crystal')})"
            )
    return {id: found[id] for id in samples.ids}, len(problems)


def _sets(fold_of: dict[str, str], fold: str, val_fraction: float, seed: int) -> dict[str, list[str]]:
    try:
        sets = split_of_fold(fold_of, fold, val_fraction, seed)
    except ValueError:
        sets = {"train": []}
    if not sets["train"]:
        number = sum(x != fold for x in fold_of.values())
        raise DataError(
            f"folds must leave crystals to train and, by val_fraction={val_fraction}, to validate, but there are "
            f"{number} beside fold {fold}"
        )
    return sets


def _write_sets(path: Path, sets: dict[str, list[str]]) -> None:
    """The crystals that train, validate and test a fold; those of a fold that is there already must be the same."""
    if path.exists() and read_split(path) != sets:
        raise DataError(f"the crystals of {path.stem} must be those of when the cross-validation began")
    write_split(path, sets)


def _mean_history(paths: Sequence[Path]) -> list[dict[str, float]]:
    """One row an epoch, the means over the trainings, as far as the shortest of them goes."""
    epochs = zip(*(csv.DictReader(path.read_text("utf-8").splitlines()) for path in paths), strict=False)
    return [{name: _known_mean([float(row[name]) for row in rows]) for name in rows[0]} for rows in epochs]


def _known_mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


def _report(
    out: Path,
    names: tuple[str, ...],
    units: tuple[str, ...],
    folds: list[str],
    settings: dict[str, Any],
    history: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    tested = {fold: _tested(out / f"fold-{fold}", names) for fold in folds}
    write_predictions(out / PREDICTIONS, names, tested, "fold")
    kind = kind_of(settings["loss"] == "bce")
    of_training = [f"{prefix}{score.key}" for score in kind for prefix in ("members_", "baseline_")]
    found: dict[str, dict[str, Any]] = {}
    for fold, x in tested.items():
        try:
            run = read_metrics(out / f"fold-{fold}")
        except ValueError as error:
            raise DataError(str(error)) from error
        found[fold] = {
            **scores(kind, names, x.predicted, x.true),
            **{key: run[key]["test"] for key in of_training if key in run},
            "values": known_values(names, x.true),
            "crystals": len(x.ids),
            "seconds": run["seconds"],
        }
    true, predicted = (torch.cat([getattr(x, part) for x in tested.values()]) for part in ("true", "predicted"))
    metrics: dict[str, Any] = {"folds": found, "values": known_values(names, true)}
    for key in _columns(kind, found):
        values = {name: [x[key][name] for x in found.values() if name in x[key]] for name in names}
        metrics[key] = {name: statistics.fmean(x) for name, x in values.items() if x}
        metrics[f"{key}_deviation"] = {name: statistics.stdev(x) for name, x in values.items() if len(x) > 1}
    labels = labels_of(names, units)
    pictures = draw(out, kind, names, labels, true, predicted)
    pictures |= draw_learning(out, kind, names, labels, history, metrics[f"baseline_{kind[0].key}"])
    storage.write(out / CARD, _card(kind, metrics, labels, names, settings, pictures))
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    for name, label in zip(names, labels, strict=True):
        mean, baseline = _mean(metrics, kind[0].key, name), cell(metrics[f"baseline_{kind[0].key}"], name)
        print(f"test {kind[0].word} of {label}: {mean} over {len(folds)} folds, of predicting the mean {baseline}")
    print(f"all of it: {out / CARD}")
    return metrics


def _mean(metrics: Mapping[str, Any], key: str, name: str) -> str:
    """The mean of a score over the folds, and its standard deviation, as far as there are any."""
    deviation = cell(metrics[f"{key}_deviation"], name)
    return f"{cell(metrics[key], name)} ± {deviation}" if name in metrics[key] else deviation


def _tested(folder: Path, names: tuple[str, ...]) -> Predictions:
    """Of the crystals of a fold."""
    path = folder / PREDICTIONS
    found = read_predictions(path, names).get("test")
    if found is None or list(found.ids) != read_split(folder.with_suffix(".json"))["test"]:
        raise DataError(f"{path}: must hold the crystals that the fold tests, each once: remove {folder} and resume")
    return found


def _columns(kind: Sequence[Score], folds: Mapping[str, Any]) -> dict[str, str]:
    """The scores that the table of the folds has, and what it calls them."""
    titles: dict[str, str] = {}
    for score in kind:
        titles |= {score.key: score.title, f"members_{score.key}": "of one member"}
        titles[f"baseline_{score.key}"] = "predicting the mean"
    return {key: title for key, title in titles.items() if all(key in x for x in folds.values())}


def _card(
    kind: Sequence[Score],
    metrics: Mapping[str, Any],
    labels: Sequence[str],
    names: Sequence[str],
    settings: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    folds, columns = metrics["folds"], _columns(kind, metrics["folds"])
    rows = []
    for name, label in zip(names, labels, strict=True):
        for fold, x in folds.items():
            cells = (cell(x[key], name) for key in columns)
            rows.append(row_of_table(label, fold, x["values"][name], *cells, duration(x["seconds"])))
        seconds = math.fsum(x["seconds"] for x in folds.values())
        means = (_mean(metrics, key, name) for key in columns)
        rows.append(row_of_table(label, "**mean**", metrics["values"][name], *means, duration(seconds)))
    images = "\n".join(f"![{title}]({file})" for file, title in pictures.items())
    return f"""# Cross-validation of {", ".join(names)}

Each crystal was predicted by the model that was trained without its fold. ± is the standard deviation over folds.

| target | fold | known values | {" | ".join(columns.values())} | time |
{"|---" * (4 + len(columns))}|
{chr(10).join(rows)}

{images}

| setting | value |
|---|---|
{rows_of_settings(settings)}
"""
