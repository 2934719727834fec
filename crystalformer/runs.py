"""Trainings from files to a folder with the model and a report, as the command line runs them."""

from .app.crossval import crossval
from .app.data_source import DataSource
from .app.fine_tuning import Start
from .app.train import train

__all__ = ["DataSource", "Start", "crossval", "train"]
