"""Lists of the periodic images: this library's, and those of neighbour-list libraries, sorted as ours are.

`certified` finds its cutoffs from the tolerance, and so does `certified-reference` in plain PyTorch; `given-cutoff` and
the other libraries are told these, crystal by crystal. A list is right if it has the same images as that of the plain
PyTorch code, in the same order.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import crystalformer as cf
from crystalformer.geometry.images import CUTOFF_SLACK, _build
from crystalformer.geometry.limits import MAX_IMAGES

from ..cases import Absent, Case, Provider, Results
from ..problems import CERTIFICATE, Problem

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # i, j, shift
Crystal = tuple[np.ndarray, np.ndarray, float]  # positions, lattice, radius


def keys(row: Tensor, col: Tensor, shift: Tensor) -> Tensor:
    """(M,5) i, j, n of a list in its order."""
    return torch.cat([row[:, None].long(), col[:, None].long(), shift.long()], 1).cpu()


def _crystals(x: Problem) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """positions, lattice, ptr and cutoff of each crystal, fp64."""
    batch, ptr = x.crystals.to(torch.float64), x.crystals.ptr
    bounds = ptr.tolist()
    return [
        (batch.positions[bounds[c] : bounds[c + 1]], batch.lattice[c : c + 1], ptr[c : c + 2] - ptr[c], cutoff)
        for c, cutoff in enumerate(x.images.cutoff.tolist())
    ]


def _keys_of(found: cf.ImageList) -> Results:
    return {"images": keys(torch.repeat_interleave(found.row_ptr.diff()), found.col, found.shift)}


def _plain(crystals: cf.CrystalBatch) -> cf.ImageList:
    batch = crystals.to(torch.float64)
    decay_min = torch.full_like(batch.lattice[:, 0, 0], CERTIFICATE["decay_min"])
    settings = (decay_min, CERTIFICATE["tol"], CERTIFICATE["logit_range"], None, False, MAX_IMAGES)
    return _build(batch.positions, batch.lattice, batch.ptr, *settings)


def _truth(x: Problem, given: bool) -> Results:
    """The images by the PyTorch code of the library, on the CPU, where the compiled code serves otherwise."""
    if not given:
        return _keys_of(_plain(x.crystals.to(torch.device("cpu"))))
    lists = []
    for positions, lattice, ptr, cutoff in _crystals(x):
        any_decay = torch.ones(1, dtype=torch.float64)
        lists.append(_build(positions.cpu(), lattice.cpu(), ptr.cpu(), any_decay, 1.0, 1.0, cutoff, False, MAX_IMAGES))
    return _keys_of(cf.ImageList.cat(lists))


def _certified(x: Problem) -> Case:
    batch = x.crystals.to(torch.float64)
    build = lambda: cf.build_images(batch.positions, batch.lattice, batch.ptr, **CERTIFICATE)
    return Case({"build": build}, lambda: _keys_of(build()), lambda: _truth(x, given=False))


def _certified_reference(x: Problem) -> Case:
    build = functools.partial(_plain, x.crystals)
    return Case({"build": build}, lambda: _keys_of(build()), lambda: _truth(x, given=False))


def _given_cutoff(x: Problem) -> Case:
    inputs = _crystals(x)

    def build() -> cf.ImageList:
        return cf.ImageList.cat([cf.build_images(*one, cutoff=cutoff) for *one, cutoff in inputs])

    return Case({"build": build}, lambda: _keys_of(build()), lambda: _truth(x, given=True))


def _others(load: Callable[[], Callable[[Crystal], Found]]) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        if x.device.type != "cpu":
            raise Absent("for the CPU")
        find, ptr = load(), x.crystals.ptr.tolist()
        inputs = [(p.numpy(), m[0].numpy(), cutoff + CUTOFF_SLACK) for p, m, _, cutoff in _crystals(x)]

        def build() -> list[Found]:
            found = []
            for one in inputs:
                i, j, n = find(one)
                order = np.lexsort((n[:, 2], n[:, 1], n[:, 0], j, i))
                found.append((i[order], j[order], n[order]))
            return found

        def results() -> Results:
            lists = [(i + ptr[c], j + ptr[c], n) for c, (i, j, n) in enumerate(build())]
            i, j, n = (torch.from_numpy(np.concatenate(column)) for column in zip(*lists, strict=True))
            return {"images": keys(i, j, n)}

        return Case({"build": build}, results, lambda: _truth(x, given=True))

    return prepare


def _vesin() -> Callable[[Crystal], Found]:
    try:
        from vesin import NeighborList
    except ImportError as error:
        raise Absent(f"vesin is not installed: {error}") from error

    def find(crystal: Crystal) -> Found:
        positions, lattice, radius = crystal
        found = NeighborList(cutoff=radius, full_list=True)
        i, j, n = found.compute(points=positions, box=lattice, periodic=True, quantities="ijS")
        return _with_itself(i.astype(np.int64), j.astype(np.int64), n.astype(np.int64), len(positions))

    return find


def _pymatgen() -> Callable[[Crystal], Found]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pymatgen.optimization.neighbors import find_points_in_spheres
    except ImportError as error:
        raise Absent(f"pymatgen is not installed: {error}") from error

    def find(crystal: Crystal) -> Found:
        positions, lattice, radius = crystal
        pbc: Any = np.ones(3, dtype=np.int64)
        i, j, n, _ = find_points_in_spheres(positions, positions, radius, pbc, lattice, tol=1e-8)
        return i, j, n.astype(np.int64)

    return find


def _with_itself(i: np.ndarray, j: np.ndarray, n: np.ndarray, num_atoms: int) -> Found:
    """An atom is an image of itself, which neighbour lists leave out."""
    atoms = np.arange(num_atoms)
    return (
        np.concatenate([i, atoms]),
        np.concatenate([j, atoms]),
        np.concatenate([n, np.zeros((num_atoms, 3), dtype=np.int64)]),
    )


PROVIDERS = [
    Provider("certified", "images", 0.0, _certified),
    Provider("certified-reference", "images", 0.0, _certified_reference),
    Provider("given-cutoff", "images", 0.0, _given_cutoff),
    Provider("vesin", "images", 0.0, _others(_vesin)),
    Provider("pymatgen", "images", 0.0, _others(_pymatgen)),
]
