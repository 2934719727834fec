"""metrics.json in the folder of a training: the scores of its model."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..common import storage
from ..common.words import short

METRICS = "metrics.json"


class Score(NamedTuple):
    """What predictions are worth.

    Attributes:
        key: its name in metrics.json; that of predicting the mean has `baseline_` before it.
        word, title: its names in tables and on plots.
        of: the score of predictions (C) with these true values (C).
    """

    key: str
    word: str
    title: str
    of: Callable[[Tensor, Tensor], Tensor]


MAE = Score("mae", "MAE", "mean absolute error", lambda predicted, true: (predicted - true).abs().mean())
RMSE = Score("rmse", "RMSE", "root mean square error", lambda predicted, true: (predicted - true).square().mean().sqrt())
# The first of them counts.
SCORES = (MAE, RMSE)
# What is read again of metrics.json; {...} are dictionaries from names to such values.
NUMBER = (int, float)
SHAPES = {
    **{f"{prefix}{score.key}": {"set": {"target": NUMBER}} for score in SCORES for prefix in ("", "baseline_")},
    "baseline": {"target": NUMBER},
    "values": {"set": {"target": int}},
    "crystals": {"set": int},
    "epochs": int,
    "versions": {"library": str},
}


def known_values(names: Sequence[str], targets: Tensor) -> dict[str, int]:
    """How many values of each target are known, of targets (C,T)."""
    return dict(zip(names, (~targets.isnan()).sum(0).tolist(), strict=True))


def scores(names: Sequence[str], predictions: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
    """Each score, by its key, of each target that is known of a crystal, of predictions (C,T) or one for all (T)."""
    found: dict[str, dict[str, float]] = {score.key: {} for score in SCORES}
    for name, predicted, true in zip(names, predictions.expand_as(targets).T, targets.T, strict=True):
        known = ~true.isnan()
        for score in SCORES:
            if known.any() and not isnan(value := float(score.of(predicted[known], true[known]))):
                found[score.key][name] = value
    return found


def cell(values: Mapping[str, float], name: str) -> str:
    """A target's score, as a table shows it."""
    return short(values[name]) if name in values else "-"


def not_learnt(metrics: Mapping[str, Any]) -> list[str]:
    """The targets whose validation error is no smaller than that of predicting the mean."""
    errors, means = metrics.get("mae", {}).get("val", {}), metrics.get("baseline_mae", {}).get("val", {})
    return [name for name, mae in errors.items() if not mae < means[name]]


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
    for key in (score.key for score in SCORES):
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
