"""This library on one row for each orbit of equivalent atoms, in `cpu-orbits` where `cpu` has one for each atom.

The truth is that of all atoms, each with the q, k, v and decay of its orbit. Orbits are found beforehand, as a training
does that keeps them; `certified-orbits` builds their list.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

import crystalformer as cf
from crystalformer.geometry.orbit_images import build_orbit_images, merge
from crystalformer.model.orbit_atoms import OrbitAtoms

from ..cases import (
    Absent,
    Case,
    Provider,
    Results,
    attention_case,
    exact_problem,
    library_attention,
    seeded_model,
    training_case,
    truth,
)
from ..problems import CERTIFICATE, Problem
from .library import FP32_BOUND, STEP_BOUND, require


def _orbits(x: Problem) -> OrbitAtoms:
    try:
        found = x.orbits.orbit_atoms
    except ModuleNotFoundError as error:
        raise Absent(str(error)) from error
    assert found is not None
    if len(found.first) == x.crystals.num_atoms:
        raise Absent("no two of the atoms are equivalent")
    return found


def _list(found: OrbitAtoms) -> cf.ImageList:
    options = CERTIFICATE | {"symmetry_tol": found.symmetry_tol}
    return build_orbit_images(found.positions, found.lattice, found.ptr, found.orbit, **options)


def _attention(backend: str) -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        row = _orbits(x).row
        first = torch.full_like(x.orbits.positions[:, 0], len(row), dtype=torch.int64)
        first = first.scatter_reduce(0, row, torch.arange(len(row), device=row.device), "amin")
        inputs = {
            name: y if y is None or name == "weight" else y[first] for name, y in x.inputs.items() if name != "lattice"
        }
        inputs |= {"positions": x.orbits.positions, "lattice": x.orbits.lattice}
        few = replace(x, crystals=x.orbits, images=_list(_orbits(x)), inputs=inputs, upstream=x.upstream[first])
        return replace(attention_case(few, library_attention(few, backend)), truth=lambda: _truth(x, few, row, first))

    return prepare


def _truth(x: Problem, few: Problem, row: torch.Tensor, first: torch.Tensor) -> Results:
    every = exact_problem(x)
    attend = library_attention(every, "reference")

    def rows(weight: torch.Tensor | None = None, **inputs: torch.Tensor) -> torch.Tensor:
        of_atoms = {name: inputs[name][row] for name in ("q", "k", "v", "decay")}
        geometry = {name: every.inputs[name] for name in ("positions", "lattice")}
        return attend(weight=weight, **of_atoms, **geometry)[first]

    exact = {name: y if y is None else y.double() for name, y in few.inputs.items()}
    return attention_case(replace(few, inputs=exact, upstream=few.upstream.double()), rows).results()


def _training(backend: str, domain: str = "real") -> Callable[[Problem], Case]:
    def prepare(x: Problem) -> Case:
        require(backend, x)
        _orbits(x)
        model = seeded_model(x, x.dtype, backend, domain)
        batch = model.prepare(x.orbits)
        exact = None if domain == "real" else lambda: truth(x, "training", domain)
        return training_case(model, lambda: model(batch), exact)

    return prepare


def _images(x: Problem) -> Case:
    found = _orbits(x)
    return Case({"build": lambda: _list(found)}, lambda: _entries(_list(found)), lambda: _merged(found))


def _entries(images: cf.ImageList) -> Results:
    assert images.distance is not None
    assert images.repeats is not None
    return {"col": images.col.double(), "distance": images.distance, "repeats": images.repeats.double()}


def _merged(found: OrbitAtoms) -> Results:
    """By the PyTorch code of the library, of the images of all atoms."""
    every = cf.build_images(found.positions, found.lattice, found.ptr, **CERTIFICATE)
    _, *entries = merge(every, found.positions, found.lattice, found.orbit, found.first, found.symmetry_tol)
    return {name: y.double() for name, y in zip(("col", "distance", "repeats"), entries, strict=True)}


PROVIDERS = [
    *(
        Provider(f"{name}-orbits", op, bound, prepare(name))
        for op, bound, prepare in (("attention", FP32_BOUND, _attention), ("training", STEP_BOUND, _training))
        for name in ("cpu", "triton")
    ),
    Provider("cpu-dual-space-orbits", "training", STEP_BOUND, _training("cpu", "multihead")),
    Provider("certified-orbits", "images", 1e-9, _images),
]
