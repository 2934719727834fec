"""A training from files to a folder that holds all of it: settings, model, errors, predictions, plots, a model card."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from os.path import realpath
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from ..common import checks, storage
from ..common.backends import describe_backend
from ..common.words import count
from ..data import CrystalBatch
from ..data.crystals import build_crystals
from ..data.dataset import CrystalDataset
from ..data.forces import ForceDataset, per_atom
from ..data.readers import read_samples
from ..data.samples import DataError, Problem, Samples, write_problems
from ..data.splits import SETS, read_split, split, write_split
from ..geometry.orbits import SYMMETRY_TOL
from ..model.config import FROM_TRAINING, CrystalformerConfig
from ..model.model import Crystalformer
from ..training import ForceRegression, Progress, Recipe, Regression, fit, standardisation
from ..training.callbacks import weight_callbacks
from ..training.checkpoints import latest
from ..training.forces import UNIT
from ..training.machine import check_machine
from . import report
from .fine_tuning import Start, take_weights
from .metrics import known_values, notes
from .predictor import MODEL_FOLDER, Predictor
from .run_folder import CHECKPOINTS, CONFIG, HISTORY, PROBLEMS, SPLIT, TENSORBOARD, run_folder

MOST_SEED = 2**64 - 1  # of torch


# What a training runs on, and what it shows; its numbers do not depend on it.
MACHINE = ("accelerator", "devices", "nodes", "loaders", "tensorboard")


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
        split_seed: of the random split; that of the training if None.
        id_column: name of the column with the ids; found by itself where it has a usual name.
        forces: learn the forces, too, eV/Å, from extxyz, an ase database or a column `forces` of JSON. The target is
            then the energy of the cell, eV; what is learnt and predicted is that of an atom. Every atom has its row.
        stress: with forces, learn the stress, too, eV/Å³, positive where the cell would shrink, as in ase.
        primitive: learn from primitive cells. The model's predictions do not depend on the cell; small ones are faster.
        strict: stop at the first crystal that cannot be read; else they are listed in problems.csv and left out.
        cache: folder that keeps parsed structures and image lists for other trainings.
        symmetry_tol: learn from one row for each orbit of atoms that the symmetry makes equivalent within this, Å: the
            same model from fewer rows. 0, and forces, give every atom its row.
        workers: processes that parse structures, which pays from some ten thousand on, and threads that build the image
            lists; 0 parses in this process and builds with torch's threads.
    """

    data: Path | None = None  # strings too, as for the other paths
    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    split: Path | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    split_seed: int | None = None
    id_column: str | None = None
    forces: bool = False
    stress: bool = False
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
        if self.split_seed is not None:
            checks.check_integer("split_seed", self.split_seed, 0, MOST_SEED)
        if self.stress and not self.forces:
            raise DataError("forces must be given with stress")
        if self.forces and self.primitive:
            raise DataError("primitive must not be given with forces, which are those of the cell's own atoms")
        if self.forces:  # orbits of equivalent atoms have no gradients
            object.__setattr__(self, "symmetry_tol", 0.0)
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            raise DataError(f"cache must be a folder, not the file {self.cache}")

    def read_file(self, path: Path, targets: Sequence[str], classes: bool = False) -> tuple[Samples, list[Problem]]:
        """The crystals of a file, and the rows that cannot be used; see `read_samples`.

        Raises:
            DataError: if there are no crystals.
        """
        with progress_bar(f"  reading {path.name}") as advance:
            read, bad = read_samples(
                path,
                targets,
                id_column=self.id_column,
                forces=self.forces,
                stress=self.stress,
                primitive=self.primitive,
                strict=self.strict,
                workers=self.workers,
                cache=self.cache,
                progress=advance,
                classes=classes,
            )
        if not len(read):
            raise DataError(f"{path}: no crystal can be used" + (f": {bad[0]}" if bad else ""))
        return per_atom(read) if self.forces else read, bad

    def read(
        self, targets: Sequence[str], seed: int, classes: bool = False
    ) -> tuple[dict[str, Samples], list[Problem]]:
        """The crystals of train, val and test, and the rows that cannot be used.

        Raises:
            DataError: for data that cannot be used.
        """
        problems: list[Problem] = []

        def samples(path: Path) -> Samples:
            read, bad = self.read_file(path, targets, classes)
            problems.extend(bad)
            return read

        try:
            if self.data is None:
                given = {"train": self.train, "val": self.val, "test": self.test}
                return {name: samples(path) for name, path in given.items() if path is not None}, problems
            everything = samples(self.data)
            seed = seed if self.split_seed is None else self.split_seed
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
    start: Start | None = None,
    unit: str | Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    loaders: int = 0,
    tensorboard: bool = False,
) -> Predictor:
    """Trains a model and writes a folder with all that belongs to it; see docs/tutorial.md.

    Args:
        out: the folder, new or empty unless the training is resumed.
        target: name of the column to learn, or several.
        source: of the crystals.
        recipe: the paper's for Materials Project data if None.
        model: its sizes and physics, the paper's if None, or those of `start`; the targets are filled in.
        start: a trained model to start from; a resumed training has no need of it any more.
        unit: of the target, as "eV/atom", or one for each; for plots, tables and the model card.
        seed: of the split, the first weights, the order of the crystals and dropout.
        resume: go on with the training in `out`, after its last whole epoch. It may have more epochs than before.
        accelerator: "auto", "cpu" or "gpu".
        devices, nodes: as lightning's Trainer takes them. Under torchrun its processes are used.
        loaders: processes that join coming batches, for each that trains: where a GPU would wait for them. 0 for none.
        tensorboard: write event files into `out`. Needs the package tensorboard.

    Returns:
        The trained model.

    Raises:
        DataError: for data that cannot be used.
        FileExistsError: if `out` holds something already, and is not to be resumed, or while another training runs
            in it.
        CheckpointError: if the training cannot be resumed.
        TypeError: for a source, recipe, model or start that is none.
    """
    out, names = Path(out), (target,) if isinstance(target, str) else tuple(target)
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    check_types(source, recipe, model)
    if not isinstance(start, Start | None):
        raise TypeError(f"start must be a Start, not {type(start).__name__}")
    if not names:
        raise DataError("target must name at least one column")
    if source.forces:
        if len(names) > 1:
            raise DataError(f"target must be the energy alone with forces, not {', '.join(names)}")
        if units and units != (UNIT,):
            raise DataError(f"unit must be {UNIT} with forces, not {', '.join(units)}")
        units = (UNIT,)
    if units and len(units) != len(names):
        raise DataError(f"unit must be one for each target, {', '.join(names)}, not {', '.join(units)}")
    if tensorboard and find_spec("tensorboard") is None:
        raise DataError("tensorboard must be installed to write its files: pip install 'crystalformer[tensorboard]'")
    machine = {"accelerator": accelerator, "devices": devices, "nodes": nodes, "loaders": loaders}
    machine["tensorboard"] = tensorboard
    check_cache(source, out, resume)
    with run_folder(out, resume) if _rank() == 0 else nullcontext():
        recipe = Recipe() if recipe is None else recipe
        return _train(out, names, units, source, recipe, model, start, seed, resume, machine)


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
    model: CrystalformerConfig | None,
    start: Start | None,
    seed: int,
    resume: bool,
    machine: dict[str, Any],
) -> Predictor:
    loaders, first = machine["loaders"], _rank() == 0
    trained, began = None, {}
    if start is not None:
        model, trained, digest = start.begin(out, resume, model)
        began = {"from": str(start.folder), "from_sha256": digest, "freeze": list(start.freeze)}
    try:
        config = dataclasses.replace(
            CrystalformerConfig() if model is None else model,
            num_targets=len(names),
            target_names=names,
            target_units=units,
            target_mean=(),
            target_deviation=(),
            elements=(),
            probabilities=recipe.loss == "bce",
            element_energies=(),
            largest_cell=0,
            atom_volumes=(),
        )
        checks.check_integer("seed", seed, 0, MOST_SEED)
        checks.check_workers("loaders", loaders)
        device = check_machine(machine["accelerator"], machine["devices"], machine["nodes"])
    except ValueError as error:
        raise DataError(str(error)) from error
    parts, problems = source.read(names, seed, config.probabilities)
    if unknown := [name for name, number in known_values(names, parts["train"].targets).items() if not number]:
        raise DataError(f"train must hold a known value of each target, but none of {', '.join(unknown)}")
    settings = settings_of(names, units, source, recipe, config, seed, machine) | began
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
        datasets[name] = (
            ForceDataset(crystals, samples.targets, network, samples.forces, samples.stress)
            if source.forces
            else CrystalDataset(crystals, samples.targets, network)
        )
        if first and source.symmetry_tol:
            reduced = sum(x.num_atoms for x in crystals)
            print(f"  {name}: {datasets[name].num_atoms:,} atoms, of which symmetry makes {reduced:,} rows", flush=True)
    batches = {
        name: data.loader(recipe.batch_size, seed if name == "train" else None, recipe.max_images_per_batch, loaders)
        for name, data in datasets.items()
    }
    try:
        mean, deviation = standardisation(datasets["train"].targets)
    except ValueError as error:
        raise DataError(f"train: {error}") from error
    options = ("lr", "betas", "weight_decay", "bias_decay", "decay_steps", "loss", "schedule")
    chosen = {name: getattr(recipe, name) for name in options}
    if isinstance(data := datasets["train"], ForceDataset):
        weights = {name: getattr(recipe, name) for name in ("energy_weight", "forces_weight", "stress_weight")}
        try:
            task: Regression = ForceRegression(network, data, names, **weights, **chosen)
        except ValueError as error:
            raise DataError(str(error)) from error
    else:
        scale = (torch.zeros_like(mean), torch.ones_like(mean)) if config.probabilities else (mean, deviation)
        task = Regression(network, *scale, names, **chosen)
    if trained is not None:
        take_weights(network, trained, task.mean, task.deviation)
    elif start is None:
        first_batch = datasets["train"][next(iter(batches["train"].sampler))]
        try:
            network.calibrate(first_batch.crystals)
        except ValueError as error:
            raise DataError(f"the first batch of train: {error}") from error
    for part in start.freeze if start else ():
        network.get_submodule(part).requires_grad_(False)
    if first:
        if not resume:
            storage.write(out / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if problems:
            write_problems(out / PROBLEMS, problems)
            rows = count(len(problems), "row")
            print(f"{rows} cannot be used, what is wrong is in {out / PROBLEMS}", file=sys.stderr)
        if source.data is not None:
            write_split(out / SPLIT, {name: parts[name].ids if name in parts else () for name in SETS})
    identity = _identity(seed, recipe, config, datasets) | {x: began.get(x) for x in ("from_sha256", "freeze")}
    if first and resume:
        _lengthen(out, recipe.epochs, identity)
    progress = Progress(names[0], units[0] if units else "")
    history = fit(
        task,
        batches["train"],
        batches["val"],
        recipe.epochs,
        [*weight_callbacks(recipe), progress],
        seed=seed,
        gradient_norm=recipe.gradient_norm,
        checkpoints=out / CHECKPOINTS,
        identity=identity,
        accelerator=device,
        devices=machine["devices"],
        nodes=machine["nodes"],
        history_file=out / HISTORY,
        tensorboard=out / TENSORBOARD if machine["tensorboard"] else None,
    )
    predictor = Predictor(network, source.symmetry_tol)
    if first:
        if len(history) < recipe.epochs:
            why = f"the validation loss has not fallen in {count(recipe.patience, 'epoch')}"
            print(f"  stopped behind epoch {len(history)} of {recipe.epochs}: {why}")
        network.save_pretrained(out / MODEL_FOLDER)
        metrics = report.write(out, predictor, parts, datasets, mean, history, settings, problems, device)
        for line in report.last_lines(metrics, predictor):
            print(f"  {line}")
        for note in notes(metrics):
            print(note, file=sys.stderr)
        print(f"  all of it: {out / report.CARD}")
    return predictor


def _lengthen(out: Path, epochs: int, identity: dict[str, Any]) -> None:
    """Writes a larger number of epochs into config.yaml, if the training in a folder can have them."""
    settings = yaml.safe_load((out / CONFIG).read_text())
    if epochs > settings["epochs"]:
        latest(out / CHECKPOINTS, identity)
        settings["epochs"] = epochs
        storage.write(out / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


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
    if isinstance(data, ForceDataset):
        for tensor in (*data.forces, *data.stress):
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
