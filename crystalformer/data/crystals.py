"""Structures made ready for a model: one CrystalBatch each, with its images and wave vectors, built once and kept."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common import checks
from ..common.version import version
from ..geometry.image_list import ImageList
from ..geometry.images import build_images
from ..geometry.movement import Geometry
from ..geometry.wave_vectors import build_wave_vectors
from ..model.batch import CrystalBatch
from ..model.config import CrystalformerConfig
from ..model.structures import read_structure
from .store import Item, Store, digest

if TYPE_CHECKING:
    from ..model.model import Crystalformer

# Of the lists in the cache: one more whenever the same settings give another list, or other tensors.
LIST_FORMAT = 1
# Atoms whose images are built, and written, at once: some 10 million images, 200 MB.
ATOMS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class ImageSettings:
    """What the image list of a crystal depends on, besides the crystal; see `build_images`."""

    decay_min: float = 0.1275
    tol: float = 1e-6
    logit_range: float = 4.0
    every_pair: bool = False

    @classmethod
    def of(cls, config: CrystalformerConfig) -> "ImageSettings | None":
        """Those that a model of this configuration needs, None if it needs no images."""
        return cls(config.decay_min, config.tol, config.logit_range) if config.needs_images else None


def build_crystals(
    structures: Sequence[Any],
    settings: "Crystalformer | CrystalformerConfig | ImageSettings",
    *,
    cache: str | Path | None = None,
    workers: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[CrystalBatch]:
    """One CrystalBatch for each structure, with the images and wave vectors that the model certifies.

    The same as `CrystalBatch.from_structures([structure])` and `Crystalformer.prepare` for each, bit for bit.

    Args:
        structures: pymatgen Structures or ase Atoms.
        settings: the model or its configuration; or what the lists shall be certified for.
        cache: a folder that keeps the image lists, found again by positions, lattice, species and settings, whatever
            the order and company of the crystals. Needs safetensors. It only grows: remove it as you like.
        workers: threads that build; 0 takes torch's number of threads.
        dtype: fp32 or fp64; torch's default dtype if None.
        progress: called with the number of crystals done and of all, now and then.

    Raises:
        TypeError, ValueError: as `CrystalBatch.from_structures`, `build_images` and `build_wave_vectors`, naming the
            structure.
    """
    checks.check_workers("workers", workers)
    dtype = dtype or torch.get_default_dtype()
    crystals = [_pack(structure, f"structures[{i}]", dtype) for i, structure in enumerate(structures)]
    if not isinstance(settings, ImageSettings):
        config = settings if isinstance(settings, CrystalformerConfig) else settings.config
        for i, crystal in enumerate(crystals if config.needs_wave_vectors else ()):
            with _named(i):
                crystal.wave_vectors = build_wave_vectors(
                    crystal.lattice, crystal.ptr, config.decay_reciprocal_min, config.tol
                )
        needed = ImageSettings.of(config)
        if needed is None:
            return crystals
        settings = needed
    certified = asdict(settings)
    store = None
    keys = [b""] * len(crystals)
    found: dict[bytes, Item] = {}
    if cache is not None:
        store = Store(cache, "images", certified | {"format": LIST_FORMAT, "crystalformer": version})
        keys = [_key(crystal) for crystal in crystals]
        found = store.get(keys)
    missing = []
    for i, crystal in enumerate(crystals):
        if keys[i] in found:
            crystal.images = _list(found[keys[i]], crystal, certified)
        else:
            missing.append(i)
    done = len(crystals) - len(missing)
    with _threads(workers):
        for chunk in _chunks(missing, crystals):
            items = _build_named(chunk, crystals, certified)
            for i, item in zip(chunk, items, strict=True):
                crystals[i].images = _list(item, crystals[i], certified)
            if store is not None:
                # A crystal may be there twice.
                unique = {keys[i]: item for i, item in zip(chunk, items, strict=True)}
                store.put(list(unique), list(unique.values()))
            done += len(chunk)
            if progress is not None:
                progress(done, len(crystals))
    if progress is not None and not missing:
        progress(done, len(crystals))
    return crystals


def _pack(structure: Any, name: str, dtype: torch.dtype) -> CrystalBatch:
    return CrystalBatch._pack([read_structure(structure, name)], dtype)


def _key(crystal: CrystalBatch) -> bytes:
    tensors = (crystal.species, crystal.positions, crystal.lattice)
    return digest(*(part for x in tensors for part in (f"{x.dtype} {tuple(x.shape)}", x.numpy().tobytes())))


def _build(crystals: Sequence[CrystalBatch], settings: dict[str, Any]) -> list[Item]:
    """The tensors of the crystals' lists, each as if it were alone: atoms and images numbered from 0."""
    batch = CrystalBatch.cat(crystals)
    images = build_images(batch.positions, batch.lattice, batch.ptr, **settings)
    number = images.row_ptr[batch.ptr].diff()
    first_atom = torch.repeat_interleave(batch.ptr[:-1].to(torch.int32), number, output_size=images.num_images)
    cols, shifts = ((x.split(number.tolist())) for x in (images.col - first_atom, images.shift))
    rows = [images.row_ptr[start : end + 1] for start, end in itertools.pairwise(batch.ptr.tolist())]
    return [
        {"row_ptr": row_ptr - row_ptr[0], "col": col, "shift": shift, "cutoff": cutoff}
        for row_ptr, col, shift, cutoff in zip(rows, cols, shifts, images.cutoff.split(1), strict=True)
    ]


def _build_named(chunk: list[int], crystals: Sequence[CrystalBatch], settings: dict[str, Any]) -> list[Item]:
    """`_build` of some crystals. If they are refused, each is built alone, so that the error names one crystal."""
    try:
        return _build([crystals[i] for i in chunk], settings)
    except ValueError:
        items = list[Item]()
        for i in chunk:
            with _named(i):
                items += _build([crystals[i]], settings)
        return items


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Errors say which structure they are of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"structures[{index}]: {error}") from error


def _list(item: dict[str, Any], crystal: CrystalBatch, settings: dict[str, Any]) -> ImageList:
    geometry = Geometry.of(crystal.positions, crystal.lattice)
    return ImageList(**item, ptr=crystal.ptr, num_pairs=crystal.num_atoms**2, geometry=geometry, **settings)


def _chunks(index: Sequence[int], crystals: Sequence[CrystalBatch]) -> Iterator[list[int]]:
    """The indices in runs of about ATOMS_AT_ONCE atoms."""
    chunk, atoms = list[int](), 0
    for i in index:
        chunk.append(i)
        atoms += crystals[i].num_atoms
        if atoms >= ATOMS_AT_ONCE:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)
