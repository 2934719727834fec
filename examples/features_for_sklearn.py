"""Features that a model learnt for one property, in a ridge regression of another one.

With scikit-learn, if it is installed: pip install scikit-learn. Else numpy solves the same equations.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from train_from_csv import main as train_from_csv

import crystalformer
from crystalformer.data.ionic import ionic_crystals


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """The prediction for the features `new` of a ridge regression of y on standardised x."""
    mean, deviation = x.mean(0), x.std(0)
    x, new = (x - mean) / deviation, (new - mean) / deviation
    try:
        from sklearn.linear_model import Ridge
    except ImportError:
        weights = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        return new @ weights + y.mean()
    return Ridge(alpha=alpha).fit(x, y).predict(new)


def main(folder: Path) -> float:
    """Trains on energies, fits volumes; returns the error on new crystals as a part of that of predicting the mean."""
    if not (folder / "run").exists():
        train_from_csv(folder)
    predictor = crystalformer.load(folder / "run")
    structures = [crystal.structure for crystal in ionic_crystals(400, seed=2)]
    features = predictor.encode(structures).double().numpy()  # (crystals, 64), or of each atom with atoms=True
    volume = np.array([structure.volume / len(structure) for structure in structures])

    predicted = ridge(features[:300], volume[:300], features[300:])
    error = np.abs(predicted - volume[300:]).mean()
    of_the_mean = np.abs(volume[:300].mean() - volume[300:]).mean()
    print(f"volume: error {error:.2f} Å³/atom; of predicting the mean {of_the_mean:.2f} Å³/atom")
    return error / of_the_mean


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        main(Path(place))
