"""A training from files to a folder that holds all of it: settings, model, errors, predictions, plots, a model card."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from os.path import realpath
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common import checks, storage
from ..common.backends import describe_backend
from ..common.words import count
from ..data import CrystalBatch
from ..data.crystals import build_crystals
from ..data.dataset import CrystalDataset
from ..data.forces import ForceDataset
from ..data.samples import DataError, write_problems
from ..data.splits import SETS, write_split
from ..model.config import FROM_TRAINING, CrystalformerConfig
from ..model.model import Crystalformer
from ..training import ForceRegression, Progress, Recipe, Regression, embed_properties, fit, standardisation
from ..training.callbacks import weight_callbacks
from ..training.checkpoints import latest
from ..training.forces import UNIT
from ..training.machine import check_machine
from . import report
from .data_source import MOST_SEED, DataSource, process_rank, progress_bar
from .fine_tuning import Start, keeps_last_layer, take_weights
from .force_report import UNITS
from .metrics import known_values, notes
from .predictor import MODEL_FOLDER, Predictor
from .run_folder import CHECKPOINTS, CONFIG, HISTORY, PROBLEMS, SPLIT, TENSORBOARD, has_checkpoint, run_folder

# What a training runs on, and what it shows; its numbers do not depend on it.
MACHINE = ("accelerator", "devices", "nodes", "loaders", "tensorboard")


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
    out = Path(out)
    names, units = check_arguments(target, unit, source, recipe, model, start)
    if tensorboard and find_spec("tensorboard") is None:
        raise DataError("tensorboard must be installed to write its files: pip install 'crystalformer[tensorboard]'")
    machine = {"accelerator": accelerator, "devices": devices, "nodes": nodes, "loaders": loaders}
    machine["tensorboard"] = tensorboard
    check_cache(source, out, resume)
    if resume and (out / "member-0").is_dir():
        raise DataError(f"out must be the folder of a single training, not {out}, which is one of an ensemble")
    with run_folder(out, resume) if process_rank() == 0 else nullcontext():
        recipe = Recipe() if recipe is None else recipe
        return _train(out, names, units, source, recipe, model, start, seed, resume, machine)


def check_cache(source: DataSource, out: Path, resume: bool) -> None:
    cache = None if resume or source.cache is None else Path(realpath(source.cache))
    if cache is not None and cache.is_relative_to(realpath(out)):
        raise DataError(f"cache must be a folder outside of out, which is this training's alone, not {source.cache}")


def check_arguments(
    target: str | Sequence[str],
    unit: str | Sequence[str],
    source: DataSource,
    recipe: Recipe | None,
    model: CrystalformerConfig | None,
    start: Start | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checks what every training is told; the names of the targets and their units, none if they are not known."""
    kinds = {"source": DataSource, "recipe": Recipe, "model": CrystalformerConfig, "start": Start}
    for (name, kind), value in zip(kinds.items(), (source, recipe, model, start), strict=True):
        if not isinstance(value, kind) and (value is not None or name == "source"):
            raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    names, units = ((x,) if isinstance(x, str) else tuple(x) for x in (target, unit))
    if not names:
        raise DataError("target must name at least one column")
    _check_forces(names, units, source, recipe or Recipe())
    units = (UNIT,) if source.forces else units
    if units and len(units) != len(names):
        raise DataError(f"unit must be one for each target, {', '.join(names)}, not {', '.join(units)}")
    return names, units


def _check_forces(names: tuple[str, ...], units: tuple[str, ...], source: DataSource, recipe: Recipe) -> None:
    """Refuses what makes no sense with forces, or without them."""
    for name, there in (("energy", source.forces), ("forces", source.forces), ("stress", source.stress)):
        weight = getattr(recipe, f"{name}_weight")
        if not there and weight != getattr(Recipe, f"{name}_weight"):
            needed = "stress" if name == "stress" else "forces"
            raise DataError(f"{needed} must be given with {name}_weight={weight:g}, which weighs what is learnt of it")
    if not source.forces:
        return
    if len(names) > 1 or names[0] in UNITS:
        raise DataError(f"target must be the energy alone with forces, not {', '.join(names)}")
    if units and units != (UNIT,):
        raise DataError(f"unit must be {UNIT} with forces, not {', '.join(units)}")
    if recipe.loss == "bce":
        raise DataError("loss must be of numbers with forces, not bce, which is of classes")


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
    loaders, first = machine["loaders"], process_rank() == 0
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
    if trained and "readout" in began["freeze"] and not keeps_last_layer(trained.config, config, source.forces):
        raise DataError("freeze must not name readout, whose last layer is new, for other targets than the model's")
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
            known = None if trained is None else trained.config
            task: Regression = ForceRegression(network, data, names, known=known, **weights, **chosen)
        except ValueError as error:
            raise DataError(str(error)) from error
    else:
        scale = (torch.zeros_like(mean), torch.ones_like(mean)) if config.probabilities else (mean, deviation)
        task = Regression(network, *scale, names, **chosen)
    if trained is not None:
        take_weights(network, trained, task.mean, task.deviation, source.forces)
    elif start is None:
        if recipe.embedding == "properties":
            embed_properties(network)
        first_batch = datasets["train"][next(iter(batches["train"].sampler))]
        try:
            network.calibrate(first_batch.crystals)
        except ValueError as error:
            raise DataError(f"the first batch of train: {error}") from error
    for part in start.freeze if start else ():
        network.get_submodule(part).requires_grad_(False)
    if first:
        if not (resume and has_checkpoint(out)):
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
