"""Cross-validation: a training for each fold, whose crystals test it, and the errors of all together."""

import contextlib
import csv
import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..common import checks, storage
from ..common.process import cores, uninterrupted
from ..common.words import count, short
from ..data.folds import in_order, random_folds, read_folds, split_of_fold
from ..data.samples import DataError
from ..data.splits import read_split, write_split
from ..model.config import CrystalformerConfig
from ..training import Recipe
from . import plots
from .metrics import METRICS, read_metrics
from .report import CARD, PREDICTIONS, duration, file_stems, row_of_table, rows_of_settings
from .run_folder import CONFIG, has_checkpoint, run_folder
from .train import MACHINE, DataSource, settings_of, train

MOST_JOBS = 64
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
    jobs: int = 1,
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
        jobs: folds that are trained at once, each in a process of its own that logs to fold-0.log, ...
        resume: go on: folds that are done stay, begun ones are resumed.
        machine: accelerator, devices, nodes and loaders, as for `train`.

    Returns:
        What metrics.json says: "folds", for each its errors; "mae" and "rmse", their means over the folds; and
        "mae_deviation" and "rmse_deviation", their standard deviations, of each target.

    Raises:
        DataError: for data or folds that cannot be used, or a fold that failed.
        Otherwise as `train`.
    """
    out, names = Path(out), (target,) if isinstance(target, str) else tuple(target)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    if not isinstance(source, DataSource):
        raise TypeError(f"source must be a DataSource, not {type(source).__name__}")
    if source.data is None or source.split is not None:
        raise DataError("source must have data without split: the folds say which crystals test")
    try:
        if not 0 < checks.check_number("val_fraction", val_fraction) < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, not {val_fraction}")
        checks.check_integer("jobs", jobs, 1, MOST_JOBS)
    except ValueError as error:
        raise DataError(str(error)) from error
    recipe, model = recipe or Recipe(), model or CrystalformerConfig()
    with run_folder(out, resume, _begun), _cleared_unless_begun(out):
        fold_of = _folds(folds, names, source, seed)
        order = in_order(list(fold_of.values()))
        about = {"folds": str(folds), "val_fraction": val_fraction}
        settings = about | settings_of(names, units, source, recipe, model, seed, machine)
        settings = {name: value for name, value in settings.items() if name not in SETS_OF_SOURCE}
        _write_settings(out / CONFIG, settings, resume)
        fixed = {"unit": units, "seed": seed, **machine}
        tasks = []
        for fold in order:
            folder, sets = out / f"fold-{fold}", split_of_fold(fold_of, fold, val_fraction, seed)
            _write_sets(folder.with_suffix(".json"), sets)
            if not (folder / METRICS).exists():
                tasks.append((folder, names, source, recipe, model, fixed))
        _run(tasks, min(jobs, max(len(tasks), 1)))
        return _report(out, names, units, order, settings)


def _begun(out: Path) -> bool:
    return any(has_checkpoint(folder) for folder in out.glob("fold-*"))


@contextlib.contextmanager
def _cleared_unless_begun(out: Path) -> Iterator[None]:
    """As `run_folder`, of what stands beside the folders of the folds."""
    try:
        yield
    except BaseException:
        if not _begun(out):
            for path in (*out.glob("fold-*.json"), *out.glob("fold-*.log")):
                path.unlink()
        raise


def _folds(folds: int | str | Path, names: tuple[str, ...], source: DataSource, seed: int) -> dict[str, str]:
    """The fold of each crystal that can be used."""
    assert source.data is not None
    try:
        samples, problems = source.read_file(source.data, names)
        if isinstance(folds, int) or str(folds).isdecimal():
            return random_folds(samples.ids, int(str(folds)), seed)
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
    return {id: found[id] for id in samples.ids}


def _write_settings(path: Path, settings: dict[str, Any], resume: bool) -> None:
    if not resume:
        storage.write(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return
    before = yaml.safe_load(path.read_text())
    for name, value in settings.items():
        if name not in MACHINE and before.get(name) != value:
            raise DataError(f"{name} must be {before.get(name)}, as when the cross-validation began, not {value}")


def _write_sets(path: Path, sets: dict[str, list[str]]) -> None:
    """The crystals that train, validate and test a fold; those of a fold that is there already must be the same."""
    if path.exists() and read_split(path) != sets:
        raise DataError(f"the crystals of {path.stem} must be those of when the cross-validation began")
    write_split(path, sets)


Task = tuple[Path, tuple[str, ...], DataSource, Recipe, CrystalformerConfig, dict[str, Any]]


def _run(tasks: Sequence[Task], jobs: int) -> None:
    if jobs == 1:
        for task in tasks:
            print(f"{task[0].name}", flush=True)
            _train(*task)
        return
    context, threads = get_context("spawn"), max(1, cores() // jobs)
    waiting, running = list(tasks), dict[int, tuple[SpawnProcess, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                process = context.Process(target=_train_in_process, args=(threads, *task))
                with uninterrupted():
                    process.start()
                running[process.sentinel] = (process, task[0])
            for sentinel in connection.wait(list(running)):
                process, folder = running.pop(int(str(sentinel)))
                process.join()
                if process.exitcode:
                    last = folder.with_suffix(".log").read_text().splitlines()[-1:]
                    raise DataError(f"{folder.name} has failed: {' '.join(last)}")
                print(f"{folder.name} is done", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _train_in_process(threads: int, folder: Path, *task: Any) -> None:
    torch.set_num_threads(threads)
    with folder.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            _train(folder, *task)
        except BaseException:
            traceback.print_exc()  # its last line is what crossval says
            sys.exit(1)


def _train(
    folder: Path,
    names: tuple[str, ...],
    source: DataSource,
    recipe: Recipe,
    model: CrystalformerConfig,
    fixed: dict[str, Any],
) -> None:
    """The training of a fold, from its beginning or its last checkpoint."""
    source = dataclasses.replace(source, split=folder.with_suffix(".json"))
    train(folder, names, source, recipe, model, resume=has_checkpoint(folder), **fixed)


def _report(
    out: Path, names: tuple[str, ...], units: tuple[str, ...], folds: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    tested: dict[str, list[dict[str, str]]] = {}
    for fold in folds:
        with (out / f"fold-{fold}" / PREDICTIONS).open(encoding="utf-8", newline="") as file:
            tested[fold] = [row for row in csv.DictReader(file) if row["set"] == "test"]
    table = [["id", "fold", *(column for name in names for column in (name, f"{name}_predicted"))]]
    table += [[row["id"], fold, *(row[x] for x in table[0][2:])] for fold, rows in tested.items() for row in rows]
    storage.write(out / PREDICTIONS, storage.csv_text(table))
    numbers = torch.tensor([[float(x) for x in row[2:]] for row in table[1:]], dtype=torch.float64)
    true, predicted = numbers[:, 0::2], numbers[:, 1::2]
    of_fold = [row[1] for row in table[1:]]
    found = {}
    for fold in folds:
        here = torch.tensor([x == fold for x in of_fold])
        run = read_metrics(out / f"fold-{fold}")
        found[fold] = _errors(names, (predicted - true)[here]) | {
            "baseline_mae": run["baseline_mae"]["test"],
            "crystals": int(here.sum()),
            "seconds": run["seconds"],
        }
    metrics: dict[str, Any] = {"folds": found}
    for key in ("mae", "rmse", "baseline_mae"):
        values = {name: torch.tensor([x[key][name] for x in found.values()], dtype=torch.float64) for name in names}
        metrics[key] = {name: float(x.mean()) for name, x in values.items()}
        metrics[f"{key}_deviation"] = {name: float(x.std()) for name, x in values.items()}
    labels = [f"{name}, {unit}" if unit else name for name, unit in zip(names, units or [""] * len(names), strict=True)]
    stems = file_stems(names)
    for column, (name, label) in enumerate(zip(names, labels, strict=True)):
        plots.parity(
            out / f"parity_{stems[name]}.png", true[:, column], predicted[:, column], label.replace("$", r"\$")
        )
    storage.write(out / CARD, _card(metrics, labels, names, settings))
    storage.write(out / METRICS, json.dumps(storage.sealed(metrics), indent=2) + "\n")
    for name, label in zip(names, labels, strict=True):
        mean, deviation, baseline = (short(metrics[x][name]) for x in ("mae", "mae_deviation", "baseline_mae"))
        print(f"test MAE of {label}: {mean} ± {deviation} over {len(folds)} folds, of predicting the mean {baseline}")
    print(f"all of it: {out / CARD}")
    return metrics


def _errors(names: Sequence[str], errors: Tensor) -> dict[str, dict[str, float]]:
    mae, rmse = errors.abs().mean(0), errors.square().mean(0).sqrt()
    return {key: dict(zip(names, x.tolist(), strict=True)) for key, x in (("mae", mae), ("rmse", rmse))}


def _card(metrics: Mapping[str, Any], labels: Sequence[str], names: Sequence[str], settings: Mapping[str, Any]) -> str:
    rows = []
    for name, label in zip(names, labels, strict=True):
        for fold, x in metrics["folds"].items():
            errors = (short(x[key][name]) for key in ("mae", "rmse", "baseline_mae"))
            rows.append(row_of_table(label, fold, x["crystals"], *errors, duration(x["seconds"])))
        means = (
            f"{short(metrics[x][name])} ± {short(metrics[f'{x}_deviation'][name])}"
            for x in ("mae", "rmse", "baseline_mae")
        )
        rows.append(
            row_of_table(
                label,
                "**mean**",
                sum(x["crystals"] for x in metrics["folds"].values()),
                *means,
                duration(math.fsum(x["seconds"] for x in metrics["folds"].values())),
            )
        )
    stems = file_stems(names)
    pictures = "\n".join(f"![Predictions of {name}](parity_{stems[name]}.png)" for name in names)
    return f"""# Cross-validation of {", ".join(names)}

Each crystal was predicted by the model that was trained without its fold. ± is the standard deviation over folds.

| target | fold | crystals | mean absolute error | root mean square error | predicting the mean | time |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{pictures}

| setting | value |
|---|---|
{rows_of_settings(settings)}
"""
