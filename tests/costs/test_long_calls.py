"""Long calls of the CPU kernels: time for atoms, not for pairs. Ctrl-C ends them, and so does a lack of memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from crystals import pack
from image_lists import cube, of_one

import crystalformer as cf

if cf.available_backends()["cpu"] is not True:
    pytest.skip(cf.available_backends()["cpu"], allow_module_level=True)


def test_a_large_cell_takes_time_for_its_atoms_not_for_pairs_of_them() -> None:
    """Eight times the atoms: eight times the time, not 64 times; the list, and attention over it."""

    def seconds(edge: int) -> float:
        grid = torch.cartesian_prod(*[torch.arange(edge, dtype=torch.float32)] * 3)
        batch = pack([(grid, edge * torch.eye(3))])
        start = time.process_time()
        images = cf.build_images(*batch, cutoff=1.0)
        q = torch.ones(len(grid), 1, 1, requires_grad=True)
        cf.periodic_attention(q, q, q, q[:, 0], *batch[:2], images).sum().backward()
        assert images.num_images == 7 * len(grid)
        return time.process_time() - start

    seconds(4)
    assert seconds(40) < 24 * min(seconds(20), seconds(20))


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C after a third of a second, which ends what is here within one second more."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    start = time.perf_counter()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert 0.2 < time.perf_counter() - start < 1.3


def long_build() -> None:
    of_one((60 * torch.rand(4000, 3), 60 * torch.eye(3)), decay_min=1.0, every_pair=True)


def long_build_of_one_row() -> None:
    of_one(cube(0.1), cutoff=24.0)


def long_attention() -> None:
    crystal = 20 * torch.rand(1000, 3), 20 * torch.eye(3)
    q, weight = torch.ones(1000, 320, 16), torch.ones(320, 16, 64)
    images = of_one(crystal, cutoff=14.0)
    cf.periodic_attention(q, q, q, q[:, :, 0], *pack([crystal])[:2], images, weight, cf.RadialBasis(width=30.0))


def long_wave_vectors() -> None:
    cf.build_wave_vectors(143 * torch.eye(3)[None].double(), torch.tensor([0, 1]))  # nearly 2^23, the most by default


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("work", [long_build, long_build_of_one_row, long_attention, long_wave_vectors])
def test_ctrl_c_ends_it_within_a_second(work: Callable[[], None], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with interrupted():
            work()
    finally:
        torch.set_num_threads(before)


def test_memory_that_is_not_there_is_an_error_of_python() -> None:
    """Of whichever thread; the process goes on."""
    pytest.importorskip("resource", reason="memory is limited with the resource module")
    program = """
import resource, torch, crystalformer as cf
torch.set_num_threads(2)
positions, lattice, ptr = 50 * torch.rand(4000, 3), 50 * torch.eye(3)[None], torch.tensor([0, 4000])
cf.build_images(positions, lattice, ptr, cutoff=2.0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20), resource.RLIM_INFINITY))
try:
    cf.build_images(positions, lattice, ptr, cutoff=40.0)
except MemoryError as error:
    print(error)
print(cf.build_images(positions, lattice, ptr, cutoff=2.0).num_atoms)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("how much memory is used is read from /proc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    message = "the CPU kernels have not enough memory for the images: a smaller max_images refuses them before they are"
    assert done.stdout.startswith(message)
    assert done.stdout.endswith("\n4000\n")
