"""Real images, the tasks made of them, and what is measured on these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lorapower.experiments import digits
from lorapower.experiments.digits import CLASSES, LIFT, SIZES, Digits
from lorapower.experiments.study import Construction, Fitted, Setting, Trained, measure

each_model = pytest.mark.parametrize("model", ["fnn", "transformer"])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks trained for a short time, which no other test meets."""
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 150)
    digits._pretrained.cache_clear()
    digits._target.cache_clear()
    yield
    digits._pretrained.cache_clear()
    digits._target.cache_clear()


def reached(problem: Digits, *methods: Any) -> list[Any]:
    return measure([Setting(problem=problem, method=method) for method in methods])


def accuracy(network: Any, labelled: Any) -> float:
    x, y = labelled
    return float((digits._votes(network, x).argmax(0) == y).double().mean())


def test_images_are_grey_values_with_their_digits() -> None:
    pictures, classes = digits.images()
    assert pictures.shape == (1797, 8, 8)
    assert pictures.min() == 0
    assert pictures.max() == 1
    assert sorted(set(classes.tolist())) == list(range(10))
    # A zero has a hole where a one has its stroke.
    middle = pictures[:, 3:5, 3:5].mean((1, 2))
    assert middle[classes == 0].mean() < 0.3 < middle[classes == 1].mean()


def test_turning_is_exact_at_right_angles_and_goes_back() -> None:
    pictures, _ = digits.images()
    for quarter in range(-1, 3):
        wanted = torch.rot90(pictures, quarter, (1, 2))
        assert torch.equal(digits._turn(pictures, 90.0 * quarter), wanted)
    there = digits._turn(pictures, 20.0)
    assert there.min() == 0
    assert there.max() <= 1
    back = (digits._turn(there, -20.0) - pictures).square().mean()
    assert 0 < back < 0.4 * (digits._turn(there, 20.0) - pictures).square().mean()


@each_model
def test_tasks_split_the_same_images(model: str) -> None:
    upright, turned = (digits._task(model, angle, 3) for angle in (0.0, 90.0))
    assert [len(y) for _, y in upright] == [*SIZES.values()]
    pictures, classes = digits.images()
    seen = []
    for (x, y), (turned_x, turned_y) in zip(upright, turned, strict=True):
        assert torch.equal(y, turned_y)
        if model == "fnn":
            own, other = (part.mT.unflatten(1, (8, 8)) for part in (x, turned_x))
        else:
            own, other = (part[:, :8].mT for part in (x, turned_x))
            assert torch.equal(x[:, 8:], torch.eye(8).expand(len(x), 8, 8))
        assert torch.equal(other, torch.rot90(own, 1, (1, 2)))
        seen.append(own)
    # Each image once, and those of equal digits with equal digits.
    rows = torch.cat(seen).flatten(1)
    order = torch.cdist(rows, pictures.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(1797))
    assert torch.equal(classes[order], torch.cat([y for _, y in upright]))
    assert not torch.equal(upright.test[0], digits._task(model, 0.0, 4).test[0])


def test_votes_are_sums_over_tokens_and_none_is_cut_off_at_the_start() -> None:
    network = digits._drawn("transformer", 1, 0, "random")
    x = digits._task("transformer", 0.0, 0).test[0][:5]
    wanted = torch.stack([network(one).sum(-1) for one in x], dim=1)
    torch.testing.assert_close(digits._votes(network, x), wanted)
    network = digits._drawn("fnn", 4, 0, "random")
    assert network.weights[-1].shape == (CLASSES, 64)
    assert (network(digits._task("fnn", 90.0, 0).training[0]) > LIFT / 2).all()


@each_model
def test_trained_networks_read_their_digits(model: str) -> None:
    depth = digits.DEPTHS[model]
    frozen, target = digits._pretrained(model, depth, 0), digits._target(model, 90.0, 0)
    random = digits._drawn(model, depth, 0, "random")
    # Equal shapes, as adapters need.
    for one, other in zip(frozen.weights, target.weights, strict=True):
        assert one.shape == other.shape
    for network, angle in ((frozen, 0.0), (target, 90.0)):
        own, others = (digits._task(model, a, 0).test for a in (angle, 90.0 - angle))
        assert accuracy(network, own) > 0.7
        if network is frozen:
            assert accuracy(network, others) < 0.4
        assert accuracy(random, own) < 0.3
    assert digits._pretrained(model, depth, 0) is frozen


def test_fitted_adapters_are_nearer_with_the_same_rank() -> None:
    plain, fitted, exact = reached(
        Digits(steps=20), Construction(ranks=4), Fitted(ranks=4), Fitted(ranks=64)
    )
    assert fitted.error < plain.error / 2
    assert fitted.accuracy > plain.accuracy
    assert math.isnan(fitted.bound)
    assert exact.error < 1e-20


@each_model
def test_rows_say_what_a_network_does_on_the_test_images(model: digits.Model) -> None:
    problem = Digits(model=model, depth=digits.DEPTHS[model], steps=20)
    frozen, target = problem.networks()
    # No adapters; the biases alone are those of the construction.
    adapted = problem.bench().adapt(Construction())[0].merge(frozen)
    (row,) = reached(problem, Construction())
    x, y = problem.task.test
    got, wanted = (digits._votes(network, x) for network in (adapted, target))
    assert row.accuracy == (got.argmax(0) == y).double().mean()
    means = wanted.mean(1, keepdim=True)
    error = (got - wanted).square().sum() / (wanted - means).square().sum()
    assert row.error == pytest.approx(float(error), rel=1e-9)
    assert row.target_accuracy == (wanted.argmax(0) == y).double().mean()
    assert row.frozen_accuracy == accuracy(frozen, (x, y))
    assert row.best_step == -1


@each_model
def test_training_adapts_to_the_task(model: digits.Model) -> None:
    problem = Digits(model=model, depth=digits.DEPTHS[model], steps=150)
    adapters = Trained(ranks=4, learning_rate=1e-2)
    final = Trained(final=len(problem.networks()[0].weights), learning_rate=1e-2)
    together = reached(problem, adapters, final)
    for row in together:
        assert row.accuracy > row.frozen_accuracy + 0.3
        assert 0 < row.best_step <= 150
        assert math.isfinite(row.validation_loss)
    assert repr(reached(problem, adapters)) == repr(together[:1])
