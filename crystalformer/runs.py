"""Trainings from files to a folder with the model and a report, as the command line runs them."""

from .app.crossval import crossval
from .app.train import DataSource, train

__all__ = ["DataSource", "crossval", "train"]
