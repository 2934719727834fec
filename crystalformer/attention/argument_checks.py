"""Checks of the public functions' arguments: do their shapes fit each other, and do the lists fit the crystals?"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..common import checks
from ..geometry.image_list import ImageList
from ..geometry.wave_vectors import WaveVectors
from .basis import RadialBasis
from .settings import Settings

HALF = (torch.bfloat16, torch.float16)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Checks q, k (N,H,D) and v (N,H,Dv); the sizes by name."""
    known: dict[str, int] = {}
    checks.check_tensor("q", q, "N H D", known)
    checks.check_dtype("q", q, torch.float32, torch.float64, *HALF)
    checks.check_tensor("k", k, "N H D", known, like=q)
    checks.check_tensor("v", v, "N H Dv", known, like=q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_finite(name, x)
    return known


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """torch.library has no forward-mode formulas: without this check the tangents would be dropped silently."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("forward-mode derivatives (jvp, jacfwd) must be taken with torch.autograd instead")


def check_atoms(
    name: str, decay: Tensor, positions: Tensor, lattice: Tensor, known: dict[str, int], like: Tensor
) -> None:
    """Checks what is in the dtype of `like`, or in fp32 if that is in half precision."""
    if like.dtype in HALF:
        checks.check_tensor(name, decay, "N H", known)
        checks.check_dtype(name, decay, torch.float32)
        like = like.new_empty(0, dtype=torch.float32)
    checks.check_tensor(name, decay, "N H", known, like=like)
    checks.check_tensor("positions", positions, "N 3", known, like=like)
    checks.check_tensor("lattice", lattice, "C 3 3", known, like=like)
    checks.check_decay(name, decay)


def check_images(images: ImageList, decay: Tensor, known: dict[str, int], reciprocal: bool = False) -> None:
    """Checks the list; with `reciprocal` its wave vectors are used, too."""
    if not isinstance(images, ImageList):
        several = isinstance(images, (list, tuple)) and all(isinstance(x, ImageList) for x in images)
        hint = ": join the lists of several crystals by ImageList.cat" if several else ""
        raise TypeError(f"images must be an ImageList, from build_images, not {type(images).__name__}{hint}")
    if (images.num_atoms, images.num_crystals) != (known["N"], known["C"]):
        raise ValueError(
            f"images must be of {known['N']} atoms in {known['C']} crystals, as positions and lattice, "
            f"not of {images.num_atoms} atoms in {images.num_crystals} crystals"
        )
    if images.device != decay.device:
        raise ValueError(f"images must be on {decay.device}, as the other arguments, not on {images.device}")
    if images.decay_min is not None and checks.values_visible(decay):
        decay_min = images.decay_min if reciprocal else images.real_decay_min
        assert decay_min is not None
        check_smallest("decay", decay, decay_min, "images")


def check_wave_vectors(
    waves: WaveVectors, name: str, ptr: Tensor, decay: Tensor, positions: Tensor, lattice: Tensor
) -> None:
    """Checks those of the crystals of the argument `name`, whose ptr is given."""
    if not isinstance(waves, WaveVectors):
        raise TypeError(f"wave_vectors must be WaveVectors, from build_wave_vectors, not {type(waves).__name__}")
    if waves.device != decay.device:
        raise ValueError(f"wave_vectors must be on {decay.device}, as the other arguments, not on {waves.device}")
    check_crystals("wave_vectors", waves, name, ptr)
    if waves.of_orbits and (positions.requires_grad or lattice.requires_grad):
        raise ValueError("wave_vectors must be of all atoms, not of orbits, where positions or lattice require grad")
    waves.check_built_for(lattice, positions)
    check_smallest("decay_reciprocal", decay, waves.decay_min, "wave_vectors")


def check_crystals(name: str, lists: ImageList | WaveVectors, of: str, ptr: Tensor) -> None:
    """Refuses lists of other crystals than those of the argument `of`, whose ptr is given, where that can be seen."""
    if lists.ptr is ptr:
        return
    if lists.ptr.shape != ptr.shape or (checks.values_visible(ptr) and not torch.equal(lists.ptr, ptr)):
        raise ValueError(f"{name} must be of the crystals of {of}, {ptr.tolist()}, not of {lists.ptr.tolist()}")


def check_smallest(name: str, decay: Tensor, decay_min: float, built: str) -> None:
    """Refuses decays below those that a list is certified for: their sums would miss images."""
    if not checks.values_visible(decay) or not decay.numel():
        return
    smallest = float(decay.detach().min())
    if smallest < decay_min * (1 - 1e-6):  # a model's decay at its bound, in fp32
        raise ValueError(
            f"{name} must be at least {decay_min:g}, the decay_min that {built} were built for, "
            f"but its smallest value is {smallest:g}"
        )


def check_precision(precision: str) -> None:
    if precision not in ("exact", "tf32"):
        raise ValueError(f"precision must be 'exact' or 'tf32', not {precision!r}")


def check_value_encoding(
    edge_weight: Tensor | None, basis: RadialBasis | None, known: dict[str, int], like: Tensor
) -> tuple[Tensor, Settings]:
    """The weight as the op takes it, of no functions without an edge_weight, and the settings of the basis."""
    if edge_weight is None:
        return like.new_empty(known["H"], known.get("Dv", 0), 0), Settings()
    if not isinstance(basis, RadialBasis):
        raise TypeError(f"basis must be a RadialBasis when edge_weight is given, not {type(basis).__name__}")
    known["K"] = basis.num
    checks.check_tensor("edge_weight", edge_weight, "H Dv K", known, like=like)
    checks.check_finite("edge_weight", edge_weight)
    return edge_weight, Settings(r_max=float(basis.r_max), width=float(basis.width))
