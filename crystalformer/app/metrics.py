"""metrics.json in the folder of a training: the scores of its model."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common import storage
from ..common.words import short

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.json"


class Score(NamedTuple):
    """What predictions are worth.

    Attributes:
        key: its name in metrics.json; that of predicting the mean has `baseline_` before it.
        word, title: its names in tables and on plots.
        of: the score of predictions (C) with these true values (C), NaN where it has none.
        rises: a larger one is better.
    """

    key: str
    word: str
    title: str
    of: "Callable[[Tensor, Tensor], Tensor]"
    rises: bool = False


def _auc(predicted: "Tensor", true: "Tensor") -> "Tensor":
    from ..training.losses import auc  # with torchmetrics, which this program begins without

    return auc(predicted, true)


MAE = Score("mae", "MAE", "mean absolute error", lambda predicted, true: (predicted - true).abs().mean())
RMSE = Score(
    "rmse", "RMSE", "root mean square error", lambda predicted, true: (predicted - true).square().mean().sqrt()
)
AUC = Score("auc", "AUC", "area under the ROC curve", _auc, rises=True)
ACCURACY = Score(
    "accuracy",
    "accuracy",
    "accuracy",
    lambda predicted, true: ((predicted > 0.5) == (true > 0.5)).double().mean(),
    True,
)
# Of numbers, and of probabilities of classes; the first of them counts.
REGRESSION, CLASSIFICATION = (MAE, RMSE), (AUC, ACCURACY)
PREFIXES = ("", "baseline_")
# What is read again of metrics.json; {...} are dictionaries from names to such values.
NUMBER = (int, float)
SHAPES = {
    **{f"{prefix}{x.key}": {"set": {"target": NUMBER}} for x in REGRESSION + CLASSIFICATION for prefix in PREFIXES},
    "baseline": {"target": NUMBER},
    "values": {"set": {"target": int}},
    "crystals": {"set": int},
    "epochs": int,
    "versions": {"library": str},
}


def kind_of(probabilities: bool) -> tuple[Score, ...]:
    """The scores of a model that predicts numbers, or probabilities."""
    return CLASSIFICATION if probabilities else REGRESSION


def kind_in(metrics: Mapping[str, Any]) -> tuple[Score, ...]:
    """The scores that metrics.json has."""
    return kind_of(AUC.key in metrics)


def keys(kind: Sequence[Score]) -> list[str]:
    """The scores in metrics.json: each before that of predicting the mean."""
    return [f"{prefix}{score.key}" for score in kind for prefix in PREFIXES]


def known_values(names: Sequence[str], targets: "Tensor") -> dict[str, int]:
    """How many values of each target are known, of targets (C,T)."""
    return dict(zip(names, (~targets.isnan()).sum(0).tolist(), strict=True))


def scores(
    kind: Sequence[Score], names: Sequence[str], predictions: "Tensor", targets: "Tensor"
) -> dict[str, dict[str, float]]:
    """Each score, by its key, of each target that has one, of predictions (C,T) or one for all (T)."""
    found: dict[str, dict[str, float]] = {score.key: {} for score in kind}
    for name, predicted, true in zip(names, predictions.expand_as(targets).T, targets.T, strict=True):
        known = ~true.isnan()
        for score in kind:
            if known.any() and not isnan(value := float(score.of(predicted[known], true[known]))):
                found[score.key][name] = value
    return found


def cell(values: Mapping[str, float], name: str) -> str:
    """A target's score, as a table shows it."""
    return short(values[name]) if name in values else "-"


def guess(metrics: Mapping[str, Any], name: str) -> str:
    """What the baseline of an error predicts: the mean of a target, or 0 for what a training with forces adds."""
    return "0" if name in ("forces", "stress") and name not in metrics.get("baseline", {}) else "the mean"


def not_learnt(metrics: Mapping[str, Any]) -> list[str]:
    """The targets whose validation score is no better than that of their baseline."""
    first = kind_in(metrics)[0]
    found, means = (metrics.get(key, {}).get("val", {}) for key in keys([first]))
    return [name for name, x in found.items() if not (x > means[name] if first.rises else x < means[name])]


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """What must be said of the scores: of targets that were not learnt, and of sets of one class."""
    first, said = kind_in(metrics)[0], []
    for name in not_learnt(metrics):
        found, mean = (short(metrics[key]["val"][name]) for key in keys([first]))
        what, worse = (first.word, "larger") if first.rises else ("error", "smaller")
        score = f"its validation {what}, {found}, is no {worse} than that of {guess(metrics, name)}, {mean}"
        said.append(f"Nothing was learnt of {name}: {score}.")
    for part, found in metrics.get(AUC.key, {}).items():
        one = [name for name, number in metrics["values"][part].items() if number and name not in found]
        said += [f"There is one class only of {name} in {part}: it has no AUC." for name in one]
    return said


def read_metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json in a folder says; empty where there is no such file.

    Raises:
        ValueError: for a file that is not JSON, or has other contents.
    """
    path = folder / METRICS
    try:
        found = storage.read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a dictionary, as a training writes it, not {type(found).__name__}")
    for name, shape in SHAPES.items():
        if name in found and not _has_shape(found[name], shape):
            raise ValueError(f"{path}: {name} must be {_described(shape)}, not {str(found[name])[:60]}")
    for key in (score.key for score in REGRESSION + CLASSIFICATION):
        for part, values in found.get(key, {}).items():
            if values.keys() - found.get(f"baseline_{key}", {}).get(part, {}).keys():
                named = ", ".join(values)
                raise ValueError(f"{path}: baseline_{key} must have the targets of {key}, {named}, for {part}")
    return found


def _has_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        (inner,) = shape.values()
        return isinstance(value, dict) and all(_has_shape(x, inner) for x in value.values())
    return isinstance(value, shape) and not isinstance(value, bool)


def _described(shape: Any) -> str:
    if isinstance(shape, dict):
        ((name, inner),) = shape.items()
        return f"{_described(inner)} for each {name}"
    return {NUMBER: "a number", int: "an integer", str: "a string"}[shape]
