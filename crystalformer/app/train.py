"""A training from files to a folder that holds all of it: settings, model, errors, predictions, plots, a model card."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from ..common import checks, storage
from ..common.backends import describe_backend
from ..common.words import count, short
from ..data import CrystalBatch
from ..data.crystals import build_crystals
from ..data.dataset import CrystalDataset
from ..data.readers import read_samples
from ..data.samples import DataError, Problem, Samples, write_problems
from ..data.splits import SETS, read_split, split, write_split
from ..geometry.orbits import SYMMETRY_TOL
from ..model.config import FROM_TRAINING, CrystalformerConfig
from ..model.model import Crystalformer
from ..training import AverageLastEpochs, Progress, Recipe, Regression, fit, standardisation
from ..training.machine import check_machine
from . import report
from .metrics import not_learnt
from .predictor import MODEL_FOLDER, Predictor
from .run_folder import CHECKPOINTS, CONFIG, PROBLEMS, SPLIT, run_folder

MOST_SEED = 2**64 - 1  # of torch


# What a training runs on; its numbers do not depend on it.
MACHINE = ("accelerator", "devices", "nodes", "loaders")


@dataclass(frozen=True)
class DataSource:
    """Where the crystals come from and which of them train, validate and test.

    Attributes:
        data: file or folder with all crystals: CSV, JSON, CIF, POSCAR, extxyz, an ase database. Split at random by
            `fractions` and the seed, or as `split` says.
        train: file or folder with the crystals to learn from, instead of `data`.
        val: those to validate on, after each epoch; with `train`.
        test: those to test the trained model on; with `train`, may be missing.
        split: JSON file with the ids of "train", "val" and "test".
        fractions: shares of train, val and test.
        id_column: name of the column with the ids; found by itself where it has a usual name.
        primitive: learn from primitive cells. The model's predictions do not depend on the cell; small ones are faster.
        strict: stop at the first crystal that cannot be read; else they are listed in problems.csv and left out.
        cache: folder that keeps parsed structures and image lists for other trainings.
        symmetry_tol: learn from one row for each orbit of atoms that the symmetry makes equivalent within this, Å: the
            same model from fewer rows. 0 gives every atom its row.
        workers: processes that parse structures, which pays from some ten thousand on, and threads that build the image
            lists; 0 parses in this process and builds with torch's threads.
    """

    data: Path | None = None  # strings too, as for the other paths
    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    split: Path | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    id_column: str | None = None
    primitive: bool = False
    symmetry_tol: float = SYMMETRY_TOL
    strict: bool = False
    cache: Path | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "train", "val", "test", "split", "cache"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        if (self.data is None) == (self.train is None):
            raise DataError("give the crystals with either data or train, val and test")
        if self.data is None and self.val is None:
            raise DataError("val must be given with train: a training validates behind each epoch")
        if self.data is None and self.split is not None:
            raise DataError("split must be given with data: train and val are split already")
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise DataError(f"cache must be a folder, not the file {self.cache}")

    def read_file(self, path: Path, targets: Sequence[str]) -> tuple[Samples, list[Problem]]:
        """The crystals of a file, and the rows that cannot be used.

        Raises:
            DataError: if there are no crystals.
        """
        with progress_bar(f"  reading {path.name}") as advance:
            read, bad = read_samples(
                path,
                targets,
                id_column=self.id_column,
                primitive=self.primitive,
                strict=self.strict,
                workers=self.workers,
                cache=self.cache,
                progress=advance,
            )
        if not len(read):
            raise DataError(f"{path}: no crystal can be used" + (f": {bad[0]}" if bad else ""))
        return read, bad

    def read(self, targets: Sequence[str], seed: int) -> tuple[dict[str, Samples], list[Problem]]:
        """The crystals of train, val and test, and the rows that cannot be used.

        Raises:
            DataError: for data that cannot be used.
        """
        problems: list[Problem] = []

        def samples(path: Path) -> Samples:
            read, bad = self.read_file(path, targets)
            problems.extend(bad)
            return read

        try:
            if self.data is None:
                given = {"train": self.train, "val": self.val, "test": self.test}
                return {name: samples(path) for name, path in given.items() if path is not None}, problems
            everything = samples(self.data)
            chosen = split(everything.ids, self.fractions, seed) if self.split is None else read_split(self.split)
            bad = {problem.id for problem in problems}
            good = {name: [id for id in ids if id not in bad] for name, ids in chosen.items()}
            parts = {name: everything.select(ids) for name, ids in good.items() if ids}
        except ValueError as error:
            raise DataError(str(error)) from error
        for name in ("train", "val"):
            if name not in parts:
                raise DataError(f"{name} must hold at least one crystal, not none: see the split or its fractions")
        return parts, problems


def train(
    out: str | Path,
    target: str | Sequence[str],
    source: DataSource,
    recipe: Recipe | None = None,
    model: CrystalformerConfig | None = None,
    *,
    unit: str | Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    loaders: int = 0,
) -> Predictor:
    """Trains a model and writes a folder with all that belongs to it; see docs/tutorial.md.

    Args:
        out: the folder, new or empty unless the training is resumed.
        target: name of the column to learn, or several.
        source: of the crystals.
        recipe: the paper's for Materials Project data if None.
        model: its sizes and physics, the paper's if None; the targets are filled in.
        unit: of the target, as "eV/atom", or one for each; for plots, tables and the model card.
        seed: of the split, the first weights, the order of the crystals and dropout.
        resume: go on with the training in `out`, after its last whole epoch.
        accelerator: "auto", "cpu" or "gpu".
        devices, nodes: as lightning's Trainer takes them. Under torchrun its processes are used.
        loaders: processes that join coming batches, for each that trains: where a GPU would wait for them. 0 for none.

    Returns:
        The trained model.

    Raises:
        DataError: for data that cannot be used.
        FileExistsError: if `out` holds something already, and is not to be resumed, or while another training runs
            in it.
        CheckpointError: if the training cannot be resumed.
        TypeError: for a source, recipe or model that is none.
    """
    out, names = Path(out), (target,) if isinstance(target, str) else tuple(target)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    check_types(source, recipe, model)
    if not names:
        raise DataError("target must name at least one column")
    if units and len(units) != len(names):
        raise DataError(f"unit must be one for each target, {', '.join(names)}, not {', '.join(units)}")
    machine = {"accelerator": accelerator, "devices": devices, "nodes": nodes, "loaders": loaders}
    check_cache(source, out, resume)
    with run_folder(out, resume) if _rank() == 0 else nullcontext():
        recipe = Recipe() if recipe is None else recipe
        model = CrystalformerConfig() if model is None else model
        return _train(out, names, units, source, recipe, model, seed, resume, machine)


def check_cache(source: DataSource, out: Path, resume: bool) -> None:
    cache = None if resume or source.cache is None else Path(realpath(source.cache))
    if cache is not None and cache.is_relative_to(realpath(out)):
        raise DataError(f"cache must be a folder outside of out, which is this training's alone, not {source.cache}")


def check_types(source: Any, recipe: Any, model: Any) -> None:
    kinds = {"source": DataSource, "recipe": Recipe, "model": CrystalformerConfig}
    for (name, kind), value in zip(kinds.items(), (source, recipe, model), strict=True):
        if not isinstance(value, kind) and (value is not None or name == "source"):
            raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")


def _train(
    out: Path,
    names: tuple[str, ...],
    units: tuple[str, ...],
    source: DataSource,
    recipe: Recipe,
    config: CrystalformerConfig,
    seed: int,
    resume: bool,
    machine: dict[str, Any],
) -> Predictor:
    loaders, first = machine["loaders"], _rank() == 0
    try:
        config = dataclasses.replace(
            config,
            num_targets=len(names),
            target_names=names,
            target_units=units,
            target_mean=(),
            target_deviation=(),
            elements=(),
            largest_cell=0,
            atom_volumes=(),
        )
        checks.check_integer("seed", seed, 0, MOST_SEED)
        checks.check_workers("loaders", loaders)
        device = check_machine(machine["accelerator"], machine["devices"], machine["nodes"])
    except ValueError as error:
        raise DataError(str(error)) from error
    parts, problems = source.read(names, seed)
    settings = settings_of(names, units, source, recipe, config, seed, machine)
    if first:
        print(f"  {describe_backend(device)}", flush=True)
    torch.manual_seed(seed)
    network = Crystalformer(config)
    datasets = {}
    for name, samples in parts.items():
        try:
            with progress_bar(f"  images, {name}") as advance:
                crystals = build_crystals(
                    samples.structures,
                    network,
                    cache=source.cache,
                    workers=source.workers,
                    progress=advance,
                    symmetry_tol=source.symmetry_tol,
                )
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
        datasets[name] = CrystalDataset(crystals, samples.targets, network)
        if first and source.symmetry_tol:
            reduced = sum(x.num_atoms for x in crystals)
            print(f"  {name}: {datasets[name].num_atoms:,} atoms, of which symmetry makes {reduced:,} rows", flush=True)
    batches = {
        name: data.loader(recipe.batch_size, seed if name == "train" else None, recipe.max_images_per_batch, loaders)
        for name, data in datasets.items()
    }
    first_batch = datasets["train"][next(iter(batches["train"].sampler))]
    try:
        network.calibrate(first_batch.crystals)
    except ValueError as error:
        raise DataError(f"the first batch of train: {error}") from error
    try:
        mean, deviation = standardisation(datasets["train"].targets)
    except ValueError as error:
        raise DataError(f"train: {error}") from error
    chosen = {name: getattr(recipe, name) for name in ("lr", "betas", "weight_decay", "bias_decay", "decay_steps")}
    task = Regression(network, mean, deviation, names, **chosen)
    if first:
        if not resume:
            storage.write(out / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if problems:
            write_problems(out / PROBLEMS, problems)
            rows = count(len(problems), "row")
            print(f"{rows} cannot be used, what is wrong is in {out / PROBLEMS}", file=sys.stderr)
        if source.data is not None:
            write_split(out / SPLIT, {name: parts[name].ids if name in parts else () for name in SETS})
    identity = _identity(seed, recipe, config, datasets)
    progress = Progress(names[0], units[0] if units else "")
    history = fit(
        task,
        batches["train"],
        batches["val"],
        recipe.epochs,
        [AverageLastEpochs(recipe.averaged), progress] if recipe.averaged else [progress],
        seed=seed,
        gradient_norm=recipe.gradient_norm,
        checkpoints=out / CHECKPOINTS,
        identity=identity,
        accelerator=device,
        devices=machine["devices"],
        nodes=machine["nodes"],
    )
    predictor = Predictor(network, source.symmetry_tol)
    if first:
        network.save_pretrained(out / MODEL_FOLDER)
        metrics = report.write(out, predictor, parts, datasets, mean, history, settings, problems, device)
        part = "test" if "test" in parts else "val"
        for name, unit in zip(names, predictor.units, strict=True):
            mae, baseline = (short(metrics[key][part][name]) for key in ("mae", "baseline_mae"))
            print(f"  {part} MAE of {name} {f'{mae} {unit}'.rstrip()}, of predicting the mean {baseline}")
        for name in not_learnt(metrics):
            print(report.nothing_learnt(metrics, name), file=sys.stderr)
        print(f"  all of it: {out / report.CARD}")
    return predictor


def _rank() -> int:
    """This process's number, before lightning has started the others too."""
    return getattr(rank_zero_only, "rank", 0)


def settings_of(
    names: Sequence[str],
    units: Sequence[str],
    source: DataSource,
    recipe: Recipe,
    config: CrystalformerConfig,
    seed: int,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """What config.yaml says: the options of `crystalformer train`."""
    model = dataclasses.asdict(config)
    for name in FROM_TRAINING:
        del model[name]
    columns = {"target": list(names), "unit": list(units) or None}
    options = columns | dataclasses.asdict(source) | dataclasses.asdict(recipe) | {"seed": seed}
    return _plain(options | machine | {"model": model})


def _plain(value: Any) -> Any:
    """As YAML has it."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _identity(
    seed: int, recipe: Recipe, config: CrystalformerConfig, datasets: dict[str, CrystalDataset]
) -> dict[str, Any]:
    """What must be the same for a training to be resumed."""
    model = {f"model.{name}": value for name, value in dataclasses.asdict(config).items()}
    digests = {f"the data of {name}": _digest(datasets[name]) for name in ("train", "val")}
    return {"seed": seed, **dataclasses.asdict(recipe), **model, **digests}


def _digest(data: CrystalDataset) -> str:
    state = hashlib.sha256(data.targets.numpy().tobytes())
    for x in data.crystals:
        assert isinstance(x, CrystalBatch)
        for tensor in (x.species, x.positions, x.lattice):
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()[:16]


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], object]]:
    """A progress bar; yields what to call with the numbers done and in all. On a terminal only."""
    hidden = not sys.stderr.isatty() or _rank() > 0
    with tqdm(desc=text, unit=" crystals", disable=hidden, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
