"""Learning rates by the name of their schedule, over all steps of a training and through its checkpoints."""

import math
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from small_training import EPOCHS, SMALL, Stop, data, train

from crystalformer import Crystalformer
from crystalformer.training import Recipe

LR = 2e-2


class Rates(Callback):
    """Keeps the learning rate of each step."""

    def __init__(self):
        self.rates, self.epochs = [], []

    def on_train_batch_start(self, trainer, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.epochs.append(trainer.current_epoch)


def rates(schedule, **options):
    noted = Rates()
    train(schedule=schedule, callbacks=[noted], **options)
    return noted


def test_steps_are_counted_where_their_number_differs_from_epoch_to_epoch():
    crystals = data(Crystalformer(SMALL))
    largest = max(x.images.num_images for x in crystals.crystals)
    sampler = crystals.loader(8, seed=5, max_images=largest - 1).sampler
    numbers = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        numbers.append(len(sampler.batches))
    assert len(set(numbers)) > 1
    assert sampler.steps(20) == sum(numbers)
    free = crystals.loader(8, seed=5).sampler
    assert free.steps(20) == 20 * len(free.batches) == 60


@pytest.mark.parametrize("average", [0, 2])
def test_cosine(average):
    """It goes on through the epochs of the average."""
    found = rates("cosine", average=average).rates
    number = len(found)
    assert found == pytest.approx([LR * (1 + math.cos(math.pi * t / number)) / 2 for t in range(number)], rel=1e-9)


def test_one_cycle():
    found = rates("one_cycle").rates
    top = found.index(max(found))
    assert found[0] == pytest.approx(LR / 25)
    assert found[-1] == pytest.approx(LR / 25 / 1e4)
    assert top == pytest.approx(0.3 * len(found), abs=1)
    assert max(found) == pytest.approx(LR, rel=0.05)
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_the_average_holds_the_rate_of_the_papers_schedule():
    noted = rates("inverse_sqrt")
    begun = noted.epochs.index(EPOCHS - 2)
    expected = [LR * math.sqrt(4000 / (4000 + min(t, begun))) for t in range(len(noted.rates))]
    assert noted.rates == pytest.approx(expected, rel=1e-12)
    assert set(rates("constant").rates) == {LR}


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
def test_resumed_to_the_same_bits(schedule, tmp_path):
    (_, whole), identity = train(schedule=schedule), {"schedule": schedule}
    with pytest.raises(SystemExit):
        train(schedule=schedule, callbacks=[Stop(4, signal.SIGTERM)], checkpoints=tmp_path, identity=identity)
    _, model = train(schedule=schedule, checkpoints=tmp_path, identity=identity)
    weights = whole.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_a_schedule_that_is_none():
    with pytest.raises(ValueError, match="schedule must be one of inverse_sqrt, cosine, one_cycle, constant, not 'no'"):
        Recipe(schedule="no")
