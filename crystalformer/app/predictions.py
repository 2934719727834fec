"""predictions.csv in the folder of a training: what is known and what is predicted of crystals that did not train."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import torch
from torch import Tensor

from ..common import storage
from ..data.samples import DataError

PREDICTIONS = "predictions.csv"
# Of columns: what is added to the name of a target, for Predictions.true and so on.
KINDS = ("", "_predicted", "_deviation")


@dataclass(frozen=True)
class Predictions:
    """Of a set of crystals.

    Attributes:
        ids: (C).
        true, predicted: (C,T) fp64, NaN where a value is not known.
        deviation: (C,T), of an ensemble.
    """

    ids: tuple[str, ...]
    true: Tensor
    predicted: Tensor
    deviation: Tensor | None = None


def write_predictions(path: Path, names: Sequence[str], parts: Mapping[str, Predictions], column: str = "set") -> None:
    """CSV: id, the name of its part in `column`, then for each target its value, prediction and, if any, deviation.

    The cell of a value that is not known is empty.
    """
    table: list[list[object]] = []
    kinds: tuple[str, ...] = KINDS
    for part, x in parts.items():
        values = [x.true, x.predicted, *([] if x.deviation is None else [x.deviation])]
        kinds = KINDS[: len(values)]
        rows = torch.stack(values, 2).flatten(1).tolist()
        table += [[id, part, *("" if isnan(y) else y for y in row)] for id, row in zip(x.ids, rows, strict=True)]
    storage.write(path, storage.csv_text([["id", column, *_columns(names, kinds)], *table]))


def read_predictions(path: Path, names: Sequence[str]) -> dict[str, Predictions]:
    """What `write_predictions` has written of a training or an ensemble, by set.

    Raises:
        DataError: for a file that is not there, damaged, or of other targets.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *table = csv.reader(file)
        numbers = torch.tensor([[float(x or "nan") for x in row[2:]] for row in table], dtype=torch.float64)
        kinds = KINDS[: (len(header) - 2) // len(names)]
        whole = header[2:] == _columns(names, kinds) and tuple(numbers.shape) == (len(table), len(header) - 2)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not whole:
        raise DataError(f"{path}: must hold values and predictions of {', '.join(names)}")
    found = {}
    for part in dict.fromkeys(row[1] for row in table):
        here = torch.tensor([row[1] == part for row in table])
        ids = tuple(row[0] for row in table if row[1] == part)
        found[part] = Predictions(ids, *numbers[here].unflatten(1, (len(names), len(kinds))).unbind(2))
    return found


def _columns(names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    return [f"{name}{kind}" for name, kind in itertools.product(names, kinds)]
