"""Training with the paper's recipe, on lightning. Needs the extra [train].

train = CrystalDataset(structures, targets, model)                 # targets (C,T)
loader = train.loader(batch_size=128, seed=0)
model.calibrate(next(iter(loader))[0])                             # once, before training
task = Regression(model, *standardisation(train.targets))
history = fit(task, loader, validation.loader(128), epochs=500)    # then the model predicts in the targets' units

`crystalformer.runs.train` does all of this from files to a folder with the model and a report.
"""

from ..data.dataset import CrystalDataset
from ..data.forces import ForceDataset
from .callbacks import AverageLastEpochs, History, Progress
from .element_properties import embed_properties
from .forces import ForceRegression
from .loop import fit, predict
from .recipe import PRESET_MODELS, PRESETS, Recipe
from .regression import Regression, standardisation

__all__ = [
    "PRESETS",
    "PRESET_MODELS",
    "AverageLastEpochs",
    "CrystalDataset",
    "ForceDataset",
    "ForceRegression",
    "History",
    "Progress",
    "Recipe",
    "Regression",
    "embed_properties",
    "fit",
    "predict",
    "standardisation",
]
