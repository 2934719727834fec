"""What an image list costs: time, memory, and waits for a GPU."""

import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from crystals import pack, random_crystal
from image_lists import one_of_each
from waits import Waits

import crystalformer as cf
from crystalformer.common import checks
from crystalformer.geometry import images as images_module

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


# Waits ----------------------------------------------------------------------------------------------------------------


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
        pack_layout(*batch[:2], *lists, 64, (0.0, 0.0, 14.0, 1.0), by_pair)
    assert waits.found == []
