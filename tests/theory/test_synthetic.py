"""The frame of experiments, and random networks in it: what settings mean and what is measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorapower.errors import InputError
from lorapower.experiments.digits import Digits, Readings
from lorapower.experiments.residual import Remainder, Residual, TrainedPart
from lorapower.experiments.study import (
    Construction,
    Course,
    Fitted,
    Problem,
    Setting,
    Trained,
    measure,
)
from lorapower.experiments.sweeps import grid
from lorapower.experiments.synthetic import PRETRAINED, TEST_SAMPLES, Errors, Synthetic
from lorapower.training import train

SMALL = {
    "linear": Synthetic(model="linear", width=6, steps=20, samples=30),
    "fnn": Synthetic(width=6, steps=20, samples=30),
}
UNTUNED = Trained(biases=False)
each_model = pytest.mark.parametrize("model", SMALL)


def reached(problem: Any, *methods: Any) -> list[Any]:
    return measure([Setting(problem=problem, method=method) for method in methods])


# --- The frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("model", lambda: Synthetic(model="cnn")),  # type: ignore[arg-type]
        ("depth", lambda: Synthetic(depth=1, target_depth=2)),
        ("depth", lambda: Digits(depth=1)),
        ("angle", lambda: Digits(angle=361.0)),
        ("learning_rate", lambda: Trained(learning_rate=1e39)),
        ("final", lambda: Trained(ranks=1, final=1)),
        ("problem", lambda: Setting(problem=UNTUNED, method=UNTUNED)),  # type: ignore[arg-type]
        ("method", lambda: Setting(problem=Residual(), method=UNTUNED)),
        ("method", lambda: Setting(problem=Synthetic(), method=TrainedPart())),
        ("ranks", lambda: Setting(problem=Residual(), method=TrainedPart(ranks=9))),
        ("ranks", lambda: Setting(problem=Synthetic(), method=Trained(ranks=17))),
        ("inputs", lambda: Setting(problem=Digits(), method=Fitted(inputs=9))),
        ("settings", lambda: measure([])),
        ("settings", lambda: measure([Setting(problem=p, method=UNTUNED) for p in SMALL.values()])),
    ],
)
def test_what_has_no_meaning_is_refused(field: str, make: Any) -> None:
    with pytest.raises(InputError, match=f"^{field} must be "):
        make()


@pytest.mark.parametrize(
    ("problem", "results"), [(Synthetic, Errors), (Digits, Readings), (Residual, Remainder)]
)
def test_columns_have_one_meaning(problem: type[Problem], results: type[Course]) -> None:
    for method in problem.methods:
        names = [*problem.model_fields, *method.model_fields, *results.model_fields]
        assert len({*names}) == len(names)


@each_model
def test_a_row_does_not_depend_on_the_others(model: str) -> None:
    methods: list[Any] = grid(Trained, ranks=[0, 3], learning_rate=[1e-2, 1e-3])
    methods += [Construction(ranks=2), Trained(final=1), Fitted(ranks=1, inputs=50)]
    together = reached(SMALL[model], *methods)
    for method, row in zip(methods, together, strict=True):
        # Bit by bit; NaN is NaN.
        assert repr(reached(SMALL[model], method)[0]) == repr(row)
    twice = reached(SMALL[model], *reversed(methods), methods[0])
    assert repr(twice[::-1]) == repr([together[0], *together])


def test_runs_that_diverge_are_rows_like_others() -> None:
    problem = SMALL["fnn"].replace(depth=4)
    good, bad = reached(problem, *grid(Trained, ranks=2, learning_rate=[1e-3, 1e6]))
    assert repr(reached(problem, Trained(ranks=2))) == repr([good])
    assert bad.diverged
    assert math.isfinite(bad.error)
    assert math.isfinite(bad.validation_loss)


# --- Random networks ------------------------------------------------------------------------------


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
def test_errors_are_mean_squares_over_fresh_inputs(model: str) -> None:
    problem = SMALL[model].replace(every=10)
    frozen, target = problem.networks()
    (row,) = reached(problem, UNTUNED)
    fresh = problem.data(target)
    x = fresh.test(TEST_SAMPLES)[0].double()
    # The network went through training, in single precision, and nothing of it was tuned.
    assert row.error == pytest.approx(float((frozen(x) - target(x)).square().mean()), rel=1e-5)
    left = target(x) - target(x).mean(1, keepdim=True)
    assert row.variance == pytest.approx(left.square().mean().item(), rel=1e-9)
    x, y = (part.double() for part in fresh.validation)
    wanted = (frozen(x) - y).square().mean().item()
    assert row.validation_loss == pytest.approx(wanted, rel=1e-5)
    assert (row.best_step, row.diverged) == (0, False)


def test_a_row_has_what_training_gives() -> None:
    problem, tuning = SMALL["fnn"], Trained(ranks=3, loss="one-sided", schedule="cosine")
    frozen, target = problem.networks()
    data = problem.data(target)
    runs = train(frozen, [tuning.tuning()], data, steps=problem.steps, seed=problem.seed)
    x, y = data.test(TEST_SAMPLES)
    (row,) = reached(problem, tuning)
    wanted = float((runs.network[0](x) - y).square().mean())
    assert row.error == pytest.approx(wanted, rel=1e-5)


@each_model
@pytest.mark.parametrize("pretraining", [1.0, PRETRAINED])
def test_constructions_are_exact_from_the_threshold(model: str, pretraining: float) -> None:
    # Half the width: two layers for each of the target's.
    problem = SMALL[model].replace(pretraining=pretraining)
    below, at, above = reached(problem, *grid(Construction, ranks=[2, 3, 6]))
    assert below.error > 1e-4 * below.variance
    for row in (at, above):
        # Double precision, of which condition numbers and biases cost some digits.
        assert row.error < 1e-16 * row.variance
        assert math.isnan(row.validation_loss)
        assert row.best_step == -1


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
