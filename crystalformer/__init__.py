"""Infinitely connected attention for crystals, and the Crystalformer model on it."""

# First: Ctrl-C may come before the rest.
from .common.process import is_command_line  # isort: skip

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compiled  # noqa: F401  # says how backends are loaded
from .common.version import version as __version__

# The command line imports what a command needs, so that its --help and doctor do without torch.
if not is_command_line():
    try:
        import numpy  # noqa: F401  # is it there?
        import torch  # noqa: F401  # likewise
    except ModuleNotFoundError as error:
        message = f"crystalformer needs torch and numpy, and there is {error}: pip install torch numpy"
        raise ModuleNotFoundError(message, name=error.name) from None

    from . import kernels  # noqa: F401  # implements the operators of triton
    from .app.predictor import load
    from .attention.basis import RadialBasis
    from .attention.functional import dual_space_attention, periodic_attention, periodic_encoding, reciprocal_attention
    from .common.checks import debug_checks
    from .common.loading import available_backends, load_backend
    from .common.ptr import ptr_from_batch, ptr_from_sizes
    from .data import CrystalBatch
    from .data.equivalent_atoms import equivalent_atoms
    from .geometry.edges import Edges
    from .geometry.image_list import ImageList
    from .geometry.images import build_images
    from .geometry.orbit_images import build_orbit_images
    from .geometry.wave_vectors import WaveVectors, build_wave_vectors
    from .model import convert
    from .model.config import CrystalformerConfig, smallest_decay
    from .model.model import Crystalformer

    load_backend("cpu")  # implements its operators, which exported programs call by their names

__all__ = [
    "CrystalBatch",
    "Crystalformer",
    "CrystalformerConfig",
    "Edges",
    "ImageList",
    "RadialBasis",
    "WaveVectors",
    "__version__",
    "available_backends",
    "build_images",
    "build_orbit_images",
    "build_wave_vectors",
    "convert",
    "debug_checks",
    "dual_space_attention",
    "equivalent_atoms",
    "load",
    "periodic_attention",
    "periodic_encoding",
    "ptr_from_batch",
    "ptr_from_sizes",
    "reciprocal_attention",
    "smallest_decay",
]

if TYPE_CHECKING:
    from . import ase as ase
else:

    def __getattr__(name: str) -> Any:
        """`cf.ase`, imported when it is asked for: nothing else here needs ase."""
        if name == "ase":
            return import_module(".ase", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
