"""Infinitely connected attention for crystals, and the Crystalformer model on it."""

# First: torch takes seconds to come, and Ctrl-C may come before it.
from . import process  # noqa: F401  # isort: skip

from . import (
    compiled,  # noqa: F401  # implements the operators
    convert,
)
from .backends import available_backends
from .basis import RadialBasis
from .checks import debug_checks
from .config import CrystalformerConfig
from .data import CrystalBatch
from .functional import dual_space_attention, periodic_attention, periodic_encoding, reciprocal_attention
from .image_list import ImageList
from .images import build_images
from .model import Crystalformer
from .predictor import load
from .version import version as __version__
from .wave_vectors import WaveVectors, build_wave_vectors

__all__ = [
    "CrystalBatch",
    "Crystalformer",
    "CrystalformerConfig",
    "ImageList",
    "RadialBasis",
    "WaveVectors",
    "__version__",
    "available_backends",
    "build_images",
    "build_wave_vectors",
    "convert",
    "debug_checks",
    "dual_space_attention",
    "load",
    "periodic_attention",
    "periodic_encoding",
    "reciprocal_attention",
]
