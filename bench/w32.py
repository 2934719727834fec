"""Workload W32: the compiled CPU kernels beside plain PyTorch and the paper's code.    python -m bench.w32

The first 32 ordered AFLOW prototypes with at most 20 atoms; 8 heads of 16, 64 basis functions, r0 1.4 Å, tol 1e-6; four
attention calls, forward and backward, images ready; four calls of reciprocal attention, wave vectors ready; and a whole
training step (forward, backward, AdamW) of the paper's model and of the dual-space one. Providers alternate in one
process; medians. Correct first: a provider whose output is off is not timed.

OFFICIAL=folder adds the paper's PyTorch path, from a checkout of github.com/omron-sinicx/crystalformer.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import crystalformer as cf

CALLS = 4
HEADS, DIM, BASIS = 8, 16, cf.RadialBasis(num=64, r_max=14.0)


def w32() -> cf.CrystalBatch:
    """The crystals, fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
    structures = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
    structures = [s for s in structures if s.is_ordered and len(s) <= 20 and max(s.atomic_numbers) <= 98]
    return cf.CrystalBatch.from_structures(structures[:32], dtype=torch.float64)


def dense_attention(batch: cf.CrystalBatch) -> Callable[..., Tensor]:
    """Attention as one writes it in PyTorch: all pairs times a box of ±2 cells, distances and basis made beforehand."""
    sizes = batch.ptr.diff().tolist()
    pairs = [(c, i, j) for c, n in enumerate(sizes) for i in range(n) for j in range(n)]
    c, i, j = torch.tensor(pairs).T
    i, j = i + batch.ptr[c], j + batch.ptr[c]
    box = torch.cartesian_prod(*3 * [torch.arange(-2.0, 3.0)])
    r = (batch.positions[j] - batch.positions[i])[:, None] + (box @ batch.lattice)[c]
    d2 = r.square().sum(-1)
    b = BASIS(d2.sqrt())

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
        content = (q[i] * k[j]).sum(-1) / DIM**0.5
        scores = content[:, None] - decay[i][:, None] * d2[:, :, None]
        largest = scores.detach().amax(1)
        largest = torch.full_like(decay, -torch.inf).scatter_reduce(0, i[:, None].expand(-1, HEADS), largest, "amax")
        p = torch.exp(scores - largest[i][:, None])
        total = torch.zeros_like(decay).index_add(0, i, p.sum(1))
        c = torch.zeros(len(q), HEADS, BASIS.num).index_add(0, i, p.mT @ b)
        values = torch.zeros_like(v).index_add(0, i, p.sum(1)[..., None] * v[j])
        return (values + torch.einsum("hdk,nhk->nhd", weight, c)) / total[..., None]

    return attend


def library_attention(batch: cf.CrystalBatch, backend: str) -> Callable[..., Tensor]:
    images = cf.build_images(batch.positions, batch.lattice, batch.ptr)

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
        return cf.periodic_attention(q, k, v, decay, batch.positions, batch.lattice, images, weight, BASIS, backend)

    return attend


def reciprocal_attention(batch: cf.CrystalBatch, backend: str) -> Callable[..., Tensor]:
    waves = cf.build_wave_vectors(batch.lattice, batch.ptr)

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        lists = (batch.positions, batch.lattice, batch.ptr)
        return cf.reciprocal_attention(q, k, v, decay, *lists, backend=backend, wave_vectors=waves)

    return attend


def official_reciprocal(batch: cf.CrystalBatch, folder: str, box: int) -> Callable[..., Tensor]:
    """The paper's PyTorch path, with a box of ±2 as published or larger: its alpha of the pairs, then a softmax.

    Its cosines, made once a training step for all blocks, are made beforehand.
    """
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        from models.indexed_lattice_multi_head_attention import compute_reci_domain_attn
        from models.indexed_latticeformer_encoder import compute_lattice_distances
    sizes = batch.ptr.diff()
    crystal = torch.repeat_interleave(sizes)
    _, cos_kr, k2, volume, _, edges, _ = compute_lattice_distances(
        batch.positions, crystal, batch.lattice, sizes, box, output_dis=False, output_rec=True, exclude_self=False
    )
    place = torch.arange(len(crystal)) - batch.ptr[crystal]
    largest = int(sizes.max())

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        alpha = compute_reci_domain_attn(-decay, cos_kr, k2, volume.abs(), edges[0], crystal)
        score = alpha + (q[edges[0]] * k[edges[1]]).sum(-1) / DIM**0.5
        padded = score.new_full((len(q), largest, HEADS), -torch.inf).index_put((edges[0], place[edges[1]]), score)
        p = torch.softmax(padded, 1)[edges[0], place[edges[1]]]
        return torch.zeros_like(v).index_add(0, edges[0], p[..., None] * v[edges[1]])

    return attend


def official_model(batch: cf.CrystalBatch, folder: str) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """The paper's model on the PyTorch path of its code, and its forward."""
    sys.path.insert(0, folder)
    params = json.loads((Path(folder) / "params/latticeformer/default.json").read_text())
    params |= {"use_cuda_code": False, "targets": "energy"}
    with contextlib.redirect_stdout(io.StringIO()):
        from models.latticeformer import Latticeformer

        model = Latticeformer(types.SimpleNamespace(**params))
    data = types.SimpleNamespace(
        x=batch.occupancies(), pos=batch.positions, trans_vec=batch.lattice, sizes=batch.ptr.diff()
    )
    data.batch = torch.repeat_interleave(data.sizes)
    return model, lambda: model(data)


def measure(providers: dict[str, Callable[[], tuple[float, ...]]], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of the phases that each provider times, all of them in turn, one round to warm up."""
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in providers}
    for turn in range(rounds + 1):
        for name, run in providers.items():
            for _ in range(1 if turn == 0 or name.startswith(("paper", "dense")) else 5):
                result = run()
                if turn:
                    times[name].append(result)
    return {name: [1e3 * statistics.median(phase) for phase in zip(*x, strict=True)] for name, x in times.items()}


def attention_run(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    outputs = [attend(*inputs) for _ in range(CALLS)]
    middle = time.perf_counter()
    for y in outputs:
        torch.autograd.grad(y, inputs, upstream)
    return middle - start, time.perf_counter() - middle


def training_run(model: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], tuple[float, float, float]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def run() -> tuple[float, float, float]:
        times = [time.perf_counter()]
        optimizer.zero_grad()
        loss = forward().abs().mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        return tuple(b - a for a, b in itertools.pairwise(times))  # type: ignore[return-value]

    return run


def table(title: str, phases: tuple[str, ...], times: dict[str, list[float]], against: str) -> None:
    print(f"\n{title}, ms\n  {'':14}" + "".join(f"{x:>10}" for x in (*phases, "sum")) + f"{'times ' + against:>18}")
    for name, phase in times.items():
        ratio = sum(times[against]) / sum(phase)
        print(f"  {name:14}" + "".join(f"{x:10.2f}" for x in (*phase, sum(phase))) + f"{ratio:18.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.w32", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    exact = w32()
    batch = exact.to(torch.float32)
    n = batch.num_atoms
    q, k, v, upstream = torch.randn(4, n, HEADS, DIM)
    inputs = [q, k, v, 0.1276 + 0.3 * torch.rand(n, HEADS), 0.1 * torch.randn(HEADS, DIM, BASIS.num)]
    truth = library_attention(exact, "reference")(*(x.double() for x in inputs))
    inputs = [x.requires_grad_() for x in inputs]

    attends = {"dense": (dense_attention(batch), 1e-2)}
    attends |= {
        name: (library_attention(batch, name), 1e-5)
        for name, there in cf.available_backends().items()
        if there is True and name != "triton"
    }
    for name, (attend, bound) in attends.items():
        error = float((attend(*inputs).detach() - truth).abs().max() / truth.abs().max())
        assert error < bound, f"{name} is wrong: relative error {error:.1e}"
    images = cf.build_images(batch.positions, batch.lattice, batch.ptr)
    print(f"{batch.num_crystals} crystals, {n} atoms, {images.num_images} images, {options.threads} threads")
    runs = {
        name: lambda attend=attend: attention_run(attend, inputs, upstream) for name, (attend, _) in attends.items()
    }
    attention = measure(runs, options.rounds)
    table(f"{CALLS} attention calls", ("forward", "backward"), attention, "dense")

    decay = (1.21 + 2 * torch.rand(n, HEADS)).requires_grad_()
    inputs = [*inputs[:3], decay]
    truth = reciprocal_attention(exact, "reference")(*(x.detach().double() for x in inputs))
    attends = {name: (reciprocal_attention(batch, name), 1e-4) for name in attention if name != "dense"}
    if "OFFICIAL" in os.environ:  # its box of ±2 is too small for the longer cells: its error is printed, not judged
        for box in (2, 6):
            attends[f"paper ±{box}"] = (official_reciprocal(batch, os.environ["OFFICIAL"], box), 1.0)
    for name, (attend, bound) in attends.items():
        error = float((attend(*inputs).detach() - truth).abs().max() / truth.abs().max())
        print(f"reciprocal, {name}: relative error {error:.1e}")
        assert error < bound, f"{name} is wrong: relative error {error:.1e}"
    runs = {
        name: lambda attend=attend: attention_run(attend, inputs, upstream) for name, (attend, _) in attends.items()
    }
    against = "paper ±2" if "paper ±2" in runs else "reference"
    table(f"{CALLS} reciprocal attention calls", ("forward", "backward"), measure(runs, options.rounds), against)

    steps = {}
    for name in attention:
        if name != "dense":
            for domain in ("real", "multihead"):
                model = cf.Crystalformer(cf.CrystalformerConfig(domain=domain), backend=name)
                prepared = model.prepare(batch)
                model.calibrate(prepared)
                run = training_run(model, lambda model=model, prepared=prepared: model(prepared))
                steps[name if domain == "real" else f"{name} dual"] = run
    if "OFFICIAL" in os.environ:
        steps["paper"] = training_run(*official_model(batch, os.environ["OFFICIAL"]))
    phases = ("forward", "backward", "AdamW")
    table("One training step", phases, measure(steps, options.rounds), "paper" if "paper" in steps else "reference")


if __name__ == "__main__":
    main()
