"""The commands that predict: crystalformer predict and evaluate."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.process import cores
from ..common.words import count, short
from .metrics import AUC, cell, kind_of, known_values, read_metrics, scores
from .options import config_files, make_parser, parse
from .user_errors import Stop, say, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from .predictor import Predictor


def predict(arguments: list[str]) -> int:
    """Predicts the properties of crystals, as CSV: id, a column for each target, and what the training did not have.

    Files are read as a stream, and rows are written as they are predicted, so there may be any number of crystals. Rows
    that cannot be predicted are named on stderr and left out; the exit code is 1 then. Where files repeat an id, ids
    begin with the file's name. The last column, outside, says what no crystal of the training had.
    """
    parser = make_parser("predict", predict)
    parser.add_argument("model", type=Path, help="folder of a training or a model")
    parser.add_argument("files", nargs="+", type=str, help="CIF, POSCAR, extxyz, CSV, JSON, folders, ...")
    parser.add_argument("--out", type=str, default="-", help="CSV file to write; - is stdout")
    parser.add_argument("--resume", action="store_true", help="go on after the last row of --out")
    parser.add_argument(
        "--workers", type=int, default=max(0, cores() - 2), help="processes that read, where reading takes seconds"
    )
    _add_prediction_options(parser)
    options = parse(parser, arguments)
    _check_file(options.out, options.model, *options.files, *config_files(arguments))
    predictor = load_model(options.model, options.device, options.symmetry_tol)
    with user_errors():
        from .prediction_stream import predict_files

        bad, rows = predict_files(
            predictor, options.files, options.out, options.resume, options.id_column, options.workers
        )
    if bad == rows:
        raise Stop(f"no crystal can be predicted ({count(bad, 'row')} cannot be used)", 1)
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
    predictor = load_model(options.model, options.device, options.symmetry_tol)
    of_atoms = bool(predictor.model.config.element_energies)
    if options.forces and not of_atoms:
        raise Stop(f"forces must not be given for {options.model}, which was trained without them")
    if options.stress and not options.forces:
        raise Stop("forces must be given with stress")
    with user_errors():
        model = predictor.single("of forces") if options.forces else predictor.model
    columns = options.target or list(predictor.names)
    if len(columns) != len(predictor.names):
        number = count(len(predictor.names), "column")
        raise Stop(f"target must name {number}, as the model has, not {', '.join(columns)}")
    with user_errors():
        import torch

        from ..data.readers import read_samples
        from ..data.samples import usable
        from ..data.splits import read_split

        classes, wanted = predictor.model.config.probabilities, {"forces": options.forces, "stress": options.stress}
        samples, problems = read_samples(options.data, columns, id_column=options.id_column, classes=classes, **wanted)
        if of_atoms:
            from ..data.forces import per_atom

            samples = per_atom(samples)
        if options.split is not None:
            samples = samples.select(usable(read_split(options.split)[options.set or "test"], samples, problems))
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
    print(f"{'target':24}" + "".join(f" {x:>11}" for x in words) + "    (the mean: of the training set)", file=stream)
    for name, label in zip(predictor.names, predictor.labels, strict=True):
        numbers = [*(cell(x[score.key], name) for x in (found, of_means) for score in kind), f"{known[name]:,}"]
        print(f"{label:24}" + "".join(f" {x:>11}" for x in numbers), file=stream)
    if options.forces:
        with user_errors():
            from .force_report import LABELS, evaluate_forces

            for quantity, (true, errors) in evaluate_forces(model, samples).items():
                both = (errors, true)  # the mean of forces is 0
                numbers = [short(float(score.of(x, torch.zeros_like(x)))) for x in both for score in kind]
                numbers.append(f"{len(true):,}")
                print(f"{LABELS[quantity]:24}" + "".join(f" {x:>11}" for x in numbers), file=stream)
    for name in predictor.names:
        if classes and known[name] and name not in found[AUC.key]:
            say(f"there is one class only of {name}: it has no AUC")
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
        type=float | None,
        default=None,
        help="Å, atoms equivalent within it are one row; 0: none are, the default but for models with reciprocal heads",
    )


def load_model(path: Path, device: str, symmetry_tol: float | None = None) -> "Predictor":
    with user_errors():
        from .predictor import load

        return load(path, device, symmetry_tol=symmetry_tol)


def _predictions(predictor: "Predictor", ids: Sequence[str], structures: Sequence[Any]) -> "Tensor":
    """(C,T). On stderr: the backend, which of them are guesses, and what cannot be predicted."""
    from ..common.backends import describe_backend
    from ..model.structures import read_structure
    from .outside import Guesses
    from .predictor import not_finite

    weight = next(predictor.model.parameters())
    say(describe_backend(weight.device, weight.dtype))
    with user_errors():
        crystals = [read_structure(x, id) for id, x in zip(ids, structures, strict=True)]  # once for what follows
        guesses = Guesses(predictor.seen)
        guesses.add(ids, predictor.outside(crystals))
        for line in guesses.lines():
            say(line)
        with _bar("predicting", len(structures)) as advance:
            predictions = predictor.predict(crystals, advance)
    for id in not_finite(ids, predictions):
        say(f"{id}: the prediction is not finite")
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
