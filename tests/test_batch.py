"""CrystalBatch: what it refuses, and what it can do: change its dtype and device, join others."""

import re
from typing import Any

import pytest
import torch
from crystals import DISORDERED, NUM_ELEMENTS, occupancies

import crystalformer as cf


def small_batch(dtype: torch.dtype = torch.float32, species: list[int] | None = None) -> cf.CrystalBatch:
    numbers = torch.tensor(species or [11, 17, 14])
    positions = torch.arange(9, dtype=dtype).reshape(3, 3) / 3
    lattice = torch.stack([4 * torch.eye(3, dtype=dtype), 5 * torch.eye(3, dtype=dtype)])
    return cf.CrystalBatch(numbers, positions, lattice, torch.tensor([0, 2, 3]))


def disordered_batch(dtype: torch.dtype = torch.float32) -> cf.CrystalBatch:
    positions = torch.ones(3, 3, dtype=dtype)
    return cf.CrystalBatch(
        occupancies(DISORDERED, dtype), positions, 3 * torch.eye(3, dtype=dtype)[None], torch.tensor([0, 3])
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": [[0.0] * 3] * 3}, TypeError, "positions must be a torch.Tensor, not list"),
        ({"positions": torch.zeros(3, 2)}, ValueError, "positions must have shape (N, 3), not (3, 2)"),
        (
            {"positions": torch.zeros(3, 3, dtype=torch.float16)},
            TypeError,
            "positions must be torch.float32 or torch.float64, not torch.float16",
        ),
        ({"lattice": torch.eye(3)}, ValueError, "lattice must have shape (C=2, 3, 3), not (3, 3)"),
        (
            {"lattice": torch.eye(3).double().repeat(2, 1, 1)},
            TypeError,
            "lattice must be torch.float32, as the other arguments, not torch.float64",
        ),
        ({"ptr": torch.tensor([0, 2])}, ValueError, "ptr must run from 0 to the number of atoms 3, not from 0 to 2"),
        ({"ptr": [0, 2, 3]}, TypeError, "ptr must be a torch.Tensor, not list"),
        ({"species": [11, 17, 14]}, TypeError, "species must be a torch.Tensor, not list"),
        ({"species": torch.tensor([11, 17])}, ValueError, "species must have shape (N=3), not (2,)"),
        (
            {"species": torch.tensor([11, 17, 14], dtype=torch.int32)},
            TypeError,
            "species must be torch.int64, not torch.int32",
        ),
        (
            {"species": torch.tensor([0, 17, 14])},
            ValueError,
            "species must be atomic numbers from 1 to 98, not 0 to 17",
        ),
        ({"species": torch.tensor([1, 99, 2])}, ValueError, "species must be atomic numbers from 1 to 98, not 1 to 99"),
        ({"species": torch.zeros(3, 97)}, ValueError, "species must have shape (N=3, 98), not (3, 97)"),
        (
            {"species": torch.zeros(3, 98).double()},
            TypeError,
            "species must be torch.float32, as the other arguments, not torch.float64",
        ),
    ],
)
def test_direct_construction_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = small_batch()
    arguments = {name: getattr(good, name) for name in ("species", "positions", "lattice", "ptr")}
    with pytest.raises(error, match="^" + re.escape(message)):
        cf.CrystalBatch(**{**arguments, **change})


def test_occupancies() -> None:
    for dtype in (torch.float32, torch.float64):
        shares = small_batch(dtype, species=[1, 98, 14]).occupancies()
        assert shares.dtype == dtype
        assert torch.equal(shares, occupancies([{1: 1.0}, {98: 1.0}, {14: 1.0}], dtype))


def test_to_dtype_and_device() -> None:
    batch = small_batch()
    batch.images = cf.build_images(batch.positions, batch.lattice, batch.ptr, cutoff=4.0)
    double = batch.to(torch.float64)
    assert (double.positions.dtype, double.lattice.dtype) == (torch.float64, torch.float64)
    assert torch.equal(double.positions, batch.positions.double())
    assert torch.equal(double.species, batch.species)
    assert double.ptr.dtype == torch.int64
    assert double.images is batch.images
    assert disordered_batch().to(torch.float64).species.dtype == torch.float64
    for target in ("meta", torch.device("meta")):
        moved = batch.to(target)
        assert {moved.species.device, moved.positions.device, moved.lattice.device, moved.ptr.device} == {
            torch.device("meta")
        }
        assert moved.images is not None
        assert moved.images.device.type == "meta"
    assert small_batch().to("meta").images is None
    with pytest.raises(TypeError, match=r"^positions must be torch.float32 or torch.float64, not torch.bfloat16$"):
        batch.to(torch.bfloat16)


def test_cat() -> None:
    a, b = small_batch(), small_batch(species=[3, 4, 5])
    both = cf.CrystalBatch.cat([a, b])
    assert both.species.tolist() == [11, 17, 14, 3, 4, 5]
    assert both.ptr.tolist() == [0, 2, 3, 5, 6]
    assert torch.equal(both.positions, torch.cat([a.positions, b.positions]))
    assert torch.equal(both.lattice, torch.cat([a.lattice, b.lattice]))
    assert both.images is None


def test_cat_of_ordered_and_disordered() -> None:
    both = cf.CrystalBatch.cat([small_batch(), disordered_batch()])
    assert torch.equal(both.species, occupancies([{11: 1.0}, {17: 1.0}, {14: 1.0}, *DISORDERED]))
    assert both.ptr.tolist() == [0, 2, 3, 6]


def test_cat_joins_images_that_all_have() -> None:
    a, b = small_batch(), disordered_batch()
    for x in (a, b):
        x.images = cf.build_images(x.positions, x.lattice, x.ptr, cutoff=4.0)
    both = cf.CrystalBatch.cat([a, b])
    expected = cf.build_images(both.positions, both.lattice, both.ptr, cutoff=4.0)
    assert both.images is not None
    assert both.images.num_images > both.num_atoms
    for name in ("row_ptr", "col", "shift", "ptr"):
        assert torch.equal(getattr(both.images, name), getattr(expected, name))
    b.images = None
    assert cf.CrystalBatch.cat([a, b]).images is None


def test_cat_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^batches must hold at least one CrystalBatch, not none$"):
        cf.CrystalBatch.cat([])


def test_a_batch_without_crystals() -> None:
    empty = cf.CrystalBatch(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0, 3, 3), torch.zeros(1, dtype=torch.int64)
    )
    assert (len(empty), empty.num_atoms) == (0, 0)
    assert empty.occupancies().shape == (0, NUM_ELEMENTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA driver")
def test_pin_memory() -> None:
    pinned = small_batch().pin_memory()
    assert pinned.positions.is_pinned()
    assert pinned.species.is_pinned()
