"""The demo: is the attention exact, and does the model learn?    python -m crystalformer.app.demo

Needs the extras [data] and [train]. Exits with 1 if a check fails.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.basis import RadialBasis
from ..attention.functional import periodic_attention
from ..common import checks, storage
from ..common.backends import choose_backend
from ..common.loading import available_backends
from ..common.version import version
from ..common.words import one_line
from ..model.batch import CrystalBatch
from ..model.config import CrystalformerConfig
from ..model.layers import mean_pool
from ..model.model import Crystalformer

if TYPE_CHECKING:
    from ..data.ionic import IonicCrystal

CHECKED = {
    "rock salt": "AB_cF8_225_a_b",
    "wurtzite": "AB_hP4_186_b_b",
    "fluorite": "AB2_cF12_225_a_c",
    "cadmium iodide": "AB2_hP3_164_a_d",
    "rutile": "A2B_tP6_136_f_a",
    "perovskite": "AB3C_cP5_221_a_c_b",
    "calaverite": "AB2_mC6_12_a_i",
}
FP32_BOUND, PHYSICS_BOUND, CONTROL_BOUND = 2e-5, 1e-9, 1e-3
SKEW = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [1.0, 2.0, 1.0]], dtype=torch.float64)  # determinant 1

NUM_TRAIN, NUM_VAL, NUM_TEST = 400, 40, 100
BATCH_SIZE, EPOCHS, MOST_EPOCHS = 16, 20, 10**6
TIMES_BETTER = 4.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crystalformer.app.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training (%(default)s)")
    parser.add_argument("--seconds", type=float, default=150, help="stop training then at the latest (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:  # before minutes go into what a wrong option would end
        checks.check_integer("epochs", options.epochs, 1, MOST_EPOCHS)
        checks.check_integer("seed", options.seed, 0, 2**63 - 1)
        checks.check_number("seconds", options.seconds, high=1e9)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))

    start = time.perf_counter()
    # Crystals this small gain little from threads, and lose much where these wait for cores that others keep busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        show_backends()
        exact = check_attention(options.seed)
        learnt = learn_energies(options.out, options.epochs, options.seconds, options.seed)
    finally:
        torch.set_num_threads(threads)
    print(f"\n{'All is well' if exact and learnt else 'FAILED'}, after {time.perf_counter() - start:.0f} s.")
    return 0 if exact and learnt else 1


def show_backends() -> None:
    print(f"crystalformer {version}, torch {torch.__version__}, on one thread\n\nBackends")
    for name, state in available_backends().items():
        print(f"  {name:11}{'ready' if state is True else state}")


def check_attention(seed: int) -> bool:
    """Prints, for each prototype, the errors of the op and of the model's invariances; whether all are in bounds."""
    backend = choose_backend("auto", torch.device("cpu"), "attention")
    print("\nIs it exact? Relative errors, with random weights")
    print(f"  op: fp32 on '{backend}' against the fp64 reference")
    print("  model: its features in fp64, for other cells of the crystal, rotated and, as a control, stretched by 1 %")
    print(f"  {'':15}{' op ':-^20}  {' model ':-^48}")
    columns = ("output", "gradient", "2x1x1", "2x2x2", "skewed", "rotated", "stretched")
    print(f"  {'':15}" + "".join(f"{column:>10}" for column in columns))

    from ..data.ionic import prototype

    torch.manual_seed(seed)
    model = Crystalformer(CrystalformerConfig(tol=1e-11)).double().eval()
    structures = {name: prototype(label) for name, label in CHECKED.items()}
    model.calibrate(CrystalBatch.from_structures(list(structures.values()), torch.float64))
    bounds = 2 * [FP32_BOUND] + 4 * [PHYSICS_BOUND]
    exact = True
    for name, structure in structures.items():
        crystal = CrystalBatch.from_structures([structure], torch.float64)
        *errors, control = fp32_errors(crystal) + invariance_errors(model, structure)
        exact = exact and all(error <= bound for error, bound in zip(errors, bounds, strict=True))
        exact = exact and control >= CONTROL_BOUND
        print(f"  {name:15}" + "".join(f"{error:10.0e}" for error in [*errors, control]), flush=True)
    print(
        f"  {'must be':15}" + "".join(f"{f'< {bound:.0e}':>10}" for bound in bounds) + f"{f'> {CONTROL_BOUND:.0e}':>10}"
    )
    return exact


def fp32_errors(crystal: CrystalBatch) -> list[float]:
    """Of the op's output and of its gradient in all inputs, against the fp64 reference."""
    config = CrystalformerConfig()
    heads, dim, num_basis = config.num_heads, config.head_dim, config.num_basis
    images = Crystalformer(config).build_images(crystal)
    q, k, v, upstream = torch.randn(4, crystal.num_atoms, heads, dim, dtype=torch.float64)
    decay = config.decay_min * (1 + torch.rand(crystal.num_atoms, heads, dtype=torch.float64))
    weight = torch.randn(heads, dim, num_basis, dtype=torch.float64) / num_basis
    inputs = [q, k, v, decay, crystal.positions, crystal.lattice, weight]

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        q, k, v, decay, positions, lattice, weight = x
        basis = RadialBasis(num_basis, 14.0)
        y = periodic_attention(q, k, v, decay, positions, lattice, images, weight, basis, backend)
        # As one vector: by symmetry the positions' part alone may be 0 and have no relative error.
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(y, x, upstream.to(dtype))])
        return [y.detach(), gradient]

    pairs = zip(results(torch.float32, "auto"), results(torch.float64, "reference"), strict=True)
    return [relative_error(got, true) for got, true in pairs]


@torch.no_grad()
def invariance_errors(model: Crystalformer, structure: Any) -> list[float]:
    """Of the pooled features for two supercells, a skewed cell and a rotated crystal; last, for a stretched one."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    crystal = CrystalBatch.from_structures([structure], torch.float64)
    others = [
        CrystalBatch.from_structures([structure * (2, 1, 1)], torch.float64),
        CrystalBatch.from_structures([structure * (2, 2, 2)], torch.float64),
        replace(crystal, lattice=SKEW @ crystal.lattice),
        replace(crystal, positions=crystal.positions @ rotation, lattice=crystal.lattice @ rotation),
        replace(crystal, positions=crystal.positions * 1.01, lattice=crystal.lattice * 1.01),
    ]

    def features(batch: CrystalBatch) -> Tensor:
        return mean_pool(model.encode(batch), batch.ptr)

    return [relative_error(features(other), features(crystal)) for other in others]


def relative_error(got: Tensor, true: Tensor) -> float:
    return float((got - true).abs().max() / true.abs().max())


def learn_energies(out: Path, epochs: int, seconds: float, seed: int) -> bool:
    """Trains the paper's model on Ewald energies; whether it beats predicting the mean by far."""
    print("\nDoes it learn? Electrostatic energy of ionic crystals, a sum over infinitely many neighbours", flush=True)
    from .. import training
    from ..data.ionic import ionic_crystals
    from . import plots

    crystals = ionic_crystals(NUM_TRAIN + NUM_VAL + NUM_TEST, seed)
    atoms = sum(len(crystal.structure) for crystal in crystals) / len(crystals)
    torch.manual_seed(seed)
    model = Crystalformer()
    parameters = sum(x.numel() for x in model.parameters())
    print(
        f"  {len(crystals)} crystals of {len({x.prototype for x in crystals})} prototypes, {atoms:.1f} atoms each;",
        end=" ",
    )
    print(f"{NUM_TRAIN} to learn from, {NUM_VAL} to validate, {NUM_TEST} to test")
    print(
        f"  the paper's model, {parameters:,} numbers; {epochs} epochs of {NUM_TRAIN // BATCH_SIZE} steps", flush=True
    )

    def dataset(part: slice) -> training.CrystalDataset:
        energies = torch.tensor([[crystal.energy] for crystal in crystals[part]], dtype=torch.float64)
        return training.CrystalDataset([crystal.structure for crystal in crystals[part]], energies, model)

    train, val = dataset(slice(NUM_TRAIN)), dataset(slice(NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    test = dataset(slice(NUM_TRAIN + NUM_VAL, None))
    loader = train.loader(BATCH_SIZE, seed)
    model.calibrate(next(iter(loader))[0])
    task = training.Regression(model, *training.standardisation(train.targets), names=("energy",))
    callbacks = [training.AverageLastEpochs(training.Recipe(epochs).averaged), training.Progress("energy", "eV/atom")]
    history = training.fit(task, loader, val.loader(2 * BATCH_SIZE), epochs, callbacks, seconds)
    if len(history) < epochs:
        print(f"  stopped in epoch {len(history)}, after {seconds:g} s")
    predictions = training.predict(model, test.loader(2 * BATCH_SIZE))

    error = float((predictions - test.targets).abs().mean())
    baseline = float((task.mean - test.targets).abs().mean())
    print(f"\n  Mean absolute error on the test crystals   {'eV/atom':>10}")
    print(f"    predicting the mean energy               {baseline:10.2f}")
    print(f"    Crystalformer                            {error:10.2f}   {baseline / error:.1f} times smaller")

    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.csv", crystals[-NUM_TEST:], predictions)
    label = "energy (eV/atom)"
    plots.parity(out / "parity.png", test.targets[:, 0], predictions[:, 0], label)
    plots.learning_curve(out / "learning_curve.png", history, "mae/energy", "mean absolute error (eV/atom)", baseline)
    model.save_pretrained(out / "model")
    print(f"\nWritten to {out}/: predictions.csv, parity.png, learning_curve.png and the trained model, model/")
    return baseline >= TIMES_BETTER * error


def write_predictions(path: Path, crystals: "Sequence[IonicCrystal]", predictions: Tensor) -> None:
    rows: list[list[object]] = [["id", "formula", "target", "prediction"]]
    for number, (crystal, prediction) in enumerate(zip(crystals, predictions[:, 0].tolist(), strict=True)):
        name = f"{crystal.prototype.replace(' ', '-')}-{number:03d}"
        rows.append([name, crystal.formula, crystal.energy, prediction])
    storage.write(path, storage.csv_text(rows))


if __name__ == "__main__":
    sys.exit(main())
