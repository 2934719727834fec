"""The command line: crystalformer train, crossval, predict, evaluate, info, convert, doctor.

Whatever is wrong with the arguments or the data ends in one line on stderr and exit code 2, Ctrl-C in one and 130,
SIGTERM in one and 143.
"""

import argparse
import dataclasses
import itertools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.elements import SYMBOLS
from ..common.process import (
    INTERRUPTED,
    PROG,
    TERMINATED,
    Terminated,
    finish_output,
    ignore_signals,
    interruptible,
    leave,
    prepare_streams,
)
from ..common.version import version
from ..common.words import count, one_line, short, some
from ..geometry.orbits import SYMMETRY_TOL
from .metrics import AUC, cell, guess, keys, kind_in, kind_of, known_values, not_learnt, read_metrics, scores
from .options import config_files, make_parser, parse
from .training_commands import crossval, train
from .user_errors import Stop, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from .predictor import Predictor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 1 where a part of the work could not be done, 2 for wrong input, 130 for Ctrl-C, 143 for
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    with interruptible(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(message)
        try:
            try:
                return _command(arguments)
            finally:
                finish_output()
        except BrokenPipeError:  # the reader of stdout has gone, as in `crystalformer predict ... | head`
            return 1
        except KeyboardInterrupt:
            stop = Stop("stopped", INTERRUPTED)
        except Terminated:
            stop = Stop("stopped", TERMINATED)
        except OSError as error:
            if error.filename is not None:  # a file's, which is never stdout
                raise
            stop = Stop(f"stdout: {error}", 1)
        except Stop as error:
            stop = error
        _say(stop)
        return stop.code


def program() -> int:
    """`main`, with a Python that ends behind it: a signal that comes then does not change the exit code."""
    try:
        return main()
    except (KeyboardInterrupt, Terminated) as error:  # between two lines of main
        leave(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        raise
    finally:
        ignore_signals()


def _say(message: object) -> None:
    print(f"{PROG}: {one_line(message)}", file=sys.stderr)


def _command(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"{PROG} {version}")
    elif name not in COMMANDS:
        raise Stop(f"the command must be one of {', '.join(COMMANDS)}, not {name!r}: see {PROG} --help")
    else:
        return COMMANDS[name](arguments[1:])
    return 0


def _overview() -> str:
    lines = [f"usage: {PROG} COMMAND ...", "", "Learns and predicts properties of crystals.", ""]
    lines += [f"  {name:10}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    lines += ["", f"{PROG} COMMAND --help explains a command; {PROG} --version."]
    return "\n".join(lines)


def predict(arguments: list[str]) -> int:
    """Predicts the properties of crystals, as CSV: id, then a column for each target.

    Rows that cannot be predicted are named on stderr and left out; the exit code is 1 then. Where files repeat an id,
    ids begin with the file's name.
    """
    parser = make_parser("predict", predict)
    parser.add_argument("model", type=Path, help="folder of a training or a model")
    parser.add_argument("files", nargs="+", type=str, help="CIF, POSCAR, extxyz, CSV, JSON, folders, ...")
    parser.add_argument("--out", type=str, default="-", help="CSV file to write; - is stdout")
    _add_prediction_options(parser)
    options = parse(parser, arguments)
    _check_file(options.out, options.model, *options.files, *config_files(arguments))
    predictor = _load(options.model, options.device, options.symmetry_tol)
    ids: list[tuple[str, str]] = []
    structures: list[Any] = []
    bad = 0
    for path in options.files:
        with user_errors():
            from ..data.readers import read_samples

            samples, problems = read_samples(path, id_column=options.id_column)
        for problem in problems:
            _say(problem)
        bad += len(problems)
        ids += [(str(path), id) for id in samples.ids]
        structures += samples.structures
    names = [id for _, id in ids]
    if len(set(names)) < len(names):
        names = [f"{path}:{id}" for path, id in ids]
    if not structures:
        raise Stop(f"no crystal can be predicted ({count(bad, 'row')} cannot be used)", 1)
    predictions = _predictions(predictor, names, structures)
    good = predictions.isfinite().all(1)
    _write(options.out, list(itertools.compress(names, good.tolist())), predictor.names, predictions[good])
    rows, bad = bad + len(structures), bad + int((~good).sum())
    if bad:
        raise Stop(f"{bad} of {count(rows, 'row')} could not be predicted", 1)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Prints the errors of a model on crystals whose properties are known."""
    parser = make_parser("evaluate", evaluate)
    parser.add_argument("model", type=Path, help="folder of a training or a model")
    parser.add_argument("--data", type=Path, required=True, help="file or folder with crystals and targets")
    parser.add_argument("--target", nargs="+", type=str, default=None, help="columns; else named as in the training")
    parser.add_argument("--forces", action="store_true", help="of the forces, too, of a model of energies")
    parser.add_argument("--stress", action="store_true", help="and of the stress")
    parser.add_argument("--split", type=Path | None, default=None, help="JSON file: evaluate only its set --set")
    parser.add_argument("--set", choices=["train", "val", "test"], default=None, help="of --split, else test")
    parser.add_argument("--out", type=str | None, default=None, help="CSV file for the predictions; - is stdout")
    _add_prediction_options(parser)
    options = parse(parser, arguments)
    if options.set and options.split is None:
        raise Stop(f"split must be given with set: which crystals of {options.data} are {options.set}?")
    _check_file(options.out, options.model, options.data, options.split, *config_files(arguments))
    predictor = _load(options.model, options.device, options.symmetry_tol)
    of_atoms = bool(predictor.model.config.element_energies)
    if options.forces and not of_atoms:
        raise Stop(f"forces must not be given for {options.model}, which was trained without them")
    columns = options.target or list(predictor.names)
    if len(columns) != len(predictor.names):
        number = count(len(predictor.names), "column")
        raise Stop(f"target must name {number}, as the model has, not {', '.join(columns)}")
    with user_errors():
        import torch

        from ..data.readers import read_samples
        from ..data.splits import read_split

        classes, wanted = predictor.model.config.probabilities, {"forces": options.forces, "stress": options.stress}
        samples, problems = read_samples(options.data, columns, id_column=options.id_column, classes=classes, **wanted)
        if of_atoms:
            from ..data.forces import per_atom

            samples = per_atom(samples)
        if options.split is not None:
            bad = {problem.id for problem in problems}
            samples = samples.select([x for x in read_split(options.split)[options.set or "test"] if x not in bad])
        if not len(samples):
            raise Stop(f"{options.data}: no crystal can be used" + (f": {problems[0]}" if problems else ""))
        baseline = read_metrics(options.model).get("baseline", {})
    predictions = _predictions(predictor, samples.ids, samples.structures)
    good = predictions.isfinite().all(1)
    if not good.any():
        raise Stop("none of the predictions is finite", 1)
    ids, predictions, targets = itertools.compress(samples.ids, good.tolist()), predictions[good], samples.targets[good]
    if options.out is not None:
        _write(options.out, list(ids), predictor.names, predictions)
    left_out = len(problems) + int((~good).sum())
    print(f"{count(len(predictions), 'crystal')}, {count(left_out, 'row')} left out", file=sys.stderr)
    stream = sys.stderr if options.out == "-" else sys.stdout  # stdout is a table or a CSV, not both
    kind, known = kind_of(classes), known_values(predictor.names, targets)
    found = scores(kind, predictor.names, predictions, targets)
    means = torch.tensor([baseline.get(name, torch.nan) for name in predictor.names], dtype=torch.float64)
    of_means = scores(kind, predictor.names, means, targets)
    words = [*(score.word for score in kind), *(f"mean's {score.word}" for score in kind), "values"]
    print(f"{'target':24}" + "".join(f"{x:>12}" for x in words) + "    (the mean: of the training set)", file=stream)
    for name, label in zip(predictor.names, predictor.labels, strict=True):
        numbers = [*(cell(x[score.key], name) for x in (found, of_means) for score in kind), f"{known[name]:,}"]
        print(f"{label:24}" + "".join(f"{x:>12}" for x in numbers), file=stream)
    if options.forces:
        with user_errors():
            from .force_report import LABELS, evaluate_forces

            for quantity, (true, errors) in evaluate_forces(predictor.model, samples).items():
                both = (errors, true)  # the mean of forces is 0
                numbers = [short(float(score.of(x, torch.zeros_like(x)))) for x in both for score in kind]
                numbers.append(f"{len(true):,}")
                print(f"{LABELS[quantity]:24}" + "".join(f"{x:>12}" for x in numbers), file=stream)
    for name in predictor.names:
        if classes and known[name] and name not in found[AUC.key]:
            _say(f"there is one class only of {name}: it has no AUC")
    if problems:
        raise Stop(f"{count(len(problems), 'row')} could not be used, the first: {problems[0]}", 1)
    return 1 if left_out else 0


def _add_prediction_options(parser: Any) -> None:
    """Those of `predict` and `evaluate`."""
    add = parser.add_argument
    add("--id_column", type=str | None, default=None, help="column of a table with the ids")
    add("--device", type=str, default="auto", help="as torch names it; auto is a GPU if there is one")
    add(
        "--symmetry_tol",
        type=float,
        default=SYMMETRY_TOL,
        help="Å, atoms equivalent within it are one row; 0: none are",
    )


def info(arguments: list[str]) -> int:
    """Prints what a model is: targets, size, settings, errors."""
    parser = make_parser("info", info)
    parser.add_argument("model", type=Path, help="folder of a training or a model")
    options = parse(parser, arguments)
    predictor = _load(options.model, "cpu")
    lines = {
        "targets": ", ".join(predictor.labels),
        "parameters": f"{sum(x.numel() for x in predictor.model.parameters()):,}",
    }
    with user_errors():
        metrics = read_metrics(options.model)
    for score in kind_in(metrics):
        mine, of_mean = keys([score])
        for part, values in metrics.get(mine, {}).items():
            for name, value in values.items():
                said = f"{short(value)}, of predicting {guess(metrics, name)} {short(metrics[of_mean][part][name])}"
                lines[f"{part} {score.word}, {name}"] = said
    if nothing := not_learnt(metrics):
        lines["nothing learnt of"] = ", ".join(nothing)
    for key in ("crystals", "epochs", "versions"):
        if key in metrics:
            value = metrics[key]
            lines[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    if elements := predictor.model.config.elements:
        lines["elements"] = ", ".join(SYMBOLS[z - 1] for z in elements)
    settings = dataclasses.asdict(predictor.model.config).items()
    lines |= {name: str(x) for name, x in settings if name not in ("target_names", "target_units", "elements")}
    for name, line in lines.items():
        print(f"{name:24}{line}")
    return 0


def convert(arguments: list[str]) -> int:
    """Makes a model of a checkpoint of the paper's code."""
    parser = make_parser("convert", convert)
    parser.add_argument("checkpoint", type=Path, help="file of the paper's code, .ckpt or .pt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, new or empty")
    parser.add_argument(
        "--params",
        type=str | None,
        default=None,
        help="its JSON of parameters, or a file of it, for a bare state dict",
    )
    parser.add_argument("--weights", choices=["auto", "swa", "model"], default="auto", help="swa is the weight average")
    options = parse(parser, arguments)
    with user_errors():
        from ..model.convert import load_official

        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise Stop(f"out must be a new or an empty folder, not {options.out}")
        model = load_official(options.checkpoint, options.params, options.weights)
        model.save_pretrained(options.out)
    print(f"{options.out}: {sum(x.numel() for x in model.parameters()):,} parameters")
    return 0


def doctor(arguments: list[str]) -> int:
    """Shows backends and versions, what is missing and how to get it."""
    parser = argparse.ArgumentParser(prog=f"{PROG} doctor", description=doctor.__doc__)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise Stop(f"unrecognized arguments: {' '.join(unknown)}: see {parser.prog} --help")
    import platform

    import torch

    from ..common.backends import available_backends, describe_backend

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"crystalformer {version}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, {count(torch.get_num_threads(), 'thread')}, GPU: {', '.join(gpus) or 'none'}")
    for device in ("cpu", "cuda") if gpus else ("cpu",):
        print(describe_backend(torch.device(device)))
    print()
    print("Backends of the attention")
    for name, state in available_backends().items():
        print(f"  {name:12}{'ready' if state is True else state}")
    for extra, (purpose, packages) in EXTRAS.items():
        print(f"\nExtra [{extra}]: {purpose}")
        missing = []
        for package in packages:
            try:
                print(f"  {package:14}{metadata.version(package)}")
            except metadata.PackageNotFoundError:
                print(f"  {package:14}missing")
                missing.append(package)
        if missing:
            print(f"  pip install 'crystalformer[{extra}]' or pip install {' '.join(missing)}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "crossval": crossval,
    "predict": predict,
    "evaluate": evaluate,
    "info": info,
    "convert": convert,
    "doctor": doctor,
}
EXTRAS = {
    "data": ("reading structures", ("pymatgen", "ase", "spglib")),
    "train": (
        "training, saved models, this command line",
        ("lightning", "jsonargparse", "pyyaml", "tqdm", "safetensors", "matplotlib", "torchmetrics"),
    ),
    "tensorboard": ("train --tensorboard", ("tensorboard",)),
}


# Models, files, bars


def _load(path: Path, device: str, symmetry_tol: float = SYMMETRY_TOL) -> "Predictor":
    with user_errors():
        from .predictor import load

        return load(path, device, symmetry_tol=symmetry_tol)


def _predictions(predictor: "Predictor", ids: Sequence[str], structures: Sequence[Any]) -> "Tensor":
    """(C,T). On stderr: the backend, elements that the model does not know, and what cannot be predicted."""
    from ..common.backends import describe_backend
    from ..model.structures import read_structure
    from .predictor import not_finite

    weight = next(predictor.model.parameters())
    _say(describe_backend(weight.device, weight.dtype))
    with user_errors():
        crystals = [read_structure(x, id) for id, x in zip(ids, structures, strict=True)]  # once for what follows
        unseen: dict[int, list[str]] = {}
        for id, elements in zip(ids, predictor.unseen_elements(crystals), strict=True):
            for z in elements:
                unseen.setdefault(z, []).append(id)
        for z, where in sorted(unseen.items()):
            _say(f"no crystal of the training had {SYMBOLS[z - 1]}, predictions are guesses for {some(where)}")
        with _bar("predicting", len(structures)) as advance:
            predictions = predictor.predict(crystals, advance)
    for id in not_finite(ids, predictions):
        _say(f"{id}: the prediction is not finite")
    return predictions


def _check_file(out: str | None, *read: str | Path | None) -> None:
    """Before the work that fills the file: it must not be one of those that the work reads, by any name."""
    if out == "-" and sys.stdout is None:
        raise Stop("out must be a file: stdout is closed")
    if out is None or out == "-":
        return
    try:
        possible = not Path(out).is_dir() and Path(out).parent.is_dir()
    except OSError as error:  # no name that a file can have, or a folder that others keep closed
        raise Stop(f"out must be a file that can be written, not {out}: {error.strerror}") from error
    if not possible:
        raise Stop(f"out must be a file in a folder that is there, not {out}")
    with user_errors():
        from ..common.storage import holds

        for path in read:
            if path is not None and holds(Path(path), Path(out)):
                raise Stop(
                    f"out must be a file of its own, but {out} is there already, and part of {path}, which is read"
                )


def _write(out: str, ids: Sequence[str], names: Sequence[str], predictions: "Tensor") -> None:
    """CSV: id, then a column for each target."""
    from ..common.storage import csv_text, write

    text = csv_text([["id", *names], *([id, *row] for id, row in zip(ids, predictions.tolist(), strict=True))])
    if out == "-":
        sys.stdout.write(text)
    else:
        with user_errors():
            write(out, text)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=text, unit=" crystals", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update
