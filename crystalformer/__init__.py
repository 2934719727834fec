"""Infinitely connected attention for crystals, and the Crystalformer model on it."""

from .backends import available_backends
from .basis import RadialBasis
from .checks import debug_checks
from .data import CrystalBatch
from .functional import periodic_attention, periodic_encoding, reciprocal_attention
from .images import ImageList, build_images

__version__ = "0.1.0"

__all__ = [
    "CrystalBatch",
    "ImageList",
    "RadialBasis",
    "available_backends",
    "build_images",
    "debug_checks",
    "periodic_attention",
    "periodic_encoding",
    "reciprocal_attention",
]
