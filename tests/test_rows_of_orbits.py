"""The proof on real crystals: a model on rows of orbits is the model on rows of atoms, outputs, features, gradients."""

import csv
import functools
import gzip
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crystals import aflow_prototypes, import_or_skip
from torch import Tensor

import crystalformer as cf

spglib = import_or_skip("spglib", reason="finds the symmetry")
core = import_or_skip("pymatgen.core", reason="the crystals are pymatgen's")
DATA = Path(__file__).parents[2] / "shared" / "data"  # beside a checkout, not a part of the project
TOGETHER = 16
EXACT = 1e-9  # of lists with tol 1e-11


@functools.cache
def model(pooling: str = "mean") -> cf.Crystalformer:
    """Half of its heads in reciprocal space."""
    torch.manual_seed(0)
    sizes = dict(num_blocks=2, model_dim=16, num_heads=4, ff_dim=16, num_basis=16)
    network = cf.Crystalformer(cf.CrystalformerConfig(domain="multihead", tol=1e-11, pooling=pooling, **sizes)).double()
    network.calibrate(cf.CrystalBatch.from_structures(aflow_prototypes(limit=TOGETHER), torch.float64))
    return network


def results(batch: cf.CrystalBatch, pooling: str) -> Iterator[tuple[str, Tensor]]:
    """Outputs, features of all atoms as they were given, and gradients of all weights as one vector."""
    network = model(pooling)
    features = network.encode(batch)
    output = network(batch)
    yield "outputs", output.detach()
    yield "features", (features if batch.orbit_atoms is None else features[batch.orbit_atoms.row]).detach()
    gradients = torch.autograd.grad(output.square().sum(), [*network.parameters()])
    yield "gradients", torch.cat([x.flatten() for x in gradients])


def check(
    structures: Sequence[Any], bound: float, pooling: str = "mean", symmetry_tol: float = 1e-5
) -> tuple[int, int]:
    """Atoms, and the rows that they became."""
    atoms = rows = 0
    for start in range(0, len(structures), TOGETHER):
        part = structures[start : start + TOGETHER]
        every = cf.CrystalBatch.from_structures(part, torch.float64)
        few = cf.CrystalBatch.from_structures(part, torch.float64, symmetry_tol)
        atoms, rows = atoms + every.num_atoms, rows + few.num_atoms
        for (name, exact), (_, found) in zip(results(every, pooling), results(few, pooling), strict=True):
            error = float((found - exact).abs().max() / exact.abs().max())
            assert error < bound, (name, start, error)
    return atoms, rows


def test_all_prototypes():
    assert check(aflow_prototypes(max_atoms=60), EXACT) == (3028, 966)


def test_max_pooling():
    """Equivalent atoms share the gradient of the largest feature, which their orbit has alone."""
    check(aflow_prototypes(limit=4 * TOGETHER, max_atoms=20), EXACT, "max")


@pytest.mark.parametrize("cell", [(2, 1, 1), (2, 2, 1), (3, 2, 2)])
def test_supercells(cell):
    """They have the rows of one cell. In reciprocal space S is clamped pair by pair, and a supercell has more pairs."""
    structures = aflow_prototypes(limit=TOGETHER, max_atoms=8)
    larger = [s * cell for s in structures]
    assert check(larger, 20 * EXACT)[1] == check(structures, EXACT)[1]


def symmetrized(structure: Any) -> Any:
    """The primitive cell, with its atoms where the symmetry puts them, to rounding."""
    numbers = [site.specie.Z for site in structure]
    cell = (structure.lattice.matrix, structure.frac_coords, numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # spglib's, of how errors will be told
        lattice, positions, numbers = spglib.standardize_cell(cell, to_primitive=True, symprec=1e-5)
    return core.Structure(lattice, numbers, positions)


def test_phonon_crystals():
    """A fifth of them as they are, with eight digits, and as their symmetry puts them."""
    file = DATA / "matbench_phonons" / "matbench_phonons.jsonl.gz"
    if not file.exists():
        pytest.skip(f"needs {file.name} of ../shared/data")
    with gzip.open(file, "rt") as lines:
        found = [json.loads(line)["structure"] for line in lines][::5]
    structures = [core.Structure(x["lattice"], x["species"], x["frac_coords"]) for x in found]
    assert check(structures, 1e-6) == (1909, 923)
    atoms, rows = check(
        [symmetrized(symmetrized(s)) for s in structures], EXACT
    )  # one is symmetric to 1e-9 Å after once
    assert rows < 0.5 * atoms


@pytest.mark.parametrize(("name", "share"), [("perov5_val", 0.95), ("carbon24_val", 1.0)])
def test_crystals_of_little_symmetry(name, share):
    file = DATA / f"{name}.csv.gz"
    if not file.exists():
        pytest.skip(f"needs {file.name} of ../shared/data")
    csv.field_size_limit(1 << 24)
    with gzip.open(file, "rt") as lines:
        structures = [core.Structure.from_str(row["cif"], "cif") for row in itertools.islice(csv.DictReader(lines), 48)]
    atoms, rows = check(structures, 1e-6)
    assert 0.8 * atoms < rows <= share * atoms
