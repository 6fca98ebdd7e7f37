"""The study's experiments: what settings mean, and what is measured for them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch

from lorapower.errors import InputError
from lorapower.experiments import synthetic
from lorapower.experiments.study import Final, Lora, keep_best
from lorapower.experiments.sweeps import grid
from lorapower.experiments.synthetic import (
    PRETRAINED,
    SHIFT,
    Construction,
    Errors,
    Problem,
    Setting,
)

SMALL: dict[str, Problem] = {
    "linear": Problem(model="linear", width=6, steps=20, samples=30),
    "fnn": Problem(model="fnn", width=6, steps=20, samples=30),
    "transformer": Problem(
        model="transformer", width=6, depth=1, tokens=4, scale=6**-0.5, steps=20, samples=10
    ),
}
UNTUNED = Lora(biases=False)
each_model = pytest.mark.parametrize("model", SMALL)


def measure(problem: Problem, *methods: Any) -> list[Errors]:
    return synthetic.measure([Setting(problem=problem, method=method) for method in methods])


def assert_same(found: Errors, wanted: Errors) -> None:
    """Bit by bit; NaN is NaN."""
    assert repr(found) == repr(wanted)


def transformer(**values: Any) -> dict[str, Any]:
    return {"problem": {"model": "transformer", "depth": 1} | values}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", {"problem": {"model": "cnn"}}),
        ("depth", {"problem": {"depth": 1, "target_depth": 2}}),
        ("task", {"problem": {"model": "linear", "task": "binary"}}),
        ("depth", transformer(depth=2)),
        ("fixed", transformer(fixed=True)),
        ("gain", transformer(gain=2.0)),
        ("distance_rank", transformer(distance_rank=1)),
        ("method", {"method": {"kind": "adam"}}),
        ("ranks", {"method": {"kind": "lora", "ranks": (1, 17)}}),
        ("ranks", {"method": {"kind": "fused", "ranks": 17}}),
        ("learning_rate", {"method": {"kind": "lora", "learning_rate": 1e39}}),
        ("region", {"problem": {"model": "linear"}, "method": Construction(region=2.0)}),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{field} must be "):
        Setting(**values)


@each_model
def test_problems_of_one_seed_have_the_same_networks_and_data(model: str) -> None:
    one, other = SMALL[model], SMALL[model].replace(steps=10)
    for a, b in zip(one.networks(), other.networks(), strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a.weights, b.weights, strict=True))
    target = one.networks()[1]
    found = [problem.data(target)[0].block(1)[0] for problem in (one, other)]
    assert torch.equal(*found)
    again = one.replace(seed=1)
    assert not torch.equal(found[0], again.data(again.networks()[1])[0].block(1)[0])


@pytest.mark.parametrize("settings", [[], grid(Setting, problem=grid(Problem, seed=[0, 1]))])
def test_several_problems_are_refused_together(settings: Any) -> None:
    with pytest.raises(InputError, match="settings must be of one problem"):
        synthetic.measure(settings)


@each_model
def test_a_row_does_not_depend_on_the_others(model: str) -> None:
    methods: list[Any] = grid(Lora, ranks=[0, 3], learning_rate=[1e-2, 1e-3])
    methods.append(Construction(ranks=2))
    if model != "transformer":
        methods.append(Final())
    together = measure(SMALL[model], *methods)
    for method, row in zip(methods, together, strict=True):
        assert_same(measure(SMALL[model], method)[0], row)
    twice = [*reversed(methods), methods[0]]
    for row, backwards in zip(
        [together[0], *together], measure(SMALL[model], *twice)[::-1], strict=True
    ):
        assert_same(backwards, row)


@each_model
def test_errors_are_mean_squares_over_fresh_inputs(model: str) -> None:
    problem = SMALL[model].replace(every=10)
    frozen, target = problem.networks()
    (row,) = measure(problem, UNTUNED)
    fresh = problem.data(target)[1]
    x = fresh.test(synthetic.TEST_SAMPLES)[0].double()
    # The network went through training, in single precision, and nothing of it was tuned.
    for name, inputs in (("error", x), ("shifted_error", synthetic.SHIFT * x)):
        wanted = (frozen(inputs) - target(inputs)).square().mean().item()
        assert getattr(row, name) == pytest.approx(wanted, rel=1e-5)
    assert row.signal == pytest.approx(target(x).square().mean().item(), rel=1e-12)
    best_constant = target(x).transpose(0, -2).flatten(1).mean(1, keepdim=True)
    left = target(x) - best_constant
    assert row.variance == pytest.approx(left.square().mean().item(), rel=1e-9)
    x, y = (part.double() for part in fresh.validation)
    wanted = (frozen(x) - y).square().mean().item()
    assert row.validation_loss == pytest.approx(wanted, rel=1e-5)
    assert row.best_step == 0
    assert not row.diverged
    assert math.isnan(row.accuracy)
    assert math.isnan(row.training_error)


@each_model
@pytest.mark.parametrize("pretraining", [1.0, PRETRAINED])
def test_constructions_are_exact_from_the_threshold(model: str, pretraining: float) -> None:
    # Half the width: two layers for each of the target's.
    problem = SMALL[model].replace(pretraining=pretraining)
    below, at, above = measure(problem, *grid(Construction, ranks=[2, 3, 6]))
    assert below.error > 1e-4 * below.signal
    for row in (at, above):
        # Double precision, of which condition numbers and biases cost some digits.
        assert row.error < 1e-16 * row.signal
        assert math.isnan(row.validation_loss)
        assert row.best_step == -1


@each_model
def test_training_reduces_the_error(model: str) -> None:
    problem = SMALL[model].replace(steps=300)
    untuned, tuned = measure(problem, UNTUNED, Lora(ranks=3, learning_rate=1e-2))
    assert tuned.error < 0.7 * untuned.error
    assert tuned.validation_loss < 0.7 * untuned.validation_loss


def mean_square(problem: Problem) -> float:
    """Of the error at the start, on the inputs by which pretraining goes."""
    frozen, target = problem.start()
    data, _ = problem.data(target, "pretraining")
    x, y = (part.double() for part in data.validation)
    return float((frozen(x) - y).square().mean())


@each_model
@pytest.mark.parametrize("part", [PRETRAINED, 0.25])
def test_pretrained_networks_have_this_part_of_the_loss(model: str, part: float) -> None:
    random, pretrained = (
        mean_square(SMALL[model].replace(samples=256, pretraining=p)) for p in (1.0, part)
    )
    # Pretraining stops at the first step that reaches it, within what that many steps can do.
    assert 0.9 * part < pretrained / random <= part * (1 + 1e-5)


@pytest.mark.parametrize("model", ["linear", "fnn"])
def test_near_targets_have_the_distance_asked_for(model: str) -> None:
    problem = SMALL[model].replace(depth=4, target_depth=2, distance=0.3, distance_rank=2)
    frozen, target = problem.networks()
    for l, weight in enumerate(target.weights):
        block = frozen.weights[2 * l + 1] @ frozen.weights[2 * l]
        change = weight - block
        assert torch.linalg.matrix_rank(change) == 2
        size = torch.linalg.matrix_norm(change) / torch.linalg.matrix_norm(block)
        assert size.item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_accuracy_is_the_part_in_the_targets_class(task: str) -> None:
    problem = SMALL["fnn"].replace(task=task)
    untuned, constructed = measure(problem, UNTUNED, Construction(ranks=3))
    assert constructed.accuracy == 1
    frozen, target = problem.networks()
    x = problem.data(target)[1].test(synthetic.TEST_SAMPLES)[0].double()

    def classes(out: torch.Tensor) -> torch.Tensor:
        return out.argmax(0) if task == "multiclass" else (out[3:].sum(0) > out[:3].sum(0)).long()

    wanted = (classes(frozen(x)) == classes(target(x))).double().mean().item()
    # Some inputs may be so near a boundary that rounding to single precision decides.
    assert untuned.accuracy == pytest.approx(wanted, abs=2 / synthetic.TEST_SAMPLES)
    (tuned,) = measure(problem.replace(steps=300), Lora(ranks=6, learning_rate=1e-2))
    assert tuned.accuracy > untuned.accuracy


def test_a_fixed_training_set_is_learnt_better_than_fresh_inputs() -> None:
    problem = SMALL["fnn"].replace(fixed=True, samples=8, steps=500, every=10)
    (row,) = measure(problem, Lora(ranks=6, learning_rate=1e-2))
    assert row.training_error < 0.5 * row.error


def test_runs_that_diverge_are_rows_like_others() -> None:
    problem = SMALL["fnn"].replace(depth=4)
    good, bad = measure(problem, *grid(Lora, ranks=2, learning_rate=[1e-3, 1e6]))
    assert_same(measure(problem, Lora(ranks=2))[0], good)
    assert bad.diverged
    assert math.isfinite(bad.error)
    assert math.isfinite(bad.validation_loss)


def test_the_best_grid_point_has_the_least_validation_loss() -> None:
    adam = grid(Lora, ranks=[1, 2], learning_rate=[1e-2, 1e-3, 1e-4], weight_decay=[0.0, 0.1])
    losses = [5, 2, math.nan, 3, 2.5, 9, math.inf, math.nan, 1, 1, 4, 7, math.nan]
    rows = [
        {"seed": 0, "method": type(method).__name__, **dict(method), "validation_loss": loss}
        for method, loss in zip([*adam, Construction(ranks=1)], losses, strict=True)
    ]
    # Of two that are equal, the first.
    assert keep_best(pd.DataFrame(rows), Setting).index.tolist() == [1, 8, 12]


def test_gain_scales_the_frozen_weights_alone() -> None:
    problems = Problem(depth=3, width=5), Problem(depth=3, width=5, gain=2.0)
    networks: Any = [problem.networks() for problem in problems]
    (plain, target), (scaled, same) = networks
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=0, atol=0)
    for one, other in zip(
        [*plain.biases, *target.weights, *target.biases],
        [*scaled.biases, *same.weights, *same.biases],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_region_decides_where_a_construction_is_exact() -> None:
    near, far = measure(Problem(width=6), *grid(Construction, ranks=3, region=[1.0, SHIFT]))
    for found in (near, far):
        assert found.error < 1e-20 * found.signal
    assert far.shifted_error < 1e-18 * SHIFT**2 * far.signal
    assert near.shifted_error > 1e-4 * SHIFT**2 * near.signal
