"""How often a GPU is waited for while lists are built and packed: counted, not timed."""

from collections import defaultdict
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


def orbits_of_two() -> tuple[tuple[torch.Tensor, ...], cf.WaveVectors]:
    """q, k, v, decay, positions, lattice and ptr of two crystals of two orbits and one, and their wave vectors."""
    positions, lattice = torch.rand(5, 3), 4 * torch.eye(3).expand(2, 3, 3)
    ptr, orbit = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0, 2, 2])
    waves = cf.build_wave_vectors(lattice, ptr, positions=positions, orbit=orbit)
    qkv = (torch.ones(3, 2, 4).requires_grad_() for _ in range(3))
    return (*qkv, torch.full((3, 2), 2.0), positions[[0, 1, 3]], lattice, ptr), waves


def test_reciprocal_sums_of_orbits_wait_never(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, waves = orbits_of_two()
    monkeypatch.setattr(checks, "values_visible", lambda x: False)  # as on a GPU
    with waits:
        y = cf.reciprocal_attention(*inputs, backend="reference", wave_vectors=waves)
        torch.autograd.grad(y.sum(), inputs[:3])
    assert waits.found == []


def test_phases_of_orbits_wait_never(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from crystalformer.kernels import phases as module

    (q, *_, positions, lattice, _), waves = orbits_of_two()
    monkeypatch.setattr(module, "phases", defaultdict(lambda: lambda *_, **__: None))  # no kernel
    with waits:
        lists = waves.views(waves.packed(), len(lattice), waves.largest)
        made = module.make_phases(positions, lattice, lists, waves.max_vectors)
        keys = module.of_atoms(lists, q.detach())
    assert waits.found == []
    assert (len(made.phase), len(made.crystal), len(keys[0])) == (5, 3, 5)
