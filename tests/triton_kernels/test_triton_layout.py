"""The layout that the Triton kernels read, and how often lists and layouts wait for a GPU."""

from importlib import import_module
from typing import Any

import pytest
import torch
from crystals import pack, random_crystal
from ways import DEVICE, Way

import crystalformer as cf
from crystalformer.common import checks
from crystalformer.geometry import images as images_module

TRITON = Way("triton", torch.float32, DEVICE)
pytestmark = pytest.mark.usefixtures("poison")

LISTS: dict[str, dict[str, Any]] = {
    "certified": {},
    "cutoff": {"cutoff": 5.0},
    "every_pair": {"every_pair": True},
}


@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_image_lists_wait_once(options, waits, monkeypatch):
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    geometry = [x.to(DEVICE) for x in pack([random_crystal("cubic", 1, 2), random_crystal("cubic", 2, 1)])]
    with waits:
        cf.build_images(*geometry, decay_min=3.0, **options)
    assert waits.found == ["tolist"]


def test_layout_holds_every_image_once():
    module = import_module("crystalformer.kernels.layout")

    for kinds in ((("cubic", 1),), (("skewed", 3),), (("cubic", 12),)):
        x = TRITON.problem(kinds=kinds)
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
    x = TRITON.problem(kinds=(kind,), decay_min=decay_min)
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
