"""How large a list may be: too many images are refused before they are looked for, large cells are cut into bins."""

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from crystals import KINDS, import_or_skip, pack, random_crystal
from image_lists import cube, image_tuples, of_one
from torch import Tensor

import crystalformer as cf
from crystalformer.data import ImageSettings, build_crystals
from crystalformer.data import crystals as crystals_module
from crystalformer.geometry import images as images_module
from crystalformer.geometry.limits import Extent

HAS_CPU = cf.available_backends()["cpu"] is True
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="the compiled CPU kernels are not here")


@pytest.fixture
def builder(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The lists of each backend in turn."""
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: backend)
    return backend


# What is refused ------------------------------------------------------------------------------------------------------

TOO_MANY = (
    r"images must number at most max_images=134217728, but there are about {}, most of them within {} Å of the atoms"
)


@pytest.mark.parametrize(
    ("crystal", "options", "number", "radius"),
    [
        (cube(0.01), {}, r"3\.\d+e\+10", r"19\.\d+"),
        (cube(0.001), {"every_pair": True}, r".*e\+1\d", r".*"),
        (cube(1.0), {"decay_min": 1e-4}, r"1\.2\d+e\+09", r"66\d\.\d+"),
        (cube(3.0), {"decay_min": 1e-320}, "inf", "inf"),
        (cube(3.0), {"cutoff": 1000.0}, r"1\.55\d+e\+08", "1000"),
        (cube(3.0), {"cutoff": 1e200}, "inf", "inf"),
        (cube(3.0, np.zeros((50, 3))), {"cutoff": 200.0}, r"3\.1\d+e\+09", "200"),
    ],
)
def test_too_many_images_are_refused_at_once(
    crystal: tuple[Tensor, Tensor], options: dict[str, Any], number: str, radius: str, builder: str
) -> None:
    start = time.process_time()
    with pytest.raises(
        ValueError, match="^" + TOO_MANY.format(number, radius) + r" of lattice\[0\]: raise decay_min, tol"
    ):
        of_one(crystal, **options)
    assert time.process_time() - start < 1.0


def test_a_batch_names_its_largest_crystal(builder: str) -> None:
    batch = pack([cube(3.0), cube(0.01), cube(5.0)])
    with pytest.raises(ValueError, match=r"of the atoms of lattice\[1\]"):
        cf.build_images(*batch)
    with pytest.raises(
        ValueError, match=r"^positions must be less than 2\^31 cells apart, but those of lattice\[1\] are"
    ):
        cf.build_images(*pack([cube(3.0), cube(3.0, [[0, 0, 0], [1e30, 0, 0]])]))


@pytest.mark.parametrize("options", [{"cutoff": 6.0}, {"decay_min": 0.5}, {"decay_min": 0.5, "every_pair": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_max_images_bounds_the_list(kind: str, options: dict[str, Any], builder: str) -> None:
    crystal = random_crystal(kind, 2, 5)
    number = of_one(crystal, **options).num_images
    assert of_one(crystal, **options, max_images=32 * number).num_images == number
    with pytest.raises(ValueError, match=rf"^images must number at most max_images={number // 4}, but there are"):
        of_one(crystal, **options, max_images=number // 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_near_the_number(kind: str) -> None:
    """Atoms that happen to be close have more; the first two always are."""
    for seed, radius in ((3, 5.0), (4, 9.0), (5, 14.0)):
        geometry = pack([random_crystal(kind, seed, 8)])
        expected = Extent.of(*geometry, torch.ones(1), 1e-6, 4.0, radius, every_pair=False, all_pairs=False)
        images = cf.build_images(*geometry, cutoff=radius)
        assert 0.25 < float(expected.images) / images.num_images < 2
        farthest = int(images.shift.abs().max())
        assert farthest <= float(expected.cells) < 2 * farthest + 2


@needs_cpu
def test_atoms_at_one_place_are_counted() -> None:
    """The estimate takes them for spread over the cell."""
    crowd = cube(100.0, np.zeros((300, 3)))
    assert of_one(crowd, cutoff=1.0, max_images=90_000).num_images == 90_000
    with pytest.raises(
        ValueError, match=r"max_images=80000, but there are more within 1\.0001 Å of the atoms of lattice\[0"
    ):
        of_one(crowd, cutoff=1.0, max_images=80_000)


@pytest.mark.parametrize("far", [1e7, -1e12])
def test_shifts_are_exact_or_refused(far: float, builder: str) -> None:
    near = image_tuples(of_one(cube(4.0, [[0, 0, 0], [1, 2, 0]]), cutoff=5.0))
    moved = partial(of_one, cube(4.0, [[0, 0, 0], [1 + far, 2, 0]]), cutoff=5.0)
    if abs(far) > 4 * 2**31:
        with pytest.raises(
            ValueError, match=r"^positions must be less than 2\^31 cells apart, but those of lattice\[0\]"
        ):
            moved()
        return
    cells = round(far / 4)
    assert image_tuples(moved()) == [(i, j, n + cells * (i - j), *rest) for i, j, n, *rest in near]
    assert of_one(cube(4.0, [[far**3, 0, 0]]), cutoff=5.0).num_images == 7  # it is where an atom is beside others


@pytest.mark.parametrize("max_images", [0, 2**31, 2.5, True])
def test_max_images_is_an_int32(max_images: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_images must be an integer, at least 1 and at most 2147483647, not "):
        of_one(cube(3.0), max_images=max_images)
    with pytest.raises(ValueError, match=r"^max_vectors must be an integer, at least 1 and at most 2147483647, not "):
        cf.build_wave_vectors(*pack([cube(3.0)])[1:], max_vectors=max_images)


@pytest.mark.parametrize(("edge", "decay_min"), [(3.0, 1e-6), (1e4, 1.21), (1e30, 1.21), (3.0, 1e-300)])
def test_too_many_wave_vectors_are_refused(edge: float, decay_min: float) -> None:
    positions, lattice, ptr = pack([cube(3.0), cube(edge)])
    message = (
        r"^wave vectors must number at most max_vectors=8388608 in each crystal, .* lattice\[\d\] has about .* Å\^-1: "
    )
    with pytest.raises(ValueError, match=message):
        cf.build_wave_vectors(lattice, ptr, decay_min)
    q = torch.ones(2, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        cf.reciprocal_attention(q, q, q, decay_min * q[:, 0], positions, lattice, ptr)


def test_max_vectors_bounds_the_choice() -> None:
    lattice, ptr = pack([random_crystal("skewed", 0, 2)])[1:]
    number = cf.build_wave_vectors(lattice, ptr).num_vectors
    assert cf.build_wave_vectors(lattice, ptr, max_vectors=8 * number).num_vectors == number
    with pytest.raises(ValueError, match=rf"at most max_vectors={number}"):
        cf.build_wave_vectors(lattice, ptr, max_vectors=number)


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_no_float_holds(digits: int, sign: int) -> None:
    with pytest.raises(ValueError, match=r"^decay_min must be larger than 0 and finite, not an integer of \d+ bits$"):
        of_one(cube(3.0), decay_min=sign * 10**digits)


# Datasets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["real", "reciprocal"])
def test_a_dataset_names_the_structure(domain: str) -> None:
    core = import_or_skip("pymatgen.core", reason="structures are pymatgen's")
    cells = [core.Structure(core.Lattice.cubic(a), ["Si"], [[0, 0, 0]]) for a in (3.0, 4.0, 0.01, 1e4)]
    config = cf.CrystalformerConfig(num_blocks=1, model_dim=16, num_heads=2, ff_dim=16, domain=domain)
    bad = {"real": 2, "reciprocal": 3}[domain]
    with pytest.raises(ValueError, match=rf"^structures\[{bad}\]: (images|wave vectors) must number at most "):
        build_crystals(cells, config)


@pytest.mark.parametrize("symmetry_tol", [0.0, 1e-5])
def test_lists_that_memory_does_not_hold_together_are_refused_first(
    symmetry_tol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = import_or_skip("pymatgen.core", reason="structures are pymatgen's")
    cells = [core.Structure(core.Lattice.cubic(a), ["Si"], [[0, 0, 0]]) for a in (3.0, 3.1, 3.2)]
    build = lambda: build_crystals(cells, ImageSettings(), symmetry_tol=symmetry_tol)
    needed = 16 * sum(x.images.num_images for x in build() if x.images is not None)
    merged = 100.0 if symmetry_tol else 1.0  # many images are one entry: how many is not known before
    monkeypatch.setattr(crystals_module, "memory", lambda: 3.0 * merged * needed)
    assert len(build()) == 3
    monkeypatch.setattr(crystals_module, "memory", lambda: 0.5 * needed)
    monkeypatch.setattr(crystals_module, "build_images", None)
    monkeypatch.setattr(crystals_module, "build_orbit_images", None)
    message = r"^images of 3 structures must fit into memory, .* GiB, but about .* of them take .* GiB: raise decay_min"
    with pytest.raises(ValueError, match=message):
        build()


def test_a_predictor_names_the_structure_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    core = import_or_skip("pymatgen.core", reason="structures are pymatgen's")
    from crystalformer.app import predictor

    monkeypatch.setattr(predictor, "STRUCTURES_AT_ONCE", 2)
    cells = [core.Structure(core.Lattice.cubic(a), ["Si"], [[0, 0, 0]]) for a in (3.0, 4.0, 3.0, 4.0, 0.01)]
    config = cf.CrystalformerConfig(num_blocks=1, model_dim=16, num_heads=2, ff_dim=16)
    model = predictor.Predictor(cf.Crystalformer(config))
    with pytest.raises(ValueError, match=r"^structures\[4\]: images must number at most "):
        model.predict(cells)
    with pytest.raises(TypeError, match=r"^structures\[3\] must be a pymatgen Structure"):
        model.encode([*cells[:3], 7])


def test_what_is_too_much_together_is_built_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    core = import_or_skip("pymatgen.core", reason="structures are pymatgen's")
    cells = [core.Structure(core.Lattice.cubic(a), ["Si"], [[0, 0, 0]]) for a in (3.0, 3.1, 3.2)]
    together = build_crystals(cells, ImageSettings())
    most = max(x.images.num_images for x in together if x.images is not None)
    monkeypatch.setattr(crystals_module, "build_images", partial(cf.build_images, max_images=3 * most))
    for x, y in zip(together, build_crystals(cells, ImageSettings()), strict=True):
        assert x.images is not None
        assert y.images is not None
        assert torch.equal(x.images.shift, y.images.shift)


# Large cells ----------------------------------------------------------------------------------------------------------


def stretched(kind: str, atoms: int) -> tuple[Tensor, Tensor]:
    """A crystal of many atoms; a needle or a plate for the kinds of that name, but of a volume that they fill."""
    positions, lattice = random_crystal("cubic" if kind in ("needle", "plate") else kind, 3, atoms)
    stretch = torch.tensor({"needle": [0.3, 0.3, 11.0], "plate": [3.0, 3.0, 0.1]}.get(kind, [1.0, 1.0, 1.0]))
    fractions, lattice = positions @ torch.linalg.inv(lattice), lattice * stretch[:, None]
    return fractions @ lattice, lattice


@needs_cpu
@pytest.mark.parametrize("options", [{"cutoff": 1.5}, {"decay_min": 6.0, "tol": 1e-3, "logit_range": 0.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_cells_cut_into_bins_have_the_same_images(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    crystal = stretched(kind, 300)
    compiled = of_one(crystal, **options)
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "reference")
    plain = of_one(crystal, **options)
    assert image_tuples(compiled) == image_tuples(plain)
    assert compiled.num_images > 300
