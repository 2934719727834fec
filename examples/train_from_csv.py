"""From a CSV of crystals to a trained model: a folder with the model, its errors, predictions and plots."""

import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from crystalformer import CrystalformerConfig
from crystalformer.data.ionic import ionic_crystals
from crystalformer.runs import DataSource, train
from crystalformer.training import Recipe


def write_table(file: Path, number: int) -> None:
    """A CSV as you may have one: a column of ids, one of CIFs, and one for each target."""
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["id", "cif", "energy"])
        for i, crystal in enumerate(ionic_crystals(number)):
            structure = crystal.structure.remove_oxidation_states()
            table.writerow([f"salt-{i}", structure.to(fmt="cif"), crystal.energy])


def main(folder: Path) -> float:
    """Trains in `folder`; returns the test error as a part of that of predicting the mean."""
    write_table(folder / "salts.csv", 200)
    # Small, so that it takes seconds. Without these two arguments it is the paper's model and recipe.
    recipe = Recipe(epochs=15, batch_size=16, lr=2e-3)
    small = CrystalformerConfig(model_dim=64, num_blocks=2)
    predictor = train(folder / "run", "energy", DataSource(data=folder / "salts.csv"), recipe, small, unit="eV/atom")

    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    error, of_the_mean = metrics["mae"]["test"]["energy"], metrics["baseline_mae"]["test"]["energy"]
    print(f"test error {error:.2f} eV/atom; of predicting the mean {of_the_mean:.2f} eV/atom")
    new = ionic_crystals(3, seed=1)
    for crystal, (energy,) in zip(new, predictor.predict([x.structure for x in new]).tolist(), strict=True):
        print(f"{crystal.formula}: {energy:.2f} eV/atom predicted, {crystal.energy:.2f} by an Ewald sum")
    return error / of_the_mean


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        main(Path(place))
