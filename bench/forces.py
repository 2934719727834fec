"""Training steps on energies, forces and stresses, and the part that second derivatives take: `forces`.

Distorted bcc cells of four metals, the paper's model in fp32. `differences` is what the CPU operators do, `reference`
what goes through the reference: see docs/math.md, section 3.
"""

import itertools
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import torch

import crystalformer as cf
from crystalformer.attention import ops
from crystalformer.model.structures import Crystal
from crystalformer.training import ForceDataset, ForceRegression

COLUMNS = ("atoms", "crystals", "images", "second_order", "ms", "second_ms", "share")
EDGE, METALS = 3.2, (41, 42, 73, 74)
WAYS = {"differences": ops.differentiate_along, "reference": ops._differentiate_twice}


def crystal(cells: int, random: np.random.Generator) -> Crystal:
    """2 cells³ atoms, moved by about 0.1 Å."""
    corners = np.array(list(itertools.product(range(cells), repeat=3)), dtype=np.float64)
    positions = EDGE * np.concatenate([corners, corners + 0.5])
    positions += random.normal(0, 0.1, positions.shape)
    return Crystal([{int(z): 1.0} for z in random.choice(METALS, len(positions))], positions, EDGE * cells * np.eye(3))


def learner(cells: int, crystals: int) -> tuple[ForceRegression, Any]:
    """A task without a trainer to log to, and its batch."""
    torch.manual_seed(0)
    random, model = np.random.default_rng(0), cf.Crystalformer()
    structures = [crystal(cells, random) for _ in range(crystals)]
    forces, stress = ([torch.randn(n, 3) for _ in structures] for n in (2 * cells**3, 3))
    data = ForceDataset(structures, torch.randn(crystals, 1), model, forces, stress)
    batch = next(iter(data.loader(crystals)))
    model.calibrate(batch.crystals)
    task = ForceRegression(model, data)
    task.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
    return task, task.on_before_batch_transfer(batch, 0)


def measure(seconds: float, smoke: bool) -> Iterator[dict[str, Any]]:
    """Steps are the loss and its backward: forward, forces, second derivatives; without the optimiser."""
    for cells, (way, run) in itertools.product((1,) if smoke else (2, 3), WAYS.items()):
        task, batch = learner(cells, 1 if smoke else 4)
        spent: list[float] = []

        def timed(*arguments: Any, run: Any = run, spent: list[float] = spent) -> Any:
            start = time.perf_counter()
            result = run(*arguments)
            spent[-1] += time.perf_counter() - start
            return result

        steps: list[float] = []
        before, ops.differentiate_along = ops.differentiate_along, timed
        try:
            while len(steps) < 3 or (sum(steps) < seconds and not smoke):
                task.zero_grad()
                batch.crystals.images.layouts.clear()
                spent.append(0.0)
                start = time.perf_counter()
                task._step("train", task.train_metrics, batch).backward()
                steps.append(time.perf_counter() - start)
        finally:
            ops.differentiate_along = before
        ms, second = 1e3 * median(steps[1:]), 1e3 * median(spent[1:])
        row = {"atoms": 2 * cells**3, "crystals": len(batch.crystals), "images": batch.crystals.images.num_images}
        row |= {"second_order": way, "ms": ms, "second_ms": second, "share": second / ms}
        print("  ".join(f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items()))
        yield row
