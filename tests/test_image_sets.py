"""Which images a list holds: those that other libraries find, and the same ones however the crystal is written.

Other libraries' neighbour lists, and a box of translations, are the oracles.
"""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from crystals import (
    KINDS,
    aflow_prototypes,
    between_shells,
    box_images,
    geometry,
    import_or_skip,
    random_crystal,
    rotation,
)
from image_lists import NEAR, SIZES, Image, image_tuples, of_one
from torch import Tensor


def with_self(i: Any, j: Any, shift: Any, num_atoms: int) -> list[Image]:
    """Another library's neighbours as sorted (i, j, n), with each atom itself."""
    table = np.column_stack([i, j, shift]).astype(np.int64)
    itself = np.zeros((num_atoms, 5), dtype=np.int64)
    itself[:, 0] = itself[:, 1] = np.arange(num_atoms)
    return sorted(map(tuple, np.concatenate([table, itself]).tolist()))


def radius_off_shells(positions: Tensor, lattice: Tensor, near: float = NEAR) -> float:
    return between_shells(np.sqrt(box_images(positions, lattice, 1.2 * near)[2]), near)


# The same set as other libraries --------------------------------------------------------------------------------------


def assert_vesin_agrees(positions: Tensor, lattice: Tensor) -> None:
    vesin = import_or_skip("vesin", reason="vesin is an oracle for the set of images")
    radius = radius_off_shells(positions, lattice)
    i, j, shift = vesin.NeighborList(cutoff=radius, full_list=True).compute(
        points=positions.numpy(), box=lattice.numpy(), periodic=True, quantities="ijS"
    )
    assert len(i) > 0
    found = image_tuples(of_one((positions, lattice), cutoff=radius))
    assert found == with_self(i, j, shift, len(positions))


def assert_pymatgen_agrees(structure: Any) -> None:
    positions, lattice = geometry(structure)
    radius = radius_off_shells(positions, lattice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        i, j, shift, _ = structure.get_neighbor_list(radius)
    assert len(i) > 0
    found = image_tuples(of_one((positions, lattice), cutoff=radius))
    assert found == with_self(i, j, shift, len(positions))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_vesin_has_the_same_images_of_random_cells(kind: str, seed: int) -> None:
    assert_vesin_agrees(*random_crystal(kind, seed, SIZES[kind]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_pymatgen_has_the_same_images_of_random_cells(kind: str, seed: int) -> None:
    core = import_or_skip("pymatgen.core", reason="pymatgen is an oracle for the set of images")
    positions, lattice = random_crystal(kind, seed, SIZES[kind])
    species = ["Si"] * len(positions)
    assert_pymatgen_agrees(core.Structure(lattice.numpy(), species, positions.numpy(), coords_are_cartesian=True))


def test_vesin_has_the_same_images_of_prototypes() -> None:
    for structure in aflow_prototypes(limit=30, max_atoms=16):
        assert_vesin_agrees(*geometry(structure))


def test_pymatgen_has_the_same_images_of_prototypes() -> None:
    for structure in aflow_prototypes(limit=30, max_atoms=16):
        assert_pymatgen_agrees(structure)


@pytest.mark.parametrize("kind", KINDS)
def test_the_certified_cutoff_keeps_all_images_within_it(kind: str) -> None:
    positions, lattice = random_crystal(kind, 2, SIZES[kind])
    images = of_one((positions, lattice), decay_min=0.2)
    pair, shift, _ = box_images(positions, lattice, float(images.cutoff))
    n = len(positions)
    assert image_tuples(images) == list(map(tuple, np.column_stack([pair // n, pair % n, shift]).tolist()))


def test_a_logit_range_close_to_the_largest_still_certifies() -> None:
    """At 12.5 Å a weight exp(-3 d²) is e^-469: scores e^499 apart make it all that counts. At 14 Å it is e^-588."""
    lattice = torch.diag(torch.tensor([3, 3, 60.0], dtype=torch.float64))
    for distance, seen in ((12.5, True), (14.0, False)):
        positions = torch.tensor([[0, 0, 0], [0, 0, distance]], dtype=torch.float64)
        images = of_one((positions, lattice), decay_min=3.0, logit_range=499.0)
        assert ((0, 1, 0, 0, 0) in image_tuples(images)) == seen
        assert (float(images.cutoff) > 12.5) == seen


# Invariance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["cutoff", "certified", "every_pair"])
def test_rotation_mirror_and_translation_keep_the_images(kind: str, choice: str) -> None:
    positions, lattice = random_crystal(kind, 4, SIZES[kind])
    options = {"certified": {"decay_min": 0.2}, "every_pair": {"decay_min": 0.2, "every_pair": True}}.get(
        choice, {"cutoff": radius_off_shells(positions, lattice)}
    )
    found = image_tuples(of_one((positions, lattice), **options))
    turn = torch.from_numpy(rotation(np.random.default_rng(0)))
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    for motion in (turn, mirror, turn @ mirror):
        assert image_tuples(of_one((positions @ motion, lattice @ motion), **options)) == found
    move = torch.tensor([1.2, -30.0, 7.7], dtype=torch.float64)
    assert image_tuples(of_one((positions + move, lattice), **options)) == found


@pytest.mark.parametrize("kind", KINDS)
def test_another_cell_of_the_same_crystal_relabels_the_images(kind: str) -> None:
    """Rows U·L of the lattice, U unimodular and of determinant -1, so the other handedness: n becomes n·U^-1."""
    positions, lattice = random_crystal(kind, 5, SIZES[kind])
    u = torch.tensor([[0, 1, 0], [1, 2, 0], [-1, 0, 1]], dtype=torch.float64)
    assert round(float(torch.linalg.det(u))) == -1
    radius = radius_off_shells(positions, lattice)
    found = image_tuples(of_one((positions, lattice), cutoff=radius))
    other = image_tuples(of_one((positions, u @ lattice), cutoff=radius))
    assert len(other) > len(positions)
    back = [(i, j, *(round(x) for x in (torch.tensor(n).double() @ u).tolist())) for i, j, *n in other]
    assert sorted(back) == found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_cutoff_on_a_shell_keeps_the_shell(dtype: torch.dtype, offset: float) -> None:
    """fcc has 12, 6, 24, 12 neighbours at a·sqrt(k/2), k = 1 to 4, whatever rounding does to each distance."""
    lattice = 3.61 * torch.from_numpy(rotation(np.random.default_rng(0)))
    corners = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=torch.float64) / 2
    crystal = (corners @ lattice + offset).to(dtype), lattice.to(dtype)
    for k, neighbours in ((1, 12), (2, 18), (3, 42), (4, 54)):
        images = of_one(crystal, cutoff=3.61 * math.sqrt(k / 2))
        assert images.row_ptr.diff().tolist() == [1 + neighbours] * 4
    assert of_one(crystal, cutoff=3.61 * math.sqrt(0.5) - 1e-3).num_images == 4
