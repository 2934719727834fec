"""Structures made ready for a model: one CrystalBatch each, with its images and wave vectors, built once and kept."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common import checks
from ..common.process import memory
from ..common.version import version
from ..common.words import count
from ..geometry.image_list import ImageList
from ..geometry.images import build_images
from ..geometry.limits import MAX_IMAGES, Extent
from ..geometry.movement import Geometry
from ..geometry.orbit_images import build_orbit_images
from ..model.batch import CrystalBatch
from ..model.config import CrystalformerConfig
from ..model.structures import read_structure
from .equivalent_atoms import orbits_of_all
from .store import Item, Store, digest

if TYPE_CHECKING:
    from ..model.model import Crystalformer

# Of the lists in the cache: one more whenever the same settings give another list, or other tensors.
LIST_FORMAT = 1
# Atoms whose images are built, and written, at once: some 10 million images, 200 MB.
ATOMS_AT_ONCE = 1 << 15
BYTES_PER_IMAGE = 16


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
    first: int = 0,
    symmetry_tol: float = 0.0,
) -> list[CrystalBatch]:
    """One CrystalBatch for each structure, with the images and wave vectors that the model certifies.

    The same as `CrystalBatch.from_structures([structure])` and `Crystalformer.prepare` for each, bit for bit.

    Args:
        structures: pymatgen Structures or ase Atoms.
        settings: the model or its configuration; or what the lists shall be certified for.
        cache: a folder that keeps the image lists and the orbits, found again by positions, lattice, species and
            settings, whatever the order and company of the crystals. Needs safetensors. It only grows: remove it as
            you like.
        workers: threads that build; 0 takes torch's number of threads.
        dtype: fp32 or fp64; torch's default dtype if None.
        progress: called with the number of crystals done and of all, now and then.
        first: number of structures[0] in the caller's own list, by which errors name structures.
        symmetry_tol: Å; above 0, rows are orbits of equivalent atoms, see `CrystalBatch.from_structures`.

    Raises:
        TypeError, ValueError: as `CrystalBatch.from_structures`, `build_images` and `build_wave_vectors`, naming the
            structure; for lists that together are larger than this machine's memory, too.
    """
    checks.check_workers("workers", workers)
    dtype = dtype or torch.get_default_dtype()
    symmetry_tol = checks.check_number("symmetry_tol", symmetry_tol, closed=True)
    read = [read_structure(structure, f"structures[{i}]") for i, structure in enumerate(structures, first)]
    if symmetry_tol:
        orbits = orbits_of_all(read, symmetry_tol, cache)
        crystals = [CrystalBatch.pack([x], dtype, [found]) for x, found in zip(read, orbits, strict=True)]
    else:
        crystals = [CrystalBatch.pack([x], dtype) for x in read]
    if not isinstance(settings, ImageSettings):
        config = settings if isinstance(settings, CrystalformerConfig) else settings.config
        for i, crystal in enumerate(crystals if config.needs_wave_vectors else ()):
            with _named(first + i):
                crystal.wave_vectors = crystal.build_wave_vectors(config.decay_reciprocal_min, config.tol)
        needed = ImageSettings.of(config)
        if needed is None:
            return crystals
        settings = needed
    certified = asdict(settings)
    store = None
    keys = [b""] * len(crystals)
    found: dict[bytes, Item] = {}
    if cache is not None:
        about = {"format": LIST_FORMAT, "crystalformer": version}
        about |= {"symmetry_tol": symmetry_tol} if symmetry_tol else {}  # without it a cache is what it was before
        store = Store(cache, "images", certified | about)
        keys = [_key(crystal) for crystal in crystals]
        found = store.get(keys)
    missing = []
    for i, crystal in enumerate(crystals):
        if keys[i] in found:
            crystal.images = _list(found[keys[i]], crystal, certified)
        else:
            missing.append(i)
    _check_memory(missing, crystals, settings)
    done = len(crystals) - len(missing)
    with _threads(workers):
        for chunk in _chunks(missing, crystals):
            items = _build_named(chunk, crystals, certified, first)
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


def expected_images(batch: CrystalBatch, settings: ImageSettings) -> Tensor:
    """(C) about how many images the list of each crystal will have."""
    decay = torch.full((len(batch),), settings.decay_min, dtype=torch.float64)
    geometry = (batch.positions.double(), batch.lattice.double(), batch.ptr)
    if (x := batch.orbit_atoms) is not None:
        geometry = (x.positions, x.lattice, x.ptr)
    extent = Extent.of(*geometry, decay, settings.tol, settings.logit_range, None, settings.every_pair, all_pairs=False)
    return extent.images * (batch.ptr.diff() / geometry[2].diff())  # of orbits, if none of their images were merged


def _check_memory(index: Sequence[int], crystals: Sequence[CrystalBatch], settings: ImageSettings) -> None:
    """Refuses lists that memory cannot hold all at once, before time goes into the first of them."""
    number = 0.0
    for chunk in _chunks(index, crystals):
        images = expected_images(CrystalBatch.cat([crystals[i] for i in chunk]), settings)
        number += float(images[images <= MAX_IMAGES].sum())  # a crystal with more is refused by its name
    if number * BYTES_PER_IMAGE > memory():
        needed, there = (x / 2**30 for x in (number * BYTES_PER_IMAGE, memory()))
        raise ValueError(
            f"images of {count(len(index), 'structure')} must fit into memory, {there:.4g} GiB, but about {number:.3g} "
            f"of them take {needed:.4g} GiB: raise decay_min (in a model lower r0) or tol, or take fewer structures"
        )


def _key(crystal: CrystalBatch) -> bytes:
    tensors = [crystal.species, crystal.positions, crystal.lattice]
    if (behind := crystal.orbit_atoms) is not None:
        tensors += [behind.positions, behind.lattice, behind.orbit]
    return digest(*(part for x in tensors for part in (f"{x.dtype} {tuple(x.shape)}", x.numpy().tobytes())))


def _build(crystals: Sequence[CrystalBatch], settings: dict[str, Any]) -> list[Item]:
    """The tensors of the crystals' lists, each as if it were alone: atoms and images numbered from 0."""
    batch = CrystalBatch.cat(crystals)
    if (x := batch.orbit_atoms) is None:
        images = build_images(batch.positions, batch.lattice, batch.ptr, **settings)
        entries = {"shift": images.shift}
    else:
        images = build_orbit_images(x.positions, x.lattice, x.ptr, x.orbit, **settings, symmetry_tol=x.symmetry_tol)
        assert images.distance is not None
        assert images.repeats is not None
        entries = {"distance": images.distance, "repeats": images.repeats}
    number = images.row_ptr[batch.ptr].diff()
    first_row = torch.repeat_interleave(batch.ptr[:-1].to(torch.int32), number, output_size=images.num_images)
    entries["col"] = images.col - first_row
    parts = {name: x.split(number.tolist()) for name, x in entries.items()}
    rows = [images.row_ptr[start : end + 1] for start, end in itertools.pairwise(batch.ptr.tolist())]
    parts |= {"row_ptr": [x - x[0] for x in rows], "cutoff": images.cutoff.split(1)}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _build_named(
    chunk: list[int], crystals: Sequence[CrystalBatch], settings: dict[str, Any], first: int
) -> list[Item]:
    """`_build` of some crystals. If they are refused, each is built alone, so that the error names one crystal."""
    try:
        return _build([crystals[i] for i in chunk], settings)
    except ValueError:
        items = list[Item]()
        for i in chunk:
            with _named(first + i):
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
    if "shift" not in item:
        item = item | {"shift": item["col"].new_empty(0, 3)}
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
