"""The weights that a training ends with, and early stopping: by a recipe, and through checkpoints to the same bits."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_training import EPOCHS, Stop, train

from crystalformer.training import Recipe
from crystalformer.training.callbacks import AverageLastEpochs, weight_callbacks

IDENTITY = {"seed": 5}
RECIPES = {
    "ema": Recipe(epochs=EPOCHS, ema=0.9),
    "best": Recipe(epochs=EPOCHS, best_epoch=True),
    "patience": Recipe(epochs=EPOCHS, best_epoch=True, patience=1),
    "ema, patience": Recipe(epochs=EPOCHS, ema=0.5, patience=1),
}


class Trail(Callback):
    """Keeps the weights behind each step, and where epochs end."""

    def __init__(self):
        self.weights, self.ends = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(pl_module.model.embedding.weight.detach().clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(len(self.weights))


def run(recipe, *more, **options):
    """The rows and the model of a training, whose learning rate makes the validation loss rise, too."""
    return train(average=0, callbacks=[*weight_callbacks(recipe), *more], **options)


@pytest.fixture(scope="module")
def losses():
    rows, _ = train(average=0)
    return [row["val_loss"] for row in rows]


def rising(losses):
    """The number of the epoch behind the first one whose loss is no smaller than all before."""
    return next(i + 1 for i in range(1, len(losses)) if losses[i] >= min(losses[:i]))


def test_moving_average():
    trail = Trail()
    _, model = run(RECIPES["ema"], trail)
    mean = trail.weights[0]
    for x in trail.weights[1:]:
        mean = 0.9 * mean + 0.1 * x
    torch.testing.assert_close(model.embedding.weight.detach(), mean)
    assert not torch.equal(model.embedding.weight, trail.weights[-1])


def test_the_epoch_with_the_smallest_validation_loss(losses):
    trail = Trail()
    rows, model = run(RECIPES["best"], trail)
    assert [row["val_loss"] for row in rows] == losses
    best = losses.index(min(losses))
    assert best < EPOCHS - 1  # else it would be the last one, best or not
    assert torch.equal(model.embedding.weight, trail.weights[trail.ends[best] - 1])


def test_patience(losses):
    end = rising(losses)
    assert end < EPOCHS
    rows, _ = run(RECIPES["patience"])
    assert [row["val_loss"] for row in rows] == losses[:end]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_to_the_same_bits(name, epoch, tmp_path):
    recipe = RECIPES[name]
    whole_rows, whole = run(recipe)
    assert len(whole_rows) > epoch
    with pytest.raises(SystemExit):
        run(recipe, Stop(epoch, signal.SIGTERM), checkpoints=tmp_path, identity=IDENTITY)
    for _ in range(2):  # the second time it is complete, and gives its result again
        rows, model = run(recipe, checkpoints=tmp_path, identity=IDENTITY)
        assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in whole_rows]
        weights = whole.state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_what_a_recipe_chooses():
    assert [type(x) for x in weight_callbacks(Recipe())] == [AverageLastEpochs]
    assert weight_callbacks(Recipe(average_epochs=0)) == []
    assert Recipe(ema=0.9).averaged == Recipe(best_epoch=True).averaged == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, r"ema must be at least 0 and smaller than 1, not 1\.0"),
        ({"ema": 0.9, "best_epoch": True}, r"ema must be 0 with best_epoch, not 0\.9"),
        ({"patience": -1}, "patience must be an integer, at least 0 and at most 2147483647, not -1"),
        ({"patience": 3}, r"patience must be 0, not 3, where the model is the mean .*: give best_epoch, ema or av"),
    ],
)
def test_what_excludes_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)
