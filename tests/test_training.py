"""The recipe: schedule, weight decay, standardisation, averaging, progress, and the same bits from the same seed."""

import dataclasses
import math

import pytest
import torch

from crystalformer import Crystalformer, CrystalformerConfig
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training import (
    PRESETS,
    AverageLastEpochs,
    CrystalDataset,
    Progress,
    Recipe,
    Regression,
    fit,
    predict,
    standardisation,
)

SMALL = CrystalformerConfig(
    num_targets=2,
    model_dim=16,
    num_heads=2,
    num_blocks=2,
    ff_dim=32,
    readout_dims=(16,),
    num_basis=8,
    r0=(0.7,),
    tol=1e-3,
)
NAMES = ("energy", "volume")


@pytest.fixture(scope="module")
def data() -> CrystalDataset:
    crystals = ionic_crystals(24, seed=1)
    targets = torch.tensor([[x.energy, x.structure.volume] for x in crystals])
    return CrystalDataset([x.structure for x in crystals], targets, Crystalformer(SMALL))


def new_task(data: CrystalDataset, lr: float = 5e-4) -> Regression:
    torch.manual_seed(0)
    model = Crystalformer(SMALL)
    model.calibrate(next(iter(data.loader(len(data))))[0])
    return Regression(model, *standardisation(data.targets), names=NAMES, lr=lr)


def test_same_seed_same_weights_and_the_loss_goes_down(data):
    def trained(seed, epochs=5):
        task = new_task(data, lr=2e-2)
        history = fit(task, data.loader(8, seed), data.loader(8), epochs)
        return history, task.model.state_dict()

    (history, first), (_, second), (_, other) = trained(3), trained(3), trained(4, epochs=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in history] == [3, 6, 9, 12, 15]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert history[-1]["val_loss"] < history[0]["val_loss"]


def test_errors_are_logged_in_units_and_the_saved_model_predicts_in_units(data, tmp_path):
    task = new_task(data)
    history = fit(task, data.loader(8, 0), data.loader(8), epochs=2)
    predictions = predict(task.model, data.loader(8))
    errors = (predictions - data.targets).abs().mean(0)
    for name, error in zip(NAMES, errors, strict=True):
        assert history[-1][f"val_mae/{name}"] == pytest.approx(float(error), rel=1e-4)
    loss = (errors / standardisation(data.targets)[1]).mean()
    assert history[-1]["val_loss"] == pytest.approx(float(loss), rel=1e-4)

    task.model.save_pretrained(tmp_path)
    torch.testing.assert_close(predict(Crystalformer.from_pretrained(tmp_path), data.loader(8)), predictions)


def test_finish_folds_the_units_into_the_model(data):
    task = new_task(data)
    batch = next(iter(data.loader(8))).crystals
    with torch.no_grad():
        in_units = task(batch)
        torch.testing.assert_close(task.finish()(batch), in_units)


def test_learning_rate_and_weight_decay(data):
    task = new_task(data)
    chosen = task.configure_optimizers()
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]
    assert schedule["interval"] == "step"
    for step in range(4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4 * math.sqrt(4000 / (4000 + step)), rel=1e-12)
        optimizer.step()
        schedule["scheduler"].step()
    assert 5e-4 * schedule["scheduler"].lr_lambdas[0](12000) == pytest.approx(2.5e-4)

    name_of = {parameter: name for name, parameter in task.named_parameters()}
    weights, biases = ([name_of[x] for x in group["params"]] for group in optimizer.param_groups)
    # The paper's code gives biases no decay of their own: they have AdamW's default.
    default = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).defaults["weight_decay"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-5, default]
    assert all(recipe.bias_decay == default for recipe in PRESETS.values())
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)
    assert biases
    assert all(name.endswith("bias") for name in biases)
    assert not any(name.endswith("bias") for name in weights)
    assert len(weights) + len(biases) == len(name_of)


def test_standardisation():
    mean, deviation = standardisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2.0, 5.0]
    assert deviation.tolist() == [1.0, 1.0]
    assert mean.dtype == deviation.dtype == torch.float64
    tenths = torch.full((3, 1), 0.1, dtype=torch.float64)
    assert tenths.mean() != 0.1  # equal all the same
    assert [x.item() for x in standardisation(tenths)] == [0.1, 1.0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(0, 2), r"targets must be \(C,T\) of at least one crystal, not \(0, 2\)"),
        (torch.zeros(3), r"targets must be \(C,T\) of at least one crystal, not \(3,\)"),
        (torch.tensor([[0.0], [math.inf]]), r"targets must be finite, but targets\[1, 0\] is inf"),
        (torch.tensor([[0.0], [math.nan]]), r"a known value in each row, but targets\[1\] is \[nan\]"),
        (torch.tensor([[0.0], [1e300]], dtype=torch.float64), "the deviation of targets must be finite"),
    ],
)
def test_targets_that_cannot_be_standardised(targets, message):
    with pytest.raises(ValueError, match=message):
        standardisation(targets)


def test_an_offset_of_the_targets_changes_nothing_else(data):
    """In fp32 -1e6 would leave steps of 0.06: of targets, of the model's predictions and of what is logged."""
    offset = torch.tensor([-1e6, 1e9], dtype=torch.float64)
    results = []
    for shift in (torch.zeros(2), offset):
        shifted = CrystalDataset(data.crystals, data.targets + shift, Crystalformer(SMALL))
        task = new_task(shifted, lr=2e-2)
        history = fit(task, shifted.loader(8, 0), shifted.loader(8), epochs=2)
        with torch.no_grad():
            batch = next(iter(shifted.loader(8))).crystals
            assert torch.equal(task.model.float()(batch) - shift, predict(task.model, shifted.loader(8))[:8] - shift)
        results.append((predict(task.model, shifted.loader(8)) - shift, history))
    (plain, plain_history), (moved, moved_history) = results
    assert plain.dtype == moved.dtype == torch.float64
    tolerance = 1e-4 * standardisation(data.targets)[1]
    assert ((plain - moved).abs() < tolerance).all()
    assert (plain.std(0) > 100 * tolerance).all()
    for name in ("val_loss", "val_mae/energy", "val_mae/volume"):
        assert moved_history[-1][name] == pytest.approx(plain_history[-1][name], rel=1e-5)


def test_a_trained_model_learns_other_targets(data):
    """With its units: they are part of what it predicts with, until others take their place."""
    task = new_task(data)
    fit(task, data.loader(8, 0), data.loader(8), epochs=1)
    other = CrystalDataset(data.crystals, data.targets * 3 + 1e6, task.model)
    again = Regression(task.model.train(), *standardisation(other.targets), names=NAMES)
    with torch.no_grad():
        batch = next(iter(other.loader(8))).crystals
        before = again(batch)
    history = fit(again, other.loader(8, 0), other.loader(8), epochs=1)
    errors = (predict(again.model, other.loader(8)) - other.targets).abs().mean(0)
    assert [history[-1][f"val_mae/{name}"] for name in NAMES] == pytest.approx(errors.tolist(), rel=1e-5)
    assert not torch.equal(before, again.model(batch))


def test_average_of_the_last_epochs(data):
    class Trail(Progress):
        """Keeps the weights behind each step."""

        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            self.weights.append(pl_module.model.embedding.weight.detach().clone())

    trail = Trail("energy", "eV/atom")
    task = new_task(data)
    fit(task, data.loader(8, 0), data.loader(8), epochs=3, callbacks=[trail, AverageLastEpochs(2)])
    torch.testing.assert_close(task.model.embedding.weight.detach(), torch.stack(trail.weights[3:]).mean(0))


def test_stopping_before_the_average_begins_keeps_the_weights(data):
    task = new_task(data)
    before = task.model.embedding.weight.detach().clone()
    history = fit(task, data.loader(8, 0), data.loader(8), 10_000, [AverageLastEpochs(1)], max_seconds=1)
    assert 1 <= len(history) < 10_000
    assert not torch.equal(task.model.embedding.weight.detach(), before)


def test_progress_prints_lines_where_there_is_no_terminal(data, capsys):
    fit(new_task(data), data.loader(8, 0), data.loader(8), 2, [Progress("energy", "eV/atom")])
    out, err = capsys.readouterr()
    assert [line.split("  ")[1:2] for line in out.splitlines()] == [["epoch"], ["epoch"]]
    assert err == ""


def test_a_validation_that_is_not_finite_ends_the_training(data):
    far = CrystalDataset(data.crystals, data.targets + 1e300, Crystalformer(SMALL))
    with pytest.raises(FloatingPointError, match="the validation loss of epoch 1 is not finite: lower lr"):
        fit(new_task(data), data.loader(8, 0), far.loader(8), epochs=2)


def test_a_trained_model_knows_its_elements(data):
    task = new_task(data)
    fit(task, data.loader(8, 0), data.loader(8), epochs=1)
    expected = sorted({int(z) for crystal in data.crystals for z in crystal.species})
    assert task.model.config.elements == data.elements == tuple(expected)
    species = torch.zeros(len(data.crystals[0].species), 98)
    species[:, [7, 25]] = 0.5
    mixed = dataclasses.replace(data.crystals[0], species=species)
    assert CrystalDataset([mixed], data.targets[:1], task.model).elements == (8, 26)
    assert task.finish(elements=(1,)).config.elements == (1, *expected)
    unknown = Crystalformer(SMALL).rescale_(torch.zeros(2), torch.ones(2))  # trained before, by what did not say
    assert Regression(unknown, *standardisation(data.targets), names=NAMES).finish(data.elements).config.elements == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9,)}, r"betas must be two numbers, not \(0\.9,\)"),
        ({"betas": 0.9}, r"betas must be two numbers, not 0\.9"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and smaller than 1, not 1\.0"),
        ({"betas": (0.9, True)}, "betas must be a number, not bool"),
        ({"betas": (0.9, math.nan)}, "betas must be at least 0 and smaller than 1, not nan"),
        ({"epochs": True}, "epochs must be an integer, at least 1 and at most 2147483647, not True"),
        ({"epochs": 10**30}, "epochs must be an integer, at least 1 and at most 2147483647, not 1000"),
        ({"batch_size": 2.0}, r"batch_size must be an integer, at least 1 and at most 2147483647, not 2\.0"),
        (
            {"max_images_per_batch": 0},
            "max_images_per_batch must be an integer, at least 1 and at most 2147483647, not 0",
        ),
        ({"lr": math.nan}, r"lr must be larger than 0 and smaller than 1e\+06, not nan"),
        ({"lr": "fast"}, "lr must be a number, not str"),
        ({"weight_decay": -1e-5}, r"weight_decay must be at least 0 and smaller than 1e\+06, not -1e-05"),
        ({"weight_decay": math.inf}, r"weight_decay must be at least 0 and smaller than 1e\+06, not inf"),
        ({"decay_steps": None}, "decay_steps must be an integer, at least 1 and at most 2147483647, not None"),
        ({"gradient_norm": 0}, "gradient_norm must be larger than 0 and finite, not 0"),
        ({"average_epochs": -1}, "average_epochs must be an integer, at least 0 and at most 2147483647, not -1"),
    ],
)
def test_recipe_says_what_is_wrong(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Recipe(**options)


def test_wrong_arguments(data):
    with pytest.raises(ValueError, match=r"targets must be finite, but targets\[3, 1\] is inf"):
        CrystalDataset(data.crystals[:5], torch.tensor([[0.0, 0.0]] * 3 + [[0.0, math.inf]] * 2), Crystalformer(SMALL))
    model = Crystalformer(SMALL)
    with pytest.raises(ValueError, match=r"targets must be \(1, T\), as crystals, not \(2, 1\)"):
        CrystalDataset([ionic_crystals(1)[0].structure], torch.zeros(2, 1), model)
    with pytest.raises(ValueError, match="must be of 2 targets, as the model, not 1"):
        Regression(model, torch.zeros(1), torch.ones(1))
