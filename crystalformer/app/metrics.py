"""metrics.json in the folder of a training: the errors of its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common import storage

METRICS = "metrics.json"
# What is read again of it; {...} are dictionaries from names to such values.
NUMBER = (int, float)
SHAPES = {
    "mae": {"set": {"target": NUMBER}},
    "baseline_mae": {"set": {"target": NUMBER}},
    "baseline": {"target": NUMBER},
    "crystals": {"set": int},
    "epochs": int,
    "versions": {"library": str},
}


def maes(names: Sequence[str], predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """The mean absolute error of each target, of predictions (C,T) or one for all (T)."""
    return dict(zip(names, (predictions - targets).abs().mean(0).tolist(), strict=True))


def guess(metrics: Mapping[str, Any], name: str) -> str:
    """What the baseline of an error predicts: the mean of a target, or 0 for what a training with forces adds."""
    return "0" if name in ("forces", "stress") and name not in metrics.get("baseline", {}) else "the mean"


def not_learnt(metrics: Mapping[str, Any]) -> list[str]:
    """The targets whose validation error is no smaller than that of their baseline."""
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
    for part, errors in found.get("mae", {}).items():
        if errors.keys() - found.get("baseline_mae", {}).get(part, {}).keys():
            raise ValueError(f"{path}: baseline_mae must have the targets of mae, {', '.join(errors)}, for {part}")
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
