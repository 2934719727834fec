"""The commands that train: crystalformer train and crossval."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_fields, argument_errors, make_parser, parse, read_yaml, with_underscores
from .user_errors import Stop, training_errors, user_errors

if TYPE_CHECKING:
    from jsonargparse import Namespace


def train(arguments: list[str]) -> int:
    """Trains a model and writes it, its errors, predictions and plots into a folder."""
    options, inputs = _read("train", train, arguments)
    if options.ensemble == 1 and options.jobs != 1:
        raise Stop(f"ensemble must be given with jobs={options.jobs}: a single training has one job")
    with training_errors(options.out):
        if options.ensemble == 1:
            from .train import train as run

            run(options.out, options.target, **inputs)
        else:
            from .ensemble import train_ensemble

            train_ensemble(options.out, options.target, **inputs, **{x: options[x] for x in ("ensemble", "jobs")})
    return 0


def crossval(arguments: list[str]) -> int:
    """Trains once for each fold of the data, tests on the fold, and writes the errors of all folds into a folder.

    It has the options of train but for those that say which crystals train and test.
    """
    with user_errors():
        from .crossval import SETS_OF_SOURCE
    options, inputs = _read("crossval", crossval, arguments, SETS_OF_SOURCE)
    with training_errors(options.out, "crossval"):
        from .crossval import crossval as run

        folds = {name: options[name] for name in ("folds", "val_fraction", "ensemble", "jobs")}
        run(options.out, options.target, **folds, **inputs)
    return 0


def _read(
    name: str, command: Callable[[list[str]], int], arguments: list[str], left_out: Sequence[str] = ()
) -> tuple["Namespace", dict[str, Any]]:
    """The options of a command, and what they say of source, recipe, model and machine.

    Args:
        left_out: options of the source that the command does not have.
    """
    with user_errors():
        from ..model.config import FROM_TRAINING, CrystalformerConfig
        from ..training import PRESET_MODELS, PRESETS, Recipe
        from .data_source import DataSource
        from .fine_tuning import Start, read_model
        from .run_folder import CONFIG, check_folder
        from .train import MACHINE
    parser = make_parser(name, command)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results, new or empty")
    add("--target", nargs="+", type=str, required=True, help="columns to learn")
    add("--unit", nargs="+", type=str, default=None, help="of each target, for plots, tables and card")
    add_fields(parser, DataSource, leave_out=left_out)
    if left_out:
        add(
            "--folds",
            type=int | str,
            required=True,
            help="number of random folds, or a file with the columns id and fold",
        )
        add("--val_fraction", type=float, default=0.1, help="share of each training's crystals that validate it")
    add("--ensemble", type=int, default=1, help="models that differ in their seed; their mean predicts")
    add("--jobs", type=int, default=1, help="trainings at once, in processes that share the threads")
    add("--preset", choices=list(PRESETS), default="mp", help="the paper's recipe for these data; or small")
    add_fields(parser, Recipe)
    add_fields(parser, CrystalformerConfig, "model.", leave_out=FROM_TRAINING)
    if not left_out:
        add("--from", type=Path | None, default=None, help="start from this trained model; its sizes are the new one's")
        add("--from_sha256", type=str | None, default=None, help="of its weights, where they must be certain ones")
        add("--freeze", nargs="+", type=str, default=[], help="its parts that do not learn: embedding, blocks, readout")
    add("--seed", type=int, default=0, help="of split, first weights, order and dropout")
    add("--resume", action="store_true", help="go on with what is in --out; needs no other option")
    add("--accelerator", type=str, default="auto", help="what computes: auto, cpu or gpu")
    if not left_out:
        add("--devices", type=int, default=1, help="processes on each machine; under torchrun as it says")
        add("--nodes", type=int, default=1, help="machines; under torchrun as it says")
    add("--loaders", type=int, default=0, help="processes that join coming batches; pays with a GPU")
    add("--tensorboard", action="store_true", help="write event files into --out/tensorboard")

    # Where defaults come from, before the options are read.
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--config", "--preset", "--out", "--from"):
        ahead.add_argument(option)
    ahead.add_argument("--resume", action="store_true")
    with argument_errors(parser):
        known, _ = ahead.parse_known_args(with_underscores(arguments))
    in_file = read_yaml(known.config) if known.config else {}
    preset, start = (getattr(known, name) or in_file.get(name) for name in ("preset", "from"))
    if preset in PRESETS:
        model = {f"model.{name}": value for name, value in PRESET_MODELS.get(preset, {}).items()}
        parser.set_defaults(_as_defaults(dataclasses.asdict(PRESETS[preset]) | model))
    if known.resume and known.out:
        with user_errors():
            check_folder(Path(known.out), resume=True)
        parser.default_config_files = [str(Path(known.out) / CONFIG)]
    elif start and not left_out:
        with user_errors():
            sizes = dataclasses.asdict(read_model(start).config)
        parser.set_defaults(_as_defaults({f"model.{x}": sizes[x] for x in sizes if x not in FROM_TRAINING}))

    options = parse(parser, arguments)
    with user_errors():
        fields = [field.name for field in dataclasses.fields(DataSource) if field.name not in left_out]
        inputs: dict[str, Any] = {"source": DataSource(**{name: options[name] for name in fields})}
        inputs["recipe"] = Recipe(**{field.name: options[field.name] for field in dataclasses.fields(Recipe)})
        inputs["model"] = CrystalformerConfig(**options.model.as_dict())
    if not left_out:
        folder, freeze, sha256 = (options[name] for name in ("from", "freeze", "from_sha256"))
        if folder is None and (freeze or sha256):
            raise Stop("from must be given with freeze and from_sha256: they are of the model to start from")
        with user_errors():
            inputs["start"] = None if folder is None else Start(folder, tuple(freeze), sha256)
    inputs |= {"unit": options.unit or (), **{x: options[x] for x in ("seed", "resume", *MACHINE) if x in options}}
    return options, inputs


def _as_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """With lists for tuples, which jsonargparse writes into."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
