"""Lists know what they were built for and check themselves. That ops refuse others: contract/test_refused_lists.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crystals import pack, random_crystal
from problems import MIXED, Problem, problem
from torch import Tensor

import crystalformer as cf
from crystalformer.attention.settings import Settings
from crystalformer.common import checks
from crystalformer.common.tensor_struct import join_words

X = problem(every_pair=True)
CPU = pytest.mark.skipif(cf.available_backends()["cpu"] is not True, reason="the compiled CPU kernels are not here")


def problem_of(seed: int, sizes: tuple[int, ...] = (1, 3, 2), kind: str = "cubic") -> Problem:
    return problem(tuple((kind, n) for n in sizes), seed=seed, every_pair=True)


# What a list was built for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (lambda p, cell: (p + 40.0, cell), 0.0),
        (lambda p, cell: (p @ TURN, cell @ TURN), 0.0),
        (lambda p, cell: (-p, -cell), 0.0),
        (lambda p, cell: (p.float(), cell.float()), 1e-5),
        (lambda p, cell: (1.001 * p, 1.001 * cell), 0.02),
        (lambda p, cell: (p + spoil(p, 0.01), cell), 0.02),
    ],
    ids=["shifted", "turned", "inverted", "rounded", "strained", "moved"],
)
def test_what_changes_no_distance_is_no_movement(change: Callable, moved: float):
    """The bound is not far above what happens, and zero where nothing does."""
    positions, lattice = change(X.positions, X.lattice)
    reach = torch.full((3,), 10.0, dtype=torch.float64)
    found = X.images.geometry.movement(positions, lattice, X.ptr, reach)
    assert bool((found <= moved + 1e-12).all())
    assert float(found.max()) >= moved / 4 or moved == 1e-5
    assert bool((X.images.bearable > 0.005).all())


TURN = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]


def spoil(p: Tensor, by: float) -> Tensor:
    x = torch.zeros_like(p)
    x[2, 0] = by
    return x


def test_rounding_is_borne_whatever_the_certificate():
    positions, lattice, ptr = pack([random_crystal("cubic", 1, 3)])
    images = cf.build_images(30 * positions, 30 * lattice, ptr, decay_min=100.0, every_pair=True)
    assert float(images._reach_and_bearable[1].max()) < 1e-5
    images.check_built_for((30 * positions).float(), (30 * lattice).float())
    with pytest.raises(ValueError, match=r"^images must be built for these"):
        images.check_built_for(30 * positions + spoil(positions, 0.01), 30 * lattice)


def test_a_batch_bears_what_each_of_its_crystals_bears():
    """Slow decays have vectors of their own tolerance for each crystal."""
    flat, cube = torch.diag(torch.tensor([2.0, 2.0, 30.0]).double()), 3 * torch.eye(3).double()
    options = {"decay_min": 0.002, "every_pair": True, "reciprocal": True}
    alone = cf.build_images(torch.zeros(1, 3).double(), flat[None], torch.tensor([0, 1]), **options)
    both = torch.stack([flat, cube])
    together = cf.build_images(torch.zeros(2, 3).double(), both, torch.tensor([0, 1, 2]), **options)
    torch.testing.assert_close(together.wave_vectors.bearable[0], alone.wave_vectors.bearable[0])
    decay = torch.full((2, 1), 0.002).double()
    with pytest.raises(ValueError, match=r"^images must be built for this lattice: cell 0 .* call build_images again$"):
        cf.periodic_encoding(decay, torch.zeros(2, 3).double(), both * 1.012, together)


def test_debug_checks_look_at_lists_that_were_packed_before(monkeypatch: pytest.MonkeyPatch):
    x = problem(seed=4)
    moved = [*x.inputs[:4], x.positions + spoil(x.positions, 1.0), *x.inputs[5:]]
    with monkeypatch.context() as patch:
        patch.setattr(checks, "values_visible", lambda _: False)  # as on a GPU
        x.attention(*moved)
    with pytest.raises(ValueError, match=r"^images must be built for these"):
        x.attention(*moved)


def test_lists_of_parts_and_copies_know_their_geometry():
    parts = [cf.build_images(*pack([random_crystal(kind, 0, n)]), decay_min=0.5) for kind, n in MIXED]
    whole = cf.ImageList.cat(parts)
    assert whole.geometry is not None
    torch.testing.assert_close(whole.geometry.positions, torch.cat([x.geometry.positions for x in parts]))
    strangers = [dataclasses.replace(x, geometry=None) for x in parts]
    assert cf.ImageList.cat(strangers).geometry is None
    with pytest.raises(ValueError, match=r"^lists must all know what they were built for, their geometry, or none of"):
        cf.ImageList.cat([parts[0], strangers[1]])  # the batch would be taken for any positions
    unknown = dataclasses.replace(X.images, geometry=None)
    unknown.check_built_for(X.positions * 2, X.lattice)  # any positions are taken
    moved = X.positions.clone()
    images = cf.build_images(moved, X.lattice, X.ptr)
    moved += 1.0
    moved[0] += 1.0
    assert torch.equal(images.geometry.positions, X.positions), "the list keeps a copy"


# Lists that are none --------------------------------------------------------------------------------------------------


MADE: list[tuple[str, Any, type[Exception], str]] = [
    ("col", [0], TypeError, "col must be a torch.Tensor, not list"),
    ("col", X.images.col.long(), TypeError, "col must be torch.int32, not torch.int64"),
    ("shift", X.images.shift[1:], ValueError, r"shift must have shape \(M=\d+, 3\), not \(\d+, 3\)"),
    ("shift", X.images.shift.long(), TypeError, "shift must be torch.int32, as the other arguments, not torch.int64"),
    (
        "row_ptr",
        X.images.row_ptr + 1,
        ValueError,
        r"row_ptr must run from 0 to the number of images \d+, not",
    ),
    ("row_ptr", X.images.row_ptr.int(), TypeError, "row_ptr must be torch.int64, not torch.int32"),
    ("row_ptr", X.images.row_ptr[[0, 2, 1, 3, 4, 5, 6]], ValueError, "row_ptr must never fall, but it is"),
    ("ptr", torch.tensor([0, 7]), ValueError, "ptr must run from 0 to the number of atoms 6, not from 0 to 7"),
    ("cutoff", X.images.cutoff[:1], ValueError, r"cutoff must have shape \(C=3\), not \(1,\)"),
    ("tol", float("nan"), ValueError, "tol must be larger than 0 and smaller than 1, not nan"),
    ("decay_min", -1.0, ValueError, r"decay_min must be larger than 0 and finite, not -1\.0"),
    ("geometry", 3, TypeError, "geometry must be Geometry, not int"),
    ("geometry", problem_of(0, (1, 1)).images.geometry, ValueError, r"geometry.positions must have shape \(N=6, 3\)"),
    ("crossover", 5, TypeError, "crossover must be a torch.Tensor, not int"),
    ("ptr", X.ptr.to("meta"), ValueError, "ptr must be on cpu, as the other arguments, not on meta"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), MADE, ids=[f"{m[0]}-{i}" for i, m in enumerate(MADE)])
def test_a_list_checks_itself_when_made(name: str, value: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        dataclasses.replace(X.images, **{name: value})


def test_row_ptr_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"^ptr must run from 0 to the number of atoms 7"):
        dataclasses.replace(X.images, row_ptr=torch.cat([X.images.row_ptr, X.images.row_ptr[-1:]]))


WAVES = cf.build_wave_vectors(X.lattice, X.ptr, 0.5)
BAD_WAVES: list[tuple[str, Any, str]] = [
    ("g_ptr", WAVES.g_ptr * -1, "g_ptr must run from 0 to the number of vectors"),
    ("g_ptr", WAVES.g_ptr[[0, 2, 1, 3]], "g_ptr must never fall"),
    ("g_ptr", WAVES.g_ptr[:-1], "g_ptr must run from 0 to"),
    ("g", WAVES.g[:-1], "g_ptr must run from 0 to"),
    ("g", WAVES.g.flip(0), "g must begin with the zero vector in each crystal"),
    ("tol", float("nan"), "tol must be at least 0 and at most 1, not nan"),
    ("lattice", X.lattice[:1], r"lattice must have shape \(C=3, 3, 3\), not \(1, 3, 3\)"),
    ("max_atoms", 2, "max_atoms must be 3, that of the largest crystal, not 2"),
    ("max_vectors", 1, r"max_vectors must be \d+, that of the largest crystal, not 1"),
]


def test_joined_wave_vectors_have_the_lattice_of_each():
    joined = cf.WaveVectors.cat([cf.build_wave_vectors(x[None], torch.tensor([0, 2])) for x in X.lattice])
    assert torch.equal(joined.lattice, X.lattice)
    with pytest.raises(ValueError, match=r"^parts must all know what they were built for, their lattice, or none of"):
        cf.WaveVectors.cat([joined, dataclasses.replace(joined, lattice=None)])


@pytest.mark.parametrize(("name", "value", "message"), BAD_WAVES)
def test_wave_vectors_check_themselves_when_made(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WAVES, **{name: value})


# Ops called directly --------------------------------------------------------------------------------------------------


def call(x: Problem, lists: tuple[Tensor, ...], settings: Settings | None = None, op: str = "attention") -> Any:
    run = getattr(torch.ops.crystalformer, f"cpu_{op}")
    if op == "encoding":
        inputs = (x.decay, x.edge_weight, x.positions, x.lattice)
        return run(*inputs, *lists, x.images.num_pairs, settings or x.settings)
    return run(*x.op_inputs, *lists, settings or x.settings)


@CPU
def test_a_layout_serves_what_it_was_made_for_alone():
    lists = X.lists("cpu")
    call(X, lists)
    layout, single, other = lists[-1], X.to(torch.float32), problem_of(1)
    moved = dataclasses.replace(X, positions=X.positions + spoil(X.positions, 1e-9))
    wider = X.settings._replace(width=2 * X.basis.width)
    made = r"^layout must be made by cpu_layout for "
    for problem_, layout_, settings, message in [
        (X, layout[:8], None, "layout must be what cpu_layout makes of the image list, not 8 elements"),
        (X, layout.float(), None, "layout must be what cpu_layout makes"),
        (X, layout[:-64], None, r"layout must have \d+ bytes, not \d+"),
        (X, torch.zeros_like(layout), None, made + "these kernels, but it was made by something else"),
        (single, layout, None, made + "this dtype, but it was made for another"),
        (X, X.lists("cpu", by_pair=True)[-1], None, made + "this op, but it was made for another"),
        (X, other.lists("cpu")[-1], None, made + "this image list, but it was made for another"),
        (moved, layout, None, made + "these positions and lattices, but it was made for others"),
        (X, layout, wider, made + "this basis and tol, but it was made for others"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(problem_, (*lists[:-1], layout_), settings)
    with pytest.raises(ValueError, match=made + "this op, but it was made for another"):
        call(X, lists, op="encoding")


@CPU
def test_ops_check_the_shapes_they_trust():
    lists = X.lists("cpu")
    for name, value in [
        ("q", X.q[:3]),
        ("k", X.k[:, :, :1]),
        ("v", X.v[:1]),
        ("decay", X.decay[:, :1]),
        ("edge_weight", X.edge_weight[:1]),
        ("positions", X.positions[:, :2]),
        ("lattice", X.lattice[:, :2]),
    ]:
        with pytest.raises(ValueError, match=rf"^{name} must have shape \["):
            call(dataclasses.replace(X, **{name: value}), lists)
    for name, value in [("positions", X.positions[:2]), ("lattice", X.lattice[:1]), ("lattice", X.lattice[0])]:
        with pytest.raises(ValueError, match="must"):
            call(dataclasses.replace(X, **{name: value}), lists)
    packed, layout = lists
    for bad in (torch.nn.functional.pad(packed, (0, 1)), packed[:-1], packed[:4], packed[:0], packed[2:], packed[1:]):
        with pytest.raises(ValueError, match="must"):
            call(X, (bad, layout))
        with pytest.raises(ValueError, match="must"):
            torch.ops.crystalformer.cpu_layout(X.positions, X.lattice, bad, 5, X.settings, False, False)
    with pytest.raises(ValueError, match="settings must be tol, tf32, r_max, width, of_orbits, not"):
        call(X, lists, X.settings[:2])
    build = torch.ops.crystalformer.cpu_images
    good = {"positions": X.positions, "lattice": X.lattice, "ptr": X.ptr, "decay_min": X.lattice[:, 0, 0].abs()}
    settings = (1e-6, 4.0, 0.01, None, False, 10**6)
    for name, bad_values in {
        "positions": (X.positions[:3], X.positions[:, :2], X.positions[0], X.positions * float("nan")),
        "lattice": (X.lattice[:1], X.lattice[0], X.lattice * float("inf")),
        "ptr": (X.ptr[:-1], X.ptr * 0, X.ptr.flip(0), X.ptr - 1, X.ptr * 1000, X.ptr[:0]),
        "decay_min": (good["decay_min"][:1],),
    }.items():
        for value in bad_values:
            with pytest.raises(ValueError, match="must"):
                build(*(good | {name: value}).values(), *settings)
    with pytest.raises(ValueError, match="tol must be larger than 0 and at most 1, not 2"):
        build(*good.values(), 2.0, *settings[1:])
    merge = torch.ops.crystalformer.cpu_orbit_images
    orbits = {"orbit": torch.arange(len(X.positions)), "orbit_ptr": X.ptr, "spread": 1e-5}
    for name, value in (
        ("spread", -1.0),
        ("spread", float("nan")),
        ("orbit_ptr", X.ptr * 1000),
        ("orbit_ptr", X.ptr - 1),
        ("orbit", orbits["orbit"].flip(0)),
        ("orbit", orbits["orbit"][1:]),
        ("orbit", orbits["orbit"] * 0),
    ):
        orbit, orbit_ptr, spread = (orbits | {name: value}).values()
        with pytest.raises(ValueError, match=f"^{name} must"):
            merge(*list(good.values())[:3], orbit, orbit_ptr, good["decay_min"], *settings, spread)
    waves, largest = X.wave_vectors()
    ptr, g_ptr, g = cf.WaveVectors.views(waves, len(X.lattice))
    for bad, message in [
        ((ptr * -1, g_ptr, g), "ptr must run from 0 to 6"),
        ((ptr, g_ptr * -1, g), r"g_ptr must run from 0 to \d+"),
        ((ptr, g_ptr[:-1], g), r"must"),
        ((ptr, g_ptr, g[:-1]), r"g_ptr must run from 0 to \d+"),
        (
            (ptr, g_ptr, g.flatten()[:-1]),
            r"waves must be what packed\(\) makes of a list for .*, but it has",
        ),
        ((ptr, g_ptr, torch.full_like(g, -(1 << 31))), "g must hold integers within 16777216, not -2147483648"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.crystalformer.cpu_reciprocal(*X.inputs[:6], join_words(bad), largest)
