"""A small training that is the same each time, run by the tests in processes of its own.

python -m torch.distributed.run --nproc_per_node 2 tests/small_training.py OUT
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from crystalformer import Crystalformer, CrystalformerConfig
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import AverageLastEpochs, CrystalDataset, Regression, fit, predict, standardisation

SMALL = CrystalformerConfig(
    model_dim=16,
    num_heads=2,
    num_blocks=1,
    ff_dim=32,
    readout_dims=(16,),
    num_basis=8,
    r0=(0.7,),
    tol=1e-3,
    dropout=0.1,
)
EPOCHS = 6


def data(model: Crystalformer, number: int = 21) -> CrystalDataset:
    """Crystals of 1 to 6 atoms and one of 4 times as many: an odd number, and no even sizes."""
    crystals = ionic_crystals(number, seed=1)
    structures = [x.structure for x in crystals]
    structures[3] = structures[3] * (2, 2, 1)
    return CrystalDataset(structures, torch.tensor([[x.energy] for x in crystals]), model)


class Stop(Callback):
    """Sends this process a signal in the middle of an epoch."""

    def __init__(self, epoch: int, number: int) -> None:
        self.epoch, self.number = epoch, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index) -> None:
        if (trainer.current_epoch, index) == (self.epoch, 2):
            os.kill(os.getpid(), self.number)


def train(
    config: CrystalformerConfig = SMALL,
    epochs: int = EPOCHS,
    callbacks: Sequence[Callback] = (),
    average: int = 2,
    schedule: str = "inverse_sqrt",
    **options,
) -> tuple[list[dict[str, float]], Crystalformer]:
    torch.manual_seed(0)
    model = Crystalformer(config)
    crystals = data(model)
    largest = max(x.images.num_images for x in crystals.crystals)
    loader = crystals.loader(8, seed=5, max_images=largest - 1)  # the large one is alone in its batch
    model.calibrate(next(iter(loader)).crystals)
    task = Regression(model, *standardisation(crystals.targets), lr=2e-2, schedule=schedule)
    callbacks = [*([AverageLastEpochs(average)] if average else []), *callbacks]
    return fit(task, loader, crystals.loader(8), epochs, callbacks, seed=5, accelerator="cpu", **options), model


def main(out: Path) -> None:
    """Trains in the default dtype, without dropout, and writes what came out."""
    rows, model = train(replace(SMALL, dropout=0.0))
    predictions = predict(model, data(model).loader(8)).tolist()
    weights = {name: x.tolist() for name, x in model.state_dict().items()}
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps({"rows": rows, "weights": weights, "predictions": predictions}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]))
