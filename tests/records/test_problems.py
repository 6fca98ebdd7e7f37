"""Experiments on random networks and on digits: what settings mean and what is measured."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from lorapower.constructions import adapt
from lorapower.errors import InputError
from lorapower.regions import Box
from lorapower.training import train
from records import digits, grid, residual, synthetic
from records.digits import CLASSES, LIFT, SIZES, Digits
from records.methods import Construction, Fitted, Trained
from records.residual import Residual, TrainedPart
from records.synthetic import PRETRAINED, TEST_SAMPLES, Synthetic

SMALL = {
    "linear": Synthetic(model="linear", width=6, steps=20, samples=30),
    "fnn": Synthetic(width=6, steps=20, samples=30),
}
UNTUNED = Trained(biases=False)
# Images of digits, and networks trained for a short time.
SHORT = Digits(pretraining=150, steps=20)
each_model = pytest.mark.parametrize("model", SMALL)


def reached(problem: Any, *methods: Any) -> list[Any]:
    module: Any = synthetic if isinstance(problem, Synthetic) else digits
    return module.measure([module.Run(problem=problem, method=method) for method in methods])


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("model", lambda: Synthetic(model="cnn")),  # type: ignore[arg-type]
        ("depth", lambda: Synthetic(depth=1, target_depth=2)),
        ("depth", lambda: Digits(depth=1)),
        ("angle", lambda: Digits(angle=361.0)),
        ("learning_rate", lambda: Trained(learning_rate=1e39)),
        ("final", lambda: Trained(ranks=1, final=1)),
        ("problem", lambda: synthetic.Run(problem=UNTUNED, method=UNTUNED)),  # type: ignore[arg-type]
        ("method", lambda: residual.Run(problem=Residual(), method=UNTUNED)),  # type: ignore[arg-type]
        ("method", lambda: synthetic.Run(problem=Synthetic(), method=TrainedPart())),  # type: ignore[arg-type]
        ("ranks", lambda: residual.Run(problem=Residual(), method=TrainedPart(ranks=9))),
        ("ranks", lambda: synthetic.Run(problem=Synthetic(), method=Trained(ranks=17))),
        ("model", lambda: synthetic.Run(problem=Synthetic(model="linear"), method=Fitted())),
        ("ranks", lambda: digits.Run(problem=Digits(), method=Trained(ranks=65))),
        ("inputs", lambda: digits.Run(problem=Digits(), method=Fitted(inputs=9))),
    ],
)
def test_what_has_no_meaning_is_refused(field: str, make: Any) -> None:
    with pytest.raises(InputError, match=f"^{field} must be "):
        make()


@pytest.mark.parametrize(
    ("problem", "methods", "results"),
    [
        (Synthetic, [Construction, Fitted, Trained], synthetic.Errors),
        (Digits, [Construction, Fitted, Trained], digits.Readings),
        (Residual, [TrainedPart], residual.Remainder),
    ],
)
def test_columns_have_one_meaning(problem: Any, methods: list[Any], results: Any) -> None:
    for method in methods:
        names = [*problem.model_fields, *method.model_fields, *results.model_fields]
        assert len({*names}) == len(names)


@each_model
def test_a_row_does_not_depend_on_the_others(model: str) -> None:
    methods: list[Any] = grid(Trained, ranks=[0, 3], learning_rate=[1e-2, 1e-3])
    methods += [Construction(ranks=2), Trained(final=1)]
    methods += [Fitted(ranks=1, inputs=50)] * (model == "fnn")
    together = reached(SMALL[model], *methods)
    alone = [reached(SMALL[model], method)[0] for method in methods]
    twice = reached(SMALL[model], *reversed(methods), methods[0])[::-1]
    # Factors that other runs make larger may change the rounding.
    for rows, others in [(alone, together), (twice, [together[0], *together])]:
        one, other = (pd.DataFrame(map(vars, each)) for each in (rows, others))
        pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=0)


@each_model
def test_problems_of_one_seed_have_the_same_networks_and_data(model: str) -> None:
    one, other = SMALL[model], SMALL[model].replace(steps=10)
    for a, b in zip(one.networks(), other.networks(), strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a.weights, b.weights, strict=True))
    target = one.networks()[1]
    found = [problem.data(target).block(1)[0] for problem in (one, other)]
    assert torch.equal(*found)
    again = one.replace(seed=1)
    assert not torch.equal(found[0], again.data(again.networks()[1]).block(1)[0])


@each_model
def test_a_row_has_what_training_gives(model: str) -> None:
    problem = SMALL[model].replace(every=10, depth=4)
    tuning = Trained(ranks=3, schedule="cosine", learning_rate=1e-2)
    tuning = tuning.replace(loss="one-sided") if model == "fnn" else tuning
    (frozen, target), data = problem.networks(), problem.data(problem.networks()[1])
    options: Any = {"steps": problem.steps, "seed": problem.seed, "every": 10}
    runs = train(frozen, [tuning.tuning()], data, **options)
    others: list[Any] = [Trained(ranks=2, learning_rate=1e6), *grid(Construction, ranks=[1, 2, 6])]
    row, bad, below, *exact = reached(problem, tuning, *others)
    x = data.test(TEST_SAMPLES)[0].double()
    off, wanted = runs.network[0].to(torch.float64)(x) - target(x), target(x)
    assert row.error == pytest.approx(float(off.square().mean()), rel=1e-5)
    left = wanted - wanted.mean(1, keepdim=True)
    assert row.variance == pytest.approx(left.square().mean().item(), rel=1e-9)
    assert row.validation_loss == pytest.approx(float(runs.best_loss[0]), rel=1e-5)
    assert (row.best_step, row.diverged) == (int(runs.best_step[0]), False)
    assert bad.diverged
    assert math.isfinite(bad.error)
    # The threshold is half the width for two layers, and less for four.
    assert below.error > 1e-4 * below.variance
    for constructed in exact:
        # Double precision, of which condition numbers and biases cost some digits.
        assert constructed.error < 1e-16 * constructed.variance
        assert math.isnan(constructed.validation_loss)
        assert constructed.best_step == -1


@each_model
@pytest.mark.parametrize("part", [PRETRAINED, 0.25])
def test_pretrained_networks_have_this_part_of_the_loss(model: str, part: float) -> None:
    losses = []
    for pretraining in (1.0, part):
        problem = SMALL[model].replace(samples=256, pretraining=pretraining)
        frozen, target = problem.start()
        # The inputs by which pretraining goes.
        x, y = (part.double() for part in problem.data(target, "pretraining").validation)
        losses.append(float((frozen(x) - y).square().mean()))
    # Pretraining stops at the first step that reaches it, within what that many steps can do.
    assert 0.9 * part < losses[1] / losses[0] <= part * (1 + 1e-5)


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
    for network, angle in ((frozen, 0.0), (target, 90.0)):
        own, others = (digits._task(a, 0)[-1] for a in (angle, 90.0 - angle))
        assert accuracy(network, own) > 0.7
        if network is frozen:
            assert accuracy(network, others) < 0.4
        assert accuracy(random, own) < 0.3
    assert SHORT.networks()[0] is frozen


def test_rows_say_what_a_network_does_on_the_test_images() -> None:
    frozen, target = SHORT.networks()
    # No adapters; the biases alone are those of the construction.
    adapted = adapt(frozen, target, 0, Box(0.0, 1.0), throw=False).adapters.merge(frozen)
    methods: list[Any] = [Construction(), Construction(ranks=4)]
    methods += [Fitted(ranks=4), Fitted(ranks=64), Trained(ranks=4)]
    row, plain, fitted, exact, trained = reached(SHORT, *methods)
    assert fitted.error < plain.error / 2
    assert fitted.accuracy > plain.accuracy
    assert exact.error < 1e-20
    assert 4 < plain.threshold == exact.threshold <= 64
    assert 0 < trained.best_step <= SHORT.steps
    x, y = digits._task(SHORT.angle, SHORT.seed)[-1]
    got, wanted = adapted(x), target(x)
    assert row.accuracy == (got.argmax(0) == y).double().mean()
    means = wanted.mean(1, keepdim=True)
    error = (got - wanted).square().sum() / (wanted - means).square().sum()
    assert row.error == pytest.approx(float(error), rel=1e-9)
    assert row.target_accuracy == (wanted.argmax(0) == y).double().mean()
    assert row.best_step == -1
