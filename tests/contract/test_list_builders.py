"""The image list is one list, whichever backend builds it: bit for bit, with the same refusals."""

from importlib import import_module
from typing import Any

import pytest
import torch
from crystals import KINDS, pack, random_crystal
from torch import Tensor
from ways import INTERPRETED, Way

import crystalformer as cf
from crystalformer.common import checks
from crystalformer.geometry import images as images_module

LISTS: dict[str, dict[str, Any]] = {
    "certified": {"decay_min": 0.5},
    "cutoff": {"cutoff": 5.0},
    "every_pair": {"decay_min": 1.0, "every_pair": True},
    "loose": {"decay_min": 0.5, "tol": 1e-3, "logit_range": 0.0},
    "strict": {"decay_min": 2.0, "tol": 1e-9, "logit_range": 10.0},
}

REFERENCE = Way("reference", torch.float64)


def built(way: Way, monkeypatch: pytest.MonkeyPatch, geometry: tuple[Tensor, ...], **options: Any) -> cf.ImageList:
    """build_images of a way, of a geometry on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "choose_backend", lambda *_: way.backend)
        return cf.build_images(*(x.to(way.device) for x in geometry), **options)


def assert_list_is_the_references(builder, monkeypatch, geometry, **options):
    here, there = (built(way, monkeypatch, geometry, **options) for way in (REFERENCE, builder))
    for name in ("row_ptr", "col", "shift", "ptr"):
        found, expected = getattr(there, name).cpu(), getattr(here, name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    torch.testing.assert_close(there.cutoff.cpu(), here.cutoff, rtol=1e-12, atol=0.0)
    assert there.num_images > 0
    for name in ("num_pairs", "decay_min", "tol", "logit_range", "every_pair"):
        assert getattr(there, name) == getattr(here, name)


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists(options, builder, monkeypatch):
    geometry = pack([random_crystal(kind, 1, 1 + k % 3) for k, kind in enumerate(KINDS)])
    assert_list_is_the_references(builder, monkeypatch, geometry, **options)


@pytest.mark.parametrize(
    "options", [{"decay_min": 0.7}, {"decay_min": 0.7, "every_pair": True}, {"cutoff": 7.0}], ids=str
)
def test_image_lists_of_random_cells(options, builder, monkeypatch):
    """Many on the CPU, whose kernels are fast. Compiled, Triton's have the library's own launch, without fused products
    and sums: kernels/launch.py says why."""
    if INTERPRETED and builder.backend == "triton":  # large blocks are faster in the interpreter
        module = import_module("crystalformer.kernels.images")
        monkeypatch.setattr(module, "image_blocks", lambda *_: {"BJ": 8, "BC": 256, "num_warps": 4})
    for seed in range(12 if builder.backend == "cpu" else 1):
        sizes = enumerate(KINDS)
        geometry = pack([random_crystal(kind, 10 + seed, 1 + (seed + k) % 5) for k, kind in sizes])
        assert_list_is_the_references(builder, monkeypatch, geometry, **options)


def test_image_list_of_a_large_cell(builder, monkeypatch):
    assert_list_is_the_references(builder, monkeypatch, pack([random_crystal("cubic", 0, 66)]), cutoff=3.0)


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists_of_nothing(options, builder, monkeypatch):
    images = built(builder, monkeypatch, pack([]), **options)
    assert (images.num_images, images.num_atoms, images.num_pairs) == (0, 0, 0)
    assert images.row_ptr.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": float("nan")}, r"positions must be finite, but positions\[1, 2\] is nan"),
        ({"positions": float("inf")}, r"positions must be finite, but positions\[1, 2\] is inf"),
        ({"lattice": float("nan")}, r"lattice must be finite, but lattice\[1, 1, 1\] is nan"),
        ({"lattice": 0.0}, r"lattice must have a volume, but lattice\[1\] is singular"),
        ({"lattice": 1e-9}, r"images must number at most max_images=134217728, but there are about "),
        ({"positions": 1e30}, r"positions must be less than 2\^31 cells apart, but those of lattice\[0\] are "),
    ],
)
@pytest.mark.parametrize("options", list(LISTS.values())[:3], ids=list(LISTS)[:3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
def test_image_lists_of_no_geometry(change, message, options, builder, monkeypatch):
    """With Triton found by the kernels, at the one wait: values on a GPU are not looked at before. Every loop ends."""
    positions, lattice, ptr = pack([random_crystal("cubic", 1, n) for n in (2, 1)])
    if "lattice" in change:
        lattice[1] = torch.eye(3)
        lattice[1, 1, 1] = change["lattice"]
        lattice[1] *= 1e-3 if change["lattice"] == 1e-9 else 1
    else:
        positions[1, 2] = change["positions"]
    with monkeypatch.context() as patch:
        if builder.backend == "triton":
            patch.setattr(checks, "values_visible", lambda x: checks._check_values_on_gpu)  # as on a GPU
        with pytest.raises(ValueError, match="^" + message):
            built(builder, monkeypatch, (positions, lattice, ptr), **options)
