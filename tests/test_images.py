"""The image list: which images, in which order, for which geometry, and what is refused.

Other libraries' neighbour lists, and a box of translations, are the oracles.
"""

import itertools
import math
import re
import subprocess
import sys
import time
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
    pack,
    random_crystal,
    rotation,
)
from torch import Tensor
from waits import Waits

import crystalformer as cf
from crystalformer import checks
from crystalformer import images as images_module

Image = tuple[int, int, int, int, int]
SIZES = {"cubic": 4, "skewed": 3, "needle": 2, "plate": 3, "left_handed": 5}
NEAR = 7.0


def image_tuples(images: cf.ImageList) -> list[Image]:
    """(i, j, n0, n1, n2) of each entry, in order."""
    row = torch.repeat_interleave(images.row_ptr.diff())
    table = torch.cat([row[:, None], images.col.long()[:, None], images.shift.long()], 1)
    return [tuple(x) for x in table.tolist()]


def with_self(i: Any, j: Any, shift: Any, num_atoms: int) -> list[Image]:
    """Another library's neighbours as sorted (i, j, n), with each atom itself."""
    table = np.column_stack([i, j, shift]).astype(np.int64)
    itself = np.zeros((num_atoms, 5), dtype=np.int64)
    itself[:, 0] = itself[:, 1] = np.arange(num_atoms)
    return sorted(map(tuple, np.concatenate([table, itself]).tolist()))


def radius_off_shells(positions: Tensor, lattice: Tensor, near: float = NEAR) -> float:
    return between_shells(np.sqrt(box_images(positions, lattice, 1.2 * near)[2]), near)


def of_one(crystal: tuple[Tensor, Tensor], **options: Any) -> cf.ImageList:
    return cf.build_images(*pack([crystal]), **options)


def assert_same(a: cf.ImageList, b: cf.ImageList) -> None:
    for name in ("row_ptr", "col", "shift", "ptr", "cutoff"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name
    for name in ("num_pairs", "decay_min", "tol", "logit_range", "every_pair"):
        assert getattr(a, name) == getattr(b, name), name


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


# Order and form -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["certified", "cutoff", "every_pair"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"certified": {"decay_min": 0.2}, "cutoff": {"cutoff": NEAR}, "every_pair": {"every_pair": True}}[
        request.param
    ]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return pack([random_crystal(kind, 3, n) for kind, n in SIZES.items()])


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


# Time and memory ------------------------------------------------------------------------------------------------------


def test_thirty_two_small_crystals_take_well_under_a_second() -> None:
    batch = pack([random_crystal(("cubic", "left_handed")[seed % 2], seed, 4 + seed % 5) for seed in range(32)])
    # Processor time of one thread: others on the machine, and threads that wait for a core, do not count.
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = time.process_time()
            images = cf.build_images(*batch, cutoff=12.0)
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert images.num_images > 32 * 4 * 100
    assert min(seconds) < 1.0, seconds


def test_a_thousand_atoms_fit_in_four_gib() -> None:
    resource = pytest.importorskip("resource", reason="peak memory is measured with the resource module")
    del resource
    program = """
import resource, sys, torch
import crystalformer as cf
torch.manual_seed(0)
grid = torch.cartesian_prod(*[torch.arange(10.0, dtype=torch.float64)] * 3)
positions = 2.5 * grid + 0.2 * torch.randn(1000, 3, dtype=torch.float64)
geometry = positions, 25.0 * torch.eye(3, dtype=torch.float64)[None], torch.tensor([0, 1000])
images = cf.build_images(*geometry)
n = torch.randn(3, 1000, 8, 16, dtype=torch.float64)
inputs = [*n, torch.full((1000, 8), 0.2).double(), *geometry[:2], torch.randn(8, 16, 64).double()]
inputs = [x.requires_grad_() for x in inputs]
y = cf.periodic_attention(*inputs[:6], images, inputs[6], cf.RadialBasis(), "reference")
assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), inputs))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(images.num_images, peak // (1024 if sys.platform == "darwin" else 1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_images, kib = map(int, done.stdout.split())
    # A sphere of the certified radius, 12.5 Å, holds some 500 atoms of this density.
    assert num_images > 400_000
    assert kib < 4 << 20


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


def test_a_logit_range_close_to_the_largest_still_certifies() -> None:
    """At 12.5 Å a weight exp(-3 d²) is e^-469: scores e^499 apart make it all that counts. At 14 Å it is e^-588."""
    lattice = torch.diag(torch.tensor([3, 3, 60.0], dtype=torch.float64))
    for distance, seen in ((12.5, True), (14.0, False)):
        positions = torch.tensor([[0, 0, 0], [0, 0, distance]], dtype=torch.float64)
        images = of_one((positions, lattice), decay_min=3.0, logit_range=499.0)
        assert ((0, 1, 0, 0, 0) in image_tuples(images)) == seen
        assert (float(images.cutoff) > 12.5) == seen


def test_values_on_other_devices_are_looked_at_only_when_asked() -> None:
    """A look at a GPU's values costs a synchronisation."""
    elsewhere = CUBE.to("meta")
    assert checks.values_visible(CUBE)
    assert not checks.values_visible(elsewhere)
    with cf.debug_checks(True):
        assert checks.values_visible(elsewhere)
        with cf.debug_checks(False):
            assert not checks.values_visible(elsewhere)
        assert checks.values_visible(elsewhere)
    assert not checks.values_visible(elsewhere)


def test_what_is_a_wait_is_noted(waits: Waits) -> None:
    x, mask = torch.arange(4), torch.tensor([True, False, True, True])
    with waits:
        x[mask], mask.nonzero(), int(x[0]), torch.bincount(x), x.repeat_interleave(x), x.tolist()
        x[mask] = 0
        x[x], x[1:].cumsum(0), torch.repeat_interleave(x + 1, output_size=5)
    names = [name.split(".")[0] for name in waits.found]
    assert names == ["index", "nonzero", "_local_scalar_dense", "bincount", "repeat_interleave", "tolist", "index_put_"]


@pytest.mark.parametrize(("options", "number"), [({}, 5), ({"every_pair": True}, 5), ({"cutoff": 6.0}, 4)])
def test_a_gpu_is_waited_for_only_for_sizes(
    batch: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    number: int,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the number of pairs, of points after each axis, and of images kept; whatever the number of crystals."""
    monkeypatch.setattr(images_module, "_backend", lambda device: "reference")
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    with waits:
        cf.build_images(*batch, **options)
    assert len(waits.found) == number, waits.found


@pytest.mark.parametrize("by_pair", [False, True])
def test_packing_for_a_gpu_waits_never(batch: tuple[Tensor, Tensor, Tensor], by_pair: bool, waits: Waits) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from crystalformer.kernels.layout import pack as pack_layout

    images = cf.build_images(*batch, every_pair=True)
    lists = (images.ptr, images.row_ptr, images.col, images.shift, images.num_pairs)
    with waits:
        pack_layout(*batch[:2], *lists, 64, (14.0, 1.0), by_pair)
    assert waits.found == []
