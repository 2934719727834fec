"""Plots of a training, as PNG files. Needs the extra [train]."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

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


def learning_curve(
    path: str | Path, rows: Sequence[Mapping[str, float]], name: str, label: str, baseline: float | None = None
) -> None:
    """Training and validation error over the epochs.

    Args:
        rows: one an epoch, as `training.fit` returns them.
        name: of the target.
        label: of the error's axis, with its unit.
        baseline: an error to compare with, that of predicting the mean.
    """
    figure, axes = _axes((5.6, 3.8))
    epochs = [row["epoch"] for row in rows]
    for stage, text, color in (("train", "training", GREY), ("val", "validation", BLUE)):
        errors = [row[f"{stage}_mae/{name}"] for row in rows]
        axes.plot(epochs, errors, "o-", markersize=4, color=color, label=text)
    if baseline is not None:
        axes.axhline(baseline, color=ORANGE, linestyle="--", linewidth=1.2, label="predicting the mean")
    axes.set(yscale="log", xlabel="epoch", ylabel=_plain(label))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda x, _: short(x))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", axis="y", color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
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
