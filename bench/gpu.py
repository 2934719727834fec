"""Speed on an NVIDIA GPU, and a race check: `make gpu`, after the tests. Needs torch, triton and numpy alone.

128 random crystals of 30 atoms at the density of oxides, about 370 images an atom, and one cell of 4,000 atoms; 8 heads
of 16, 64 basis functions. All providers run in turns in one process; times are medians of CUDA events. `graph` replays
a captured CUDA graph, without Python in between. A result that is not as good as the reference's is not timed. `--tiny`
runs all of it on a few atoms, in Triton's interpreter too.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

import crystalformer as cf

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATOM_VOLUME = 20.0  # Å³
DECAY_MIN = 0.1276
# Crystals, atoms in each, and whether the reference runs beside.
SIZES = ((128, 30, True), (1, 4000, False))


@dataclass(frozen=True)
class Case:
    """Inputs of `periodic_attention` with the gradients of its outputs."""

    inputs: tuple[Tensor, ...]
    images: cf.ImageList
    basis: cf.RadialBasis
    grad: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(tuple(x.to(dtype) for x in self.inputs), self.images, self.basis, self.grad.to(dtype))

    def forward(self, backend: str, inputs: tuple[Tensor, ...] | None = None) -> Tensor:
        q, k, v, decay, positions, lattice, weight = inputs or self.inputs
        return cf.periodic_attention(q, k, v, decay, positions, lattice, self.images, weight, self.basis, backend)

    def with_backward(self, backend: str, geometry: bool) -> tuple[Tensor, ...]:
        """y and the gradients of q, k, v, decay, edge_weight and, with `geometry`, of positions and lattice."""
        wanted = [k for k in range(7) if geometry or k not in (4, 5)]
        inputs = tuple(x.detach().requires_grad_(k in wanted) for k, x in enumerate(self.inputs))
        y = self.forward(backend, inputs)
        return y.detach(), *torch.autograd.grad(y, [inputs[k] for k in wanted], self.grad)


def case(crystals: int, atoms: int, heads: int = 8, dim: int = 16, num: int = 64) -> Case:
    rng = torch.Generator().manual_seed(0)
    n, edge = crystals * atoms, (atoms * ATOM_VOLUME) ** (1 / 3)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    lattice = edge * (torch.eye(3, dtype=torch.float64) + 0.1 * normal(crystals, 3, 3))
    fractional = torch.rand(n, 3, generator=rng, dtype=torch.float64)
    positions = torch.einsum("nx,nxy->ny", fractional, lattice.repeat_interleave(atoms, 0))
    decay = DECAY_MIN * (1 + 2 * torch.rand(n, heads, generator=rng, dtype=torch.float64))
    inputs = (*(normal(n, heads, dim) for _ in range(3)), decay, positions, lattice, normal(heads, dim, num))
    ptr = torch.arange(crystals + 1, device=DEVICE) * atoms
    images = cf.build_images(positions.to(DEVICE), lattice.to(DEVICE), ptr, decay_min=DECAY_MIN)
    grad = normal(n, heads, dim)
    moved = Case(tuple(x.to(DEVICE) for x in inputs), images, cf.RadialBasis(num), grad.to(DEVICE))
    return moved.to(torch.float32)


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest error of any result, relative to its largest value."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)


def check_races(x: Case, runs: int) -> None:
    first = x.with_backward("triton", geometry=True)
    for run in range(runs):
        for one, other in zip(x.with_backward("triton", geometry=True), first, strict=True):
            if not torch.equal(one, other):
                raise SystemExit(f"run {run + 1} of {runs} gave other bits: a race")
    print(f"{runs} runs, the same bits")


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The replay of what `function` starts, as a CUDA graph; `function` itself without a GPU."""
    if DEVICE == "cpu":
        return function
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_memory(function: Callable[[], object]) -> float:
    """MiB that `function` takes besides what is there before."""
    if DEVICE == "cpu":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def milliseconds(function: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def machine() -> dict[str, str]:
    driver = "none"
    if DEVICE == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter on the CPU: no speed at all"
    return {"gpu": name, "driver": driver, "torch": torch.__version__, "triton": triton.__version__}


def providers(x: Case, reference: bool) -> dict[tuple[str, str], Callable[[], object]]:
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for backend in ("triton", "reference") if reference else ("triton",):
        found[backend, "forward"] = lambda b=backend: x.forward(b)
        found[backend, "forward and backward"] = lambda b=backend: x.with_backward(b, geometry=False)
        found[backend, "with positions and lattice"] = lambda b=backend: x.with_backward(b, geometry=True)
    found["triton", "forward, graph"] = captured(found["triton", "forward"])
    found["triton", "forward and backward, graph"] = captured(found["triton", "forward and backward"])
    return found


def measure(x: Case, runs: int, reference: bool) -> list[tuple]:
    """Rows of provider, direction, median ms, runs and peak MiB."""
    timed = providers(x, reference)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for run in range(-3, runs):
        for key, function in timed.items():
            if run < 0 or key[0] == "triton" or run % 10 == 0:  # the reference is slow, and steady
                spent = milliseconds(function)
                if run >= 0:
                    times[key].append(spent)
    peak = {key: peak_memory(function) for key, function in timed.items()}
    rows = [(*key, f"{statistics.median(t):.4f}", len(t), f"{peak[key]:.0f}") for key, t in times.items()]
    for provider, direction, ms, _, mib in rows:
        print(f"  {provider:10} {direction:28} {ms:>10} ms {mib:>8} MiB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few atoms and runs, to test this program")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    missing = cf.available_backends()["triton"]
    if missing is not True:
        sys.exit(f"backend 'triton': {missing}")
    print(machine())
    x = case(*((2, 2) if arguments.tiny else (128, 30)))
    exact = x.to(torch.float64).with_backward("reference", geometry=True)
    errors = {name: error(x.with_backward(name, geometry=True), exact) for name in ("reference", "triton")}
    print("largest relative error of y and all gradients, fp32:", errors)
    if not errors["triton"] <= 2 * errors["reference"] + 1e-6:
        sys.exit("the kernels are less exact than the reference: not timed")
    check_races(x, 2 if arguments.tiny else 200)

    arguments.out.parent.mkdir(exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = ("crystals", "atoms", "images", "provider", "direction", "ms", "runs", "peak_mib")
        table.writerow([*machine(), *columns])
        for crystals, atoms, reference in ((2, 2, True), (1, 9, False)) if arguments.tiny else SIZES:
            x = case(crystals, atoms)
            print(f"{crystals} crystals of {atoms} atoms, {x.images.num_images} images")
            for row in measure(x, 1 if arguments.tiny else 50, reference):
                table.writerow([*machine().values(), crystals, atoms, x.images.num_images, *row])


if __name__ == "__main__":
    main()
