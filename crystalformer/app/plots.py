"""Plots of a training, as PNG files. Needs the extra [train]."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from ..common import storage
from ..common.words import count, short

BLUE, ORANGE, GREY = "#2563a8", "#d9772b", "#8a8f98"


def parity(path: str | Path, targets: Any, predictions: Any, label: str, counted: str = "crystal") -> None:
    """Predictions (C,) over targets (C,) of what is counted; the label names quantity and unit."""
    x, y = np.asarray(targets), np.asarray(predictions)
    figure, axes = _axes((4.6, 4.6))
    ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
    ends += np.array([-0.04, 0.04]) * (np.ptp(ends) or 1.0)
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=1)
    axes.scatter(x, y, s=22, color=BLUE, alpha=0.7, linewidths=0, zorder=2)
    label = _plain(label)
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel=f"true {label}", ylabel=f"predicted {label}")
    note = f"{count(len(x), counted)}\nmean absolute error {short(abs(y - x).mean())}"
    axes.text(0.04, 0.96, note, transform=axes.transAxes, verticalalignment="top")
    _save(figure, path)


def residuals(path: str | Path, targets: Any, predictions: Any, label: str) -> None:
    """Errors, predictions minus targets (C,), over the targets (C,); the label names quantity and unit."""
    x = np.asarray(targets)
    errors = np.asarray(predictions) - x
    figure, axes = _axes((5.6, 3.8))
    axes.axhline(0, color=GREY, linewidth=1, zorder=1)
    axes.scatter(x, errors, s=22, color=BLUE, alpha=0.7, linewidths=0, zorder=2)
    axes.set(xlabel=f"true {_plain(label)}", ylabel=f"error of {_plain(label)}")
    note = f"mean {short(errors.mean())}, standard deviation {short(errors.std())}"
    axes.set_title(note, fontsize="medium")
    _save(figure, path)


def roc(path: str | Path, classes: Tensor, probabilities: Tensor, label: str) -> None:
    """The ROC curve of probabilities (C,) of class 1, where both of the classes 0 and 1 (C,) are there."""
    classes = classes.int()
    false, true, _ = binary_roc(probabilities, classes)
    figure, axes = _axes((4.6, 4.6))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    axes.plot(false, true, color=BLUE, drawstyle="steps-post")
    axes.set(aspect="equal", xlabel="false positive rate", ylabel=f"true positive rate of {_plain(label)}")
    note = f"{count(len(classes), 'crystal')}, {int(classes.sum())} of class 1"
    axes.set_title(f"{note}, AUC {short(float(binary_auroc(probabilities, classes)))}", fontsize="medium")
    _save(figure, path)


def learning_curve(
    path: str | Path,
    rows: Sequence[Mapping[str, float]],
    name: str,
    label: str,
    baseline: float | None = None,
    guess: str = "the mean",
) -> None:
    """A score of training and validation crystals over the epochs.

    Args:
        rows: one an epoch, as `training.fit` returns them.
        name: of the score in the rows, as "mae/energy"; an error has a logarithmic axis.
        label: of the score's axis, with its unit.
        baseline: a score to compare with, that of predicting the guess.
    """
    figure, axes = _axes((5.6, 3.8))
    epochs = [row["epoch"] for row in rows]
    for stage, text, color in (("train", "training", GREY), ("val", "validation", BLUE)):
        values = [row[f"{stage}_{name}"] for row in rows]
        axes.plot(epochs, values, "o-", markersize=4, color=color, label=text)
    if baseline is not None:
        axes.axhline(baseline, color=ORANGE, linestyle="--", linewidth=1.2, label=f"predicting {guess}")
    axes.set(xlabel="epoch", ylabel=_plain(label))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if name.startswith("mae/"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda x, _: short(x))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", axis="y", color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    _save(figure, path)


def calibration(path: str | Path, expected: Any, observed: Mapping[str, Any]) -> None:
    """The shares of errors within the deviations of an ensemble, by a text for each curve, over those expected (P,)."""
    figure, axes = _axes((4.6, 4.6))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=1)
    for (text, shares), color in zip(observed.items(), (ORANGE, BLUE), strict=False):
        axes.plot(np.asarray(expected), np.asarray(shares), color=color, label=f"deviations {text}", zorder=2)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="expected share of errors within", ylabel="observed share")
    axes.legend(frameon=False)
    _save(figure, path)


def _plain(label: str) -> str:
    """With plain dollar signs, which begin no formula of matplotlib."""
    return label.replace("$", r"\$")


def _axes(size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(size, dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    storage.write(path, content.getvalue())
