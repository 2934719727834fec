"""The image list: its order and form, lists of batches, and what is refused."""

import itertools
import re
from typing import Any

import pytest
import torch
from crystals import pack, random_crystal
from image_lists import NEAR, SIZES, image_tuples, of_one, one_of_each
from torch import Tensor

import crystalformer as cf


def assert_same(a: cf.ImageList, b: cf.ImageList) -> None:
    for name in ("row_ptr", "col", "shift", "ptr", "cutoff"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name
    for name in ("num_pairs", "decay_min", "tol", "logit_range", "every_pair"):
        assert getattr(a, name) == getattr(b, name), name


# Order and form -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["certified", "cutoff", "every_pair"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"certified": {"decay_min": 0.2}, "cutoff": {"cutoff": NEAR}, "every_pair": {"every_pair": True}}[
        request.param
    ]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return one_of_each()


def test_form(batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    positions, _, ptr = batch
    images = cf.build_images(*batch, **options)
    n, c, m = len(positions), len(ptr) - 1, images.num_images
    assert (images.num_atoms, images.num_crystals) == (n, c)
    assert m > 2 * n
    assert images.device == positions.device
    forms = {"row_ptr": (n + 1,), "col": (m,), "shift": (m, 3), "ptr": (c + 1,), "cutoff": (c,)}
    assert {name: tuple(getattr(images, name).shape) for name in forms} == forms
    dtypes = {
        "row_ptr": torch.int64,
        "col": torch.int32,
        "shift": torch.int32,
        "ptr": torch.int64,
        "cutoff": torch.float64,
    }
    assert {name: getattr(images, name).dtype for name in dtypes} == dtypes
    assert int(images.row_ptr[0]) == 0
    assert int(images.row_ptr[-1]) == m
    assert (images.row_ptr.diff() > 0).all()
    assert images.num_pairs == sum(k * k for k in SIZES.values())
    # Every image is of an atom of the same crystal.
    crystal = torch.repeat_interleave(ptr.diff())
    row = torch.repeat_interleave(images.row_ptr.diff())
    assert torch.equal(crystal[row], crystal[images.col.long()])


def test_sorted_without_repetition(batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    found = image_tuples(cf.build_images(*batch, **options))
    assert all(a < b for a, b in itertools.pairwise(found))


def test_symmetric(batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    found = set(image_tuples(cf.build_images(*batch, **options)))
    assert {(j, i, -x, -y, -z) for i, j, x, y, z in found} == found


def test_each_atom_itself(batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    images = cf.build_images(*batch, **options)
    itself = [x for x in image_tuples(images) if x[0] == x[1] and x[2:] == (0, 0, 0)]
    assert itself == [(i, i, 0, 0, 0) for i in range(images.num_atoms)]


def test_a_second_call_gives_the_same_bits(batch: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
    assert_same(cf.build_images(*batch, **options), cf.build_images(*(x.clone() for x in batch), **options))


def test_no_gradient_through_the_list(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    positions, lattice, ptr = batch
    images = cf.build_images(positions.requires_grad_(), lattice.requires_grad_(), ptr)
    assert not images.cutoff.requires_grad


def test_fp32_coordinates_give_the_images_of_their_values(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    positions, lattice, ptr = batch
    single = positions.float(), lattice.float()
    double = single[0].double(), single[1].double()
    assert_same(cf.build_images(*single, ptr), cf.build_images(*double, ptr))


def test_what_a_list_is_certified_for() -> None:
    crystal = random_crystal("cubic", 0, 2)
    default = of_one(crystal)
    assert (default.decay_min, default.tol, default.logit_range, default.every_pair) == (0.1275, 1e-6, 4.0, False)
    other = of_one(crystal, decay_min=1, tol=1e-3, logit_range=0, every_pair=True)
    assert (other.decay_min, other.tol, other.logit_range, other.every_pair) == (1.0, 1e-3, 0.0, True)
    chosen = of_one(crystal, cutoff=5)
    assert (chosen.decay_min, chosen.tol, chosen.logit_range, chosen.every_pair) == (None, None, None, False)
    assert chosen.cutoff.tolist() == [5.0]


# Batches --------------------------------------------------------------------------------------------------------------


def test_cat_of_crystals_is_the_list_of_their_batch(options: dict[str, Any]) -> None:
    crystals = [random_crystal(kind, 6, n) for kind, n in SIZES.items()]
    assert_same(cf.ImageList.cat([of_one(x, **options) for x in crystals]), cf.build_images(*pack(crystals), **options))


def test_cat_of_batches() -> None:
    crystals = [random_crystal("cubic", seed, 1 + seed) for seed in range(4)]
    parts = [cf.build_images(*pack(crystals[:3])), of_one(crystals[3]), cf.build_images(*pack([]))]
    assert_same(cf.ImageList.cat(parts), cf.build_images(*pack(crystals)))
    assert_same(cf.ImageList.cat(parts[:1]), parts[0])


def test_cat_certifies_what_all_parts_do() -> None:
    crystal = random_crystal("cubic", 0, 2)
    a = of_one(crystal, decay_min=0.3, tol=1e-8, logit_range=6.0, every_pair=True)
    b = of_one(crystal, decay_min=0.1, tol=1e-4, logit_range=2.0)
    for both in (cf.ImageList.cat([a, b]), cf.ImageList.cat([b, a])):
        assert (both.decay_min, both.tol, both.logit_range, both.every_pair) == (0.3, 1e-4, 2.0, False)
    assert cf.ImageList.cat([a, a]).every_pair
    chosen = cf.ImageList.cat([a, of_one(crystal, cutoff=4.0)])
    assert (chosen.decay_min, chosen.tol, chosen.logit_range, chosen.every_pair) == (None, None, None, False)


def test_cat_refuses() -> None:
    images = of_one(random_crystal("cubic", 0, 1))
    with pytest.raises(ValueError, match=r"^lists must hold at least one ImageList, not none$"):
        cf.ImageList.cat([])
    with pytest.raises(ValueError, match=r"^lists must be on one device, not on \['cpu', 'meta'\]$"):
        cf.ImageList.cat([images, images.to("meta")])


def test_to_moves_every_tensor() -> None:
    images = of_one(random_crystal("cubic", 0, 2))
    moved = images.to("meta")
    assert moved.device.type == "meta"
    for name in ("row_ptr", "col", "shift", "ptr", "cutoff"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(images, name).shape
    assert (moved.tol, moved.num_pairs) == (images.tol, images.num_pairs)
    assert_same(images.to(torch.device("cpu"), non_blocking=True), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA driver")
def test_pin_memory() -> None:
    images = of_one(random_crystal("cubic", 0, 2))
    pinned = images.pin_memory()
    assert pinned.col.is_pinned()
    assert_same(pinned, images)


def test_empty_batch(options: dict[str, Any]) -> None:
    images = cf.build_images(*pack([]), **options)
    assert (images.num_images, images.num_atoms, images.num_crystals, images.num_pairs) == (0, 0, 0, 0)
    assert images.row_ptr.tolist() == [0]
    assert images.shift.shape == (0, 3)


# What is refused ------------------------------------------------------------------------------------------------------

TWO = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
CUBE = 3 * torch.eye(3)[None]
PTR = torch.tensor([0, 2])
NOT_A_NUMBER = torch.tensor([[0.0, 0, 0], [1, 1, float("nan")]])
FLAT = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": [[0.0, 0, 0]]}, TypeError, "positions must be a torch.Tensor, not list"),
        ({"positions": TWO[:, :2]}, ValueError, "positions must have shape (N, 3), not (2, 2)"),
        ({"positions": TWO[0]}, ValueError, "positions must have shape (N, 3), not (3,)"),
        ({"positions": TWO.long()}, TypeError, "positions must be torch.float32 or torch.float64, not torch.int64"),
        ({"positions": TWO.half()}, TypeError, "positions must be torch.float32 or torch.float64, not torch.float16"),
        ({"positions": NOT_A_NUMBER}, ValueError, "positions must be finite, but positions[1, 2] is nan"),
        ({"lattice": None}, TypeError, "lattice must be a torch.Tensor, not NoneType"),
        ({"lattice": CUBE[0]}, ValueError, "lattice must have shape (C=1, 3, 3), not (3, 3)"),
        ({"lattice": CUBE.repeat(2, 1, 1)}, ValueError, "lattice must have shape (C=1, 3, 3), not (2, 3, 3)"),
        (
            {"lattice": CUBE.double()},
            TypeError,
            "lattice must be torch.float32, as the other arguments, not torch.float64",
        ),
        ({"lattice": CUBE.to("meta")}, ValueError, "lattice must be on cpu, as the other arguments, not on meta"),
        ({"lattice": CUBE * float("inf")}, ValueError, "lattice must be finite, but lattice[0, 0, 0] is inf"),
        (
            {"lattice": FLAT},
            ValueError,
            "lattice must have a volume, but lattice[0] is singular: [[1.0, 0.0, 0.0], ",
        ),
        ({"lattice": 0 * CUBE}, ValueError, "lattice must have a volume, but lattice[0] is singular: [[0.0, "),
        ({"ptr": [0, 2]}, TypeError, "ptr must be a torch.Tensor, not list"),
        ({"ptr": PTR.int()}, TypeError, "ptr must be torch.int64, not torch.int32"),
        ({"ptr": PTR[None]}, ValueError, "ptr must have shape (C+1), not (1, 2)"),
        ({"ptr": PTR[:0]}, ValueError, "ptr must have shape (C+1), not (0,)"),
        ({"ptr": PTR + 1}, ValueError, "ptr must run from 0 to the number of atoms 2, not from 1 to 3"),
        ({"ptr": PTR // 2}, ValueError, "ptr must run from 0 to the number of atoms 2, not from 0 to 1"),
        (
            {"ptr": torch.tensor([0, 2, 2])},
            ValueError,
            "ptr must rise by at least one atom a crystal, but it is [0, 2, 2]",
        ),
        ({"ptr": PTR.to("meta")}, ValueError, "ptr must be on cpu, as positions, not on meta"),
        ({"decay_min": 0}, ValueError, "decay_min must be larger than 0 and finite, not 0"),
        ({"decay_min": -1.0}, ValueError, "decay_min must be larger than 0 and finite, not -1.0"),
        ({"decay_min": float("nan")}, ValueError, "decay_min must be larger than 0 and finite, not nan"),
        ({"decay_min": float("inf")}, ValueError, "decay_min must be larger than 0 and finite, not inf"),
        ({"decay_min": "1"}, TypeError, "decay_min must be a number, not str"),
        ({"tol": 0.0}, ValueError, "tol must be larger than 0 and smaller than 1, not 0.0"),
        ({"tol": 1.0}, ValueError, "tol must be larger than 0 and smaller than 1, not 1.0"),
        ({"tol": None}, TypeError, "tol must be a number, not NoneType"),
        ({"logit_range": -0.5}, ValueError, "logit_range must be at least 0 and smaller than 500, not -0.5"),
        ({"logit_range": 1000.0}, ValueError, "logit_range must be at least 0 and smaller than 500, not 1000.0"),
        ({"logit_range": True}, TypeError, "logit_range must be a number, not bool"),
        ({"cutoff": 0.0}, ValueError, "cutoff must be larger than 0 and finite, not 0.0"),
        ({"cutoff": float("inf")}, ValueError, "cutoff must be larger than 0 and finite, not inf"),
        ({"cutoff": TWO}, TypeError, "cutoff must be a number, not Tensor"),
        (
            {"cutoff": 5.0, "every_pair": True},
            ValueError,
            "every_pair must be False when a cutoff is given: each pair has a cutoff of its own",
        ),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"positions": TWO, "lattice": CUBE, "ptr": PTR, **change}
    with pytest.raises(error, match="^" + re.escape(message)):
        cf.build_images(**arguments)


def test_the_geometry_that_the_refusals_change_is_accepted() -> None:
    assert cf.build_images(TWO, CUBE, PTR).num_images > 100
