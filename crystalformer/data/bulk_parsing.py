"""Structures of many sources: parsed in many processes, kept in a cache."""

import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ..common.process import cores, uninterrupted
from ..common.version import version
from .parsing import Parsed, Source, parse
from .store import Item, Store, digest

# The version of the structures in the cache. It is raised when the same text gives another structure or other tensors.
STRUCTURE_FORMAT = 1
CHUNK = 64


def parse_all(
    sources: Sequence[Source],
    primitive: bool,
    workers: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Generator[list[Parsed], None, None]:
    """`parse` of each source, in order, by so many processes (0: in this one), but what the cache holds."""
    store, keys = None, [b""] * len(sources)
    found: dict[bytes, Item] = {}
    if cache is not None:
        store, keys = _store(cache, primitive), [_key(source) for source in sources]
        found = store.get([key for key in keys if key])
    missing = [source for source, key in zip(sources, keys, strict=True) if key not in found]
    fresh: dict[bytes, Item] = {}
    results = _run(missing, primitive, workers)
    try:
        for i, key in enumerate(keys):
            if key in found:
                result = [_restored(found[key])]
            else:
                result = next(results)
                if key and (item := _item(result)) is not None:
                    fresh[key] = item
            if progress is not None and (i % CHUNK == CHUNK - 1 or i == len(keys) - 1):
                progress(i + 1, len(keys))
            yield result
    finally:
        results.close()
        # What was parsed is kept, even if the work ends early.
        if store is not None and fresh:
            store.put(list(fresh), list(fresh.values()))


def _run(sources: Sequence[Source], primitive: bool, workers: int) -> Generator[list[Parsed], None, None]:
    if not workers or len(sources) <= CHUNK:
        for source in sources:
            yield parse(source, primitive)
        return
    # Not forked: the threads of torch and BLAS do not survive it.
    executor = ProcessPoolExecutor(min(workers, cores()), mp_context=get_context("spawn"))
    try:
        with uninterrupted():
            results = executor.map(parse, sources, repeat(primitive), chunksize=CHUNK)
        yield from results
    finally:
        executor.shutdown(cancel_futures=True)


# The cache ------------------------------------------------------------------------------------------------------------


def _store(folder: str | Path, primitive: bool) -> Store:
    from importlib.metadata import version as version_of

    settings = {"format": STRUCTURE_FORMAT, "crystalformer": version, "pymatgen": version_of("pymatgen")}
    return Store(folder, "structures", settings | {"primitive": primitive})


def _key(source: Source) -> bytes:
    """The key of what takes time to parse, b"" for the rest."""
    return b"" if source.kind == "ase" else digest(source.kind, json.dumps(source.content))


def _item(parsed: list[Parsed]) -> Item | None:
    """The tensors of one structure, if it comes back from them as it is."""
    if len(parsed) != 1 or parsed[0].structure is None or not hasattr(parsed[0].structure, "frac_coords"):
        return None
    structure = parsed[0].structure
    kinds: dict[str, int] = {}
    sites = [kinds.setdefault(json.dumps(site.species.as_dict()), len(kinds)) for site in structure]
    text = json.dumps([list(kinds), sites, structure.labels, parsed[0].note])
    item = {
        "coords": torch.from_numpy(np.array(structure.frac_coords, dtype=np.float64)),
        "lattice": torch.from_numpy(np.array(structure.lattice.matrix, dtype=np.float64)),
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }
    again = _restored(item).structure
    same = (
        np.array_equal(again.cart_coords, structure.cart_coords)
        and again.lattice == structure.lattice
        and again.site_properties == structure.site_properties
        and all(a.species == b.species for a, b in zip(again, structure, strict=True))
    )
    return item if same else None


def _restored(item: Item) -> Parsed:
    from pymatgen.core import Composition, Structure

    kinds, sites, labels, note = json.loads(item["text"].numpy().tobytes())
    species = [Composition(json.loads(kind)) for kind in kinds]
    coords, lattice = item["coords"].numpy().copy(), item["lattice"].numpy().copy()
    return Parsed(Structure(lattice, [species[i] for i in sites], coords, labels=labels), note=note)
