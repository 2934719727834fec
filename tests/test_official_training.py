"""The recipe is the paper's: losses of 30 steps beside those of its own code, from the checkout that OFFICIAL names."""

import contextlib
import io
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import crystalformer as cf
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import CrystalDataset, Recipe, Regression, fit, standardisation

CHECKOUT = Path(os.environ.get("OFFICIAL", "OFFICIAL"))
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "models" / "regression.py").is_file(), reason="OFFICIAL names no checkout of the paper's code"
)
STEPS, CRYSTALS = 30, 5
SIZES = {"model_dim": 32, "ff_dim": 64, "head_num": 4, "num_layers": 2, "embedding_dim": [32], "value_pe_dist_real": 16}


def crystals_and_targets() -> tuple[list[Any], Tensor]:
    """Cells of 16 atoms, so wide that the paper's ±2 cells leave out nothing at the decays of the start."""
    small = (x.structure for x in ionic_crystals(60, seed=3) if len(x.structure) == 2)
    structures = [structure * (2, 2, 2) for structure in itertools.islice(small, CRYSTALS)]
    return structures, torch.randn(CRYSTALS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs() -> tuple[dict[str, Any], dict[str, Tensor], list[float]]:
    """Parameters and first weights of the paper's model in fp64, and the loss of each step of its own training."""
    sys.path.append(str(CHECKOUT))
    from losses.regression_loss import regression_loss
    from models.latticeformer import Latticeformer
    from models.regression import RegressionModel

    params = json.loads((CHECKOUT / "params" / "latticeformer" / "default.json").read_text())
    params |= SIZES | {"use_cuda_code": False, "targets": "energy"}
    structures, targets = crystals_and_targets()
    batch = cf.CrystalBatch.from_structures(structures, dtype=torch.float64)
    sizes = batch.ptr.diff()
    names = {"x": batch.occupancies().double(), "pos": batch.positions, "trans_vec": batch.lattice, "sizes": sizes}
    data = SimpleNamespace(**names, batch=torch.repeat_interleave(sizes))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = Latticeformer(SimpleNamespace(**params)).double()
        model(data)  # the first forward sets the scale and shift of the decays
        state = {name: x.detach().clone() for name, x in model.state_dict().items()}
        module = SimpleNamespace(params=SimpleNamespace(**params), model=model)
        (optimizer,), (schedule,) = RegressionModel.configure_optimizers(module)
    mean, deviation = standardisation(targets)
    losses = []
    for _ in range(STEPS):  # as RegressionModel.training_step
        optimizer.zero_grad()
        loss = regression_loss(model(data), {"energy": targets[:, 0]}, ["energy"], deviation, mean, "L1").mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params["clip_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return params, state, losses


def ours(params: dict[str, Any], state: dict[str, Tensor], bias_decay: float) -> list[float]:
    """The loss of each step of this project's training, which has one batch an epoch."""
    model = cf.convert.from_official(state, params).train()
    structures, targets = crystals_and_targets()
    data = CrystalDataset(structures, targets, model)
    task = Regression(model, *standardisation(targets), bias_decay=bias_decay)
    rows = fit(task, data.loader(CRYSTALS), data.loader(CRYSTALS), STEPS, accelerator="cpu")
    return [row["train_loss"] for row in rows]


def test_losses_are_those_of_the_papers_code(theirs):
    params, state, losses = theirs
    assert losses[-1] < 0.9 * losses[0]
    differences = {}
    for bias_decay in (Recipe.bias_decay, 0.0):
        found = ours(params, state, bias_decay)
        differences[bias_decay] = max(abs(a - b) for a, b in zip(found, losses, strict=True))
    assert differences[Recipe.bias_decay] < 1e-8
    assert differences[0.0] > 1e-6
