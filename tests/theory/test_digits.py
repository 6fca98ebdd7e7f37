"""Tasks made of images of digits, and what is measured on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from lorapower.experiments import digits
from lorapower.experiments.digits import CLASSES, LIFT, SIZES, Digits
from lorapower.experiments.study import Construction, Fitted, Setting, Trained, measure

# Networks trained for a short time.
SHORT = Digits(pretraining=150, steps=20)


def reached(problem: Digits, *methods: Any) -> list[Any]:
    return measure([Setting(problem=problem, method=method) for method in methods])


def accuracy(network: Any, labelled: Any) -> float:
    x, y = labelled
    return float((network(x).argmax(0) == y).double().mean())


def test_turning_is_exact_at_right_angles_and_goes_back() -> None:
    pictures = torch.from_numpy(load_digits().images / 16).float()
    for quarter in range(-1, 3):
        wanted = torch.rot90(pictures, quarter, (1, 2))
        assert torch.equal(digits._turn(pictures, 90.0 * quarter), wanted)
    there = digits._turn(pictures, 20.0)
    assert there.min() == 0
    assert there.max() <= 1
    back = (digits._turn(there, -20.0) - pictures).square().mean()
    assert 0 < back < 0.4 * (digits._turn(there, 20.0) - pictures).square().mean()


def test_tasks_split_the_same_images() -> None:
    upright, turned = (digits._task(angle, 3) for angle in (0.0, 90.0))
    assert [len(y) for _, y in upright] == [*SIZES]
    found = load_digits()
    pictures, classes = (torch.from_numpy(part) for part in (found.images / 16, found.target))
    seen = []
    for (x, y), (turned_x, turned_y) in zip(upright, turned, strict=True):
        assert torch.equal(y, turned_y)
        own, other = (part.mT.unflatten(1, (8, 8)) for part in (x, turned_x))
        assert torch.equal(other, torch.rot90(own, 1, (1, 2)))
        seen.append(own)
    # Each image once, and those of equal digits with equal digits.
    rows = torch.cat(seen).flatten(1)
    order = torch.cdist(rows, pictures.flatten(1).float()).argmin(1)
    assert sorted(order.tolist()) == list(range(1797))
    assert torch.equal(classes[order], torch.cat([y for _, y in upright]))
    assert not torch.equal(upright[-1][0], digits._task(0.0, 4)[-1][0])


def test_no_logit_is_cut_off_at_the_start() -> None:
    network = digits._drawn(4, 0, "random")
    assert network.weights[-1].shape == (CLASSES, 64)
    assert (network(digits._task(90.0, 0)[0][0]) > LIFT / 2).all()


def test_trained_networks_read_their_digits() -> None:
    frozen, target = SHORT.networks()
    random = SHORT.replace(start="random").networks()[0]
    # Equal shapes, as adapters need.
    for one, other in zip(frozen.weights, target.weights, strict=True):
        assert one.shape == other.shape
    for network, angle in ((frozen, 0.0), (target, 90.0)):
        own, others = (digits._task(a, 0)[-1] for a in (angle, 90.0 - angle))
        assert accuracy(network, own) > 0.7
        if network is frozen:
            assert accuracy(network, others) < 0.4
        assert accuracy(random, own) < 0.3
    assert SHORT.networks()[0] is frozen


def test_fitted_adapters_are_nearer_with_the_same_rank() -> None:
    plain, fitted, exact = reached(SHORT, Construction(ranks=4), Fitted(ranks=4), Fitted(ranks=64))
    assert fitted.error < plain.error / 2
    assert fitted.accuracy > plain.accuracy
    assert exact.error < 1e-20
    assert 4 < plain.threshold == exact.threshold <= 64


def test_rows_say_what_a_network_does_on_the_test_images() -> None:
    frozen, target = SHORT.networks()
    # No adapters; the biases alone are those of the construction.
    adapted = SHORT.bench().adapt(Construction()).merge(frozen)
    (row,) = reached(SHORT, Construction())
    x, y = digits._task(SHORT.angle, SHORT.seed)[-1]
    got, wanted = adapted(x), target(x)
    assert row.accuracy == (got.argmax(0) == y).double().mean()
    means = wanted.mean(1, keepdim=True)
    error = (got - wanted).square().sum() / (wanted - means).square().sum()
    assert row.error == pytest.approx(float(error), rel=1e-9)
    assert row.target_accuracy == (wanted.argmax(0) == y).double().mean()
    assert row.best_step == -1


def test_training_adapts_to_the_task() -> None:
    problem = SHORT.replace(steps=150)
    adapters, final = Trained(ranks=4, learning_rate=1e-2), Trained(final=2, learning_rate=1e-2)
    together = reached(problem, adapters, final)
    for row in together:
        assert row.accuracy > accuracy(problem.networks()[0], digits._task(90.0, 0)[-1]) + 0.3
        assert 0 < row.best_step <= 150
        assert math.isfinite(row.validation_loss)
    assert repr(reached(problem, adapters)) == repr(together[:1])
