"""The image list of the Triton kernels, and the layout they pack it in: on a GPU, or in Triton's interpreter.

`make gpu` and test_triton.py run this file; pytest does not collect it by itself.
"""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from crystals import KINDS, pack, random_crystal
from problems import problem, relative_error
from triton_device import DEVICE, MARKS, on_device

import crystalformer as cf
from crystalformer.common import checks
from crystalformer.geometry import images as images_module

pytestmark = MARKS

LISTS = {
    "certified": {"decay_min": 0.5},
    "cutoff": {"cutoff": 5.0},
    "every_pair": {"decay_min": 1.0, "every_pair": True},
    "loose": {"decay_min": 0.5, "tol": 1e-3, "logit_range": 0.0},
    "strict": {"decay_min": 2.0, "tol": 1e-9, "logit_range": 10.0},
}


def assert_list_is_the_reference(monkeypatch, geometry, **options):
    lists = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        monkeypatch.setattr(images_module, "choose_backend", lambda *_, backend=backend: backend)
        lists.append(cf.build_images(*(x.to(device) for x in geometry), **options))
    here, there = lists
    for name in ("row_ptr", "col", "shift", "ptr"):
        found, expected = getattr(there, name).cpu(), getattr(here, name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    torch.testing.assert_close(there.cutoff.cpu(), here.cutoff, rtol=1e-12, atol=0.0)
    assert there.num_images > 0
    for name in ("num_pairs", "decay_min", "tol", "logit_range", "every_pair"):
        assert getattr(there, name) == getattr(here, name)


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists(options, monkeypatch):
    geometry = pack([random_crystal(kind, 1, 1 + k % 3) for k, kind in enumerate(KINDS)])
    assert_list_is_the_reference(monkeypatch, geometry, **options)


@pytest.mark.parametrize("seed", range(2))
def test_image_lists_of_random_cells(seed, monkeypatch):
    if DEVICE == "cpu":  # large blocks are faster in the interpreter
        module = import_module("crystalformer.kernels.images")
        monkeypatch.setattr(module, "image_blocks", lambda *_: {"BJ": 8, "BC": 256, "num_warps": 4})
    geometry = pack([random_crystal(kind, 10 + seed, 1 + (seed + k) % 5) for k, kind in enumerate(KINDS)])
    for options in ({"decay_min": 0.7}, {"decay_min": 0.7, "every_pair": True}):
        assert_list_is_the_reference(monkeypatch, geometry, **options)


def test_image_list_of_a_large_cell(monkeypatch):
    assert_list_is_the_reference(monkeypatch, pack([random_crystal("cubic", 0, 66)]), cutoff=3.0)


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists_of_nothing(options, monkeypatch):
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "triton")
    images = cf.build_images(*(x.to(DEVICE) for x in pack([])), **options)
    assert (images.num_images, images.num_atoms, images.num_pairs) == (0, 0, 0)
    assert images.row_ptr.tolist() == [0]


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists_wait_once(options, waits, monkeypatch):
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    geometry = [x.to(DEVICE) for x in pack([random_crystal("cubic", 1, 2), random_crystal("cubic", 2, 1)])]
    with waits:
        cf.build_images(*geometry, **{**options, "decay_min": 3.0})
    assert waits.found == ["tolist"]


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
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_image_lists_of_no_geometry(change, message, options, monkeypatch):
    """Found by the kernels, at the one wait: values on a GPU are not looked at before. Every loop ends."""
    positions, lattice, ptr = (x.to(DEVICE) for x in pack([random_crystal("cubic", 1, n) for n in (2, 1)]))
    if "lattice" in change:
        lattice[1] = torch.eye(3)
        lattice[1, 1, 1] = change["lattice"]
        lattice[1] *= 1e-3 if change["lattice"] == 1e-9 else 1
    else:
        positions[1, 2] = change["positions"]
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "triton")
    with monkeypatch.context() as patch:
        patch.setattr(checks, "values_visible", lambda x: checks._check_values_on_gpu)  # as on a GPU
        with pytest.raises(ValueError, match="^" + message):
            cf.build_images(positions, lattice, ptr, **options)


@pytest.mark.parametrize("cutoff", [None, 2.0])
def test_opcheck_of_image_lists(cutoff):
    geometry = (x.to(DEVICE) for x in pack([random_crystal("cubic", 1, 1)]))
    decay = torch.full((1,), 20.0, dtype=torch.float64, device=DEVICE)
    operator = torch.ops.crystalformer.triton_images.default
    torch.library.opcheck(operator, (*geometry, decay, 1e-2, 0.0, 0.01, cutoff, False, 1 << 20))


def test_layout_holds_every_image_once():
    module = import_module("crystalformer.kernels.layout")

    for kinds in ((("cubic", 1),), (("skewed", 3),), (("cubic", 12),)):
        x = on_device(problem(kinds=kinds))
        lists = (x.images.packed(), x.images.num_pairs)
        packed = module.pack(x.positions, x.lattice, *lists, 5, x.settings, by_pair=False)
        layout = module.unpack(packed, len(x.q), x.images.num_images, 5)
        group, groups = layout.shape
        shells = layout.records[:, 2 * groups :].contiguous().view(torch.float32).unflatten(1, (2, -1))
        distances, log_count = (part.flatten() for part in shells.unbind(1))
        places, images = layout.place.unique(return_counts=True)
        assert torch.equal((distances < module.FAR).nonzero()[:, 0], places)
        assert torch.equal(distances[layout.place.long()], distances[layout.mirror.long()])
        torch.testing.assert_close(log_count[places].exp2(), images.float())
        assert (images.max() > 1) == (len(x.q) < 12)  # among twelve atoms at random no two distances are one
        tiles = layout.records[:, groups : 2 * groups].flatten()
        real = tiles >= 0
        assert torch.equal(tiles[tiles[real].long()], real.nonzero()[:, 0].int())  # a mirror's mirror is itself
        assert len(layout.records) * group * groups < 12 * x.images.num_images


# The shape that is chosen, and what it may cost over the best: where most pairs have no image, the numbers mislead.
CHOICES = [
    (("skewed", 1), 0.1275, (8, 4), 1.0),
    (("cubic", 40), 0.25, (4, 4), 1.0),
    (("cubic", 60), 0.25, (2, 8), 1.0),
    (("cubic", 150), 0.4, (1, 16), 1.0),
    (("plate", 8), 0.4, (2, 8), 1.45),
    (("needle", 8), 2.0, (2, 8), 1.45),
]


@pytest.mark.parametrize(("kind", "decay_min", "shape", "most"), CHOICES)
def test_choice_of_the_shape_of_tiles(kind, decay_min, shape, most, monkeypatch):
    """From the numbers of images and pairs; here the tiles are counted."""
    module = import_module("crystalformer.kernels.layout")
    x = on_device(problem(kinds=(kind,), decay_min=decay_min))
    lists = (x.images.packed(), x.images.num_pairs)

    def packed(*shapes):
        monkeypatch.setattr(module, "SHAPES", shapes)
        layout = module.pack(x.positions, x.lattice, *lists, 5, x.settings, by_pair=False)
        return module.unpack(layout, len(x.q), x.images.num_images, 5)

    def cost(layout):
        group, groups = layout.shape
        return int(layout.first[-1]) * groups * (group + module.GROUP_COST)

    shapes = module.SHAPES
    chosen = packed(*shapes)
    assert chosen.shape == shape
    assert cost(chosen) <= most * min(cost(packed(one)) for one in shapes)


def test_layout_follows_the_geometry():
    x = on_device(problem())
    x = replace(x, images=replace(x.images, geometry=None))  # for any positions
    before = x.attention(backend="triton")
    x.positions.add_(0.1 * torch.ones_like(x.positions).cumsum(0))
    after = x.attention(backend="triton")
    assert relative_error(after.cpu(), x.to(torch.float64).attention().cpu()) < 1e-5
    assert relative_error(after, before) > 1e-3
