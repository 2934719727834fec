"""Crystals in: files and folders, structures of other libraries, packed into batches of tensors."""

from ..model.batch import NUM_ELEMENTS, CrystalBatch
from .crystals import ImageSettings, build_crystals
from .readers import read_samples
from .samples import DataError, Problem, Samples, write_problems
from .splits import read_split, split, write_split

__all__ = [
    "NUM_ELEMENTS",
    "CrystalBatch",
    "DataError",
    "ImageSettings",
    "Problem",
    "Samples",
    "build_crystals",
    "read_samples",
    "read_split",
    "split",
    "write_problems",
    "write_split",
]
