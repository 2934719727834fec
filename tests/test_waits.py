"""How often a GPU is waited for while lists are built and packed: counted, not timed."""

from typing import Any

import pytest
import torch
from image_lists import one_of_each
from waits import Waits

import crystalformer as cf
from crystalformer.attention.settings import Settings
from crystalformer.common import checks
from crystalformer.geometry import images as images_module


def test_values_on_other_devices_are_looked_at_only_when_asked() -> None:
    """A look at a GPU's values costs a synchronisation."""
    here = torch.zeros(1, 3, 3)
    elsewhere = here.to("meta")
    assert checks.values_visible(here)
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
    lengths = ["repeat_interleave"] * 2  # their sum, and whether one is negative
    assert names == ["index", "nonzero", "_local_scalar_dense", "bincount", *lengths, "tolist", "index_put_"]


@pytest.mark.parametrize(("options", "number"), [({}, 5), ({"every_pair": True}, 5), ({"cutoff": 6.0}, 4)])
def test_a_gpu_is_waited_for_only_for_sizes(
    options: dict[str, Any], number: int, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the number of pairs, of points after each axis, and of images kept; whatever the number of crystals."""
    monkeypatch.setattr(images_module, "choose_backend", lambda *_: "reference")
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    batch = one_of_each()
    with waits:
        cf.build_images(*batch, **options)
    assert len(waits.found) == number, waits.found


@pytest.mark.parametrize("by_pair", [False, True])
def test_packing_for_a_gpu_waits_never(by_pair: bool, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from crystalformer.kernels.layout import pack as pack_layout

    batch = one_of_each()
    images = cf.build_images(*batch, every_pair=True)
    lists = (images.packed(), images.num_pairs)
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    with waits:
        pack_layout(*batch[:2], *lists, 64, Settings(r_max=14.0), by_pair)
    assert waits.found == []
