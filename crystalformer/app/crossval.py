"""Cross-validation: a training for each fold, whose crystals test it, and the means of their errors."""

import contextlib
import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common import checks, storage
from ..common.words import count
from ..data.folds import in_order, random_folds, read_folds, split_of_fold
from ..data.samples import DataError
from ..data.splits import read_split, write_split
from ..model.config import CrystalformerConfig
from ..training import Recipe
from .metrics import METRICS, Score, cell, keys, kind_of, known_values, read_metrics, scores
from .report import CARD, PREDICTIONS, draw, duration, row_of_table, rows_of_settings
from .run_folder import CONFIG, has_checkpoint, run_folder
from .train import MACHINE, DataSource, check_cache, check_types, settings_of, train

# Of a DataSource: crossval makes the sets itself.
SETS_OF_SOURCE = ("train", "val", "test", "split", "fractions")


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
    **machine: Any,
) -> dict[str, Any]:
    """Trains once for each fold, on the crystals of the others, and tests on those of the fold.

    Args:
        out: a folder, new or empty unless resumed. It gets a folder of a training for each fold, fold-0, ...,
            predictions.csv with what each crystal's own test gave, metrics.json, plots and README.md.
        target, recipe, model, unit, seed: as for `train`; the seed is also that of random folds.
        source: with `data`, not split.
        folds: how many, drawn at random; or a file with the columns id and `fold`, such as the data themselves.
        val_fraction: share of each training's crystals that validate it.
        resume: go on: folds that are done stay, begun ones are resumed.
        machine: accelerator and loaders, as for `train`.

    Returns:
        What metrics.json says: "folds", for each its scores; "mae", "rmse" (of classes "auc", "accuracy") and those of
        predicting the mean, "baseline_mae", ..., their means over the folds; and with "_deviation" behind these names
        their standard deviations; of each target.

    Raises:
        DataError: for data or folds that cannot be used, or a fold that failed.
        Otherwise as `train`.
    """
    out, names = Path(out), (target,) if isinstance(target, str) else tuple(target)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    check_types(source, recipe, model)
    for name in ("devices", "nodes"):
        if machine.get(name, 1) != 1:
            raise DataError(f"{name} must be 1 in a cross-validation, not {machine[name]}")
    check_cache(source, out, resume)
    if source.data is None or source.split is not None:
        raise DataError("source must have data without split: the folds say which crystals test")
    try:
        if not 0 < checks.check_number("val_fraction", val_fraction) < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
    except ValueError as error:
        raise DataError(str(error)) from error
    recipe, model = recipe or Recipe(), model or CrystalformerConfig()
    with run_folder(out, resume, _begun), _cleared_unless(resume, out):
        fold_of, left_out = _folds(folds, names, source, seed, recipe.loss == "bce")
        order = in_order(list(fold_of.values()))
        about = {"folds": str(folds), "val_fraction": val_fraction}
        settings = about | settings_of(names, units, source, recipe, model, seed, machine)
        settings = {name: value for name, value in settings.items() if name not in SETS_OF_SOURCE}
        _write_settings(out / CONFIG, settings, resume)
        fixed = {"unit": units, "seed": seed, **machine}
        for fold in order:
            folder = out / f"fold-{fold}"
            _write_sets(folder.with_suffix(".json"), _sets(fold_of, fold, val_fraction, seed))
        if left_out:
            print(f"{count(left_out, 'row')} cannot be used; problems.csv of each fold says why", flush=True)
        for fold in order:
            folder = out / f"fold-{fold}"
            if not (folder / METRICS).exists():
                print(folder.name, flush=True)
                of_fold = dataclasses.replace(source, split=folder.with_suffix(".json"))
                train(folder, names, of_fold, recipe, model, resume=has_checkpoint(folder), **fixed)
        return _report(out, names, units, order, settings)


def _begun(out: Path) -> bool:
    return any(has_checkpoint(folder) or (folder / METRICS).exists() for folder in out.glob("fold-*"))


@contextlib.contextmanager
def _cleared_unless(resume: bool, out: Path) -> Iterator[None]:
    """As `run_folder`, of what stands beside the folders of the folds."""
    try:
        yield
    except BaseException:
        if not resume and not _begun(out):
            for path in out.glob("fold-*.json"):
                path.unlink()
        raise


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


def _write_settings(path: Path, settings: dict[str, Any], resume: bool) -> None:
    if not resume:
        storage.write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return
    before = yaml.safe_load(path.read_text())
    for name, value in settings.items():
        if name not in (*MACHINE, "workers", "cache", "strict") and before.get(name) != value:
            raise DataError(f"{name} must be {before.get(name)}, as when the cross-validation began, not {value}")


def _write_sets(path: Path, sets: dict[str, list[str]]) -> None:
    """The crystals that train, validate and test a fold; those of a fold that is there already must be the same."""
    if path.exists() and read_split(path) != sets:
        raise DataError(f"the crystals of {path.stem} must be those of when the cross-validation began")
    write_split(path, sets)


def _report(
    out: Path, names: tuple[str, ...], units: tuple[str, ...], folds: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    tested = {fold: _tested(out / f"fold-{fold}") for fold in folds}
    table = [["id", "fold", *(column for name in names for column in (name, f"{name}_predicted"))]]
    table += [[id, fold, *values] for fold, rows in tested.items() for id, _, *values in rows]
    storage.write(out / PREDICTIONS, storage.csv_text(table))
    numbers = torch.tensor([[float(x or "nan") for x in row[2:]] for row in table[1:]], dtype=torch.float64)
    true, predicted = numbers[:, 0::2], numbers[:, 1::2]
    kind = kind_of(settings["loss"] == "bce")
    of_fold = [row[1] for row in table[1:]]
    found: dict[str, dict[str, Any]] = {}
    for fold in folds:
        here = torch.tensor([x == fold for x in of_fold])
        try:
            run = read_metrics(out / f"fold-{fold}")
        except ValueError as error:
            raise DataError(str(error)) from error
        found[fold] = {
            **scores(kind, names, predicted[here], true[here]),
            **{f"baseline_{score.key}": run[f"baseline_{score.key}"]["test"] for score in kind},
            "values": known_values(names, true[here]),
            "crystals": int(here.sum()),
            "seconds": run["seconds"],
        }
    metrics: dict[str, Any] = {"folds": found, "values": known_values(names, true)}
    for key in keys(kind):
        values = {name: [x[key][name] for x in found.values() if name in x[key]] for name in names}
        metrics[key] = {name: statistics.fmean(x) for name, x in values.items() if x}
        metrics[f"{key}_deviation"] = {name: statistics.stdev(x) for name, x in values.items() if len(x) > 1}
    labels = [f"{name}, {unit}" if unit else name for name, unit in zip(names, units or [""] * len(names), strict=True)]
    pictures = draw(out, kind, names, labels, true, predicted)
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


def _tested(folder: Path) -> list[list[str]]:
    """The rows of the crystals that a fold tested: id, "test", then the value and the prediction of each target."""
    path = folder / PREDICTIONS
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row[1:2] == ["test"]]
        whole = [row[0] for row in rows] == read_split(folder.with_suffix(".json"))["test"]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not whole or len({len(row) for row in rows}) != 1:
        raise DataError(f"{path}: must hold the crystals that the fold tests, each once: remove {folder} and resume")
    return rows


def _card(
    kind: Sequence[Score],
    metrics: Mapping[str, Any],
    labels: Sequence[str],
    names: Sequence[str],
    settings: Mapping[str, Any],
    pictures: Mapping[str, str],
) -> str:
    folds, rows = metrics["folds"], []
    for name, label in zip(names, labels, strict=True):
        for fold, x in folds.items():
            cells = (cell(x[key], name) for key in keys(kind))
            rows.append(row_of_table(label, fold, x["values"][name], *cells, duration(x["seconds"])))
        seconds = math.fsum(x["seconds"] for x in folds.values())
        means = (_mean(metrics, key, name) for key in keys(kind))
        rows.append(row_of_table(label, "**mean**", metrics["values"][name], *means, duration(seconds)))
    columns = " | ".join(f"{score.title} | predicting the mean" for score in kind)
    images = "\n".join(f"![{title}]({file})" for file, title in pictures.items())
    return f"""# Cross-validation of {", ".join(names)}

Each crystal was predicted by the model that was trained without its fold. ± is the standard deviation over folds.

| target | fold | known values | {columns} | time |
{"|---" * (4 + 2 * len(kind))}|
{chr(10).join(rows)}

{images}

| setting | value |
|---|---|
{rows_of_settings(settings)}
"""
