"""The study's experiments: what settings mean, and what is measured for them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lorapower import InputError
from lorapower.experiments import synthetic
from lorapower.experiments.synthetic import PRETRAINED, SHIFT, Setting, best, measure

SMALL: dict[str, Setting] = {
    "linear": Setting("linear", width=6, steps=20, samples=30),
    "fnn": Setting("fnn", width=6, steps=20, samples=30),
    "transformer": Setting(
        "transformer", width=6, depth=1, tokens=4, scale=6**-0.5, steps=20, samples=10
    ),
}
each_model = pytest.mark.parametrize("model", SMALL)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit by bit; NaN is NaN."""
    pd.testing.assert_frame_equal(
        pd.DataFrame([found]), pd.DataFrame([wanted]), check_exact=True, check_like=False
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "cnn"}, "model must be one of linear, fnn, transformer; got 'cnn'"),
        ({"method": "adam"}, "method must be one of"),
        ({"task": "ranking"}, "task must be one of"),
        ({"width": 0}, "width must be"),
        ({"width": 16.0}, "width must be an integer"),
        ({"depth": 1, "target_depth": 2}, "depth must be an integer from 2"),
        ({"steps": 10, "every": 11}, "every must be an integer from 1 to 10"),
        ({"seed": -1}, "seed must be"),
        ({"ranks": 17}, "from 0 to 16"),
        ({"ranks": -1}, "ranks must be"),
        ({"ranks": (1, 17)}, "from 0 to 16"),
        ({"ranks": "all"}, "must be an integer"),
        ({"ranks": (1, 1, 1)}, "ranks must be one or 2, one for each weight; got 3 of them"),
        ({"model": "transformer", "depth": 1, "ranks": (1, 1)}, "one or 11, one for each weight"),
        (
            {"model": "transformer", "depth": 1, "method": "construction", "ranks": (1,) * 11},
            "ranks must be one; got 11",
        ),
        ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
        ({"scale": math.inf}, "scale must be"),
        ({"gain": 0.0}, "gain must be"),
        ({"pretraining": 0.0}, "pretraining must be"),
        ({"distance": -1.0, "distance_rank": 1}, "distance must be"),
        ({"distance_rank": 17}, "distance_rank must be"),
        ({"final": 1}, "final must be above 0 with method 'final'"),
        ({"method": "final"}, "final must be above 0 with method 'final'"),
        ({"method": "final", "final": 3}, "from 0 to 2"),
        ({"model": "transformer", "depth": 2}, "depth must be target_depth"),
        ({"model": "transformer", "depth": 1, "fixed": True}, "model must be linear or fnn"),
        ({"model": "transformer", "depth": 1, "gain": 2.0}, "fixed or gain"),
        ({"model": "linear", "task": "binary"}, "task must be regression"),
        ({"task": "binary", "width": 1}, "at least 2"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Setting(**values)


def test_settings_of_one_problem_differ_in_the_method_alone() -> None:
    one = Setting(ranks=3, learning_rate=1e-2, weight_decay=0.1, biases=False)
    other = Setting(method="final", final=1)
    assert one.problem == other.problem == Setting(method="construction", ranks=2).problem
    for changed in ({"seed": 1}, {"steps": 9}, {"width": 8}, {"task": "binary"}, {"fixed": True}):
        assert replace(one, **changed).problem != one.problem


@each_model
def test_settings_of_one_problem_share_networks_and_data(model: str) -> None:
    one, other = replace(SMALL[model], ranks=1), replace(SMALL[model], ranks=2, biases=False)
    for a, b in zip(one.networks(), other.networks(), strict=True):
        assert all(torch.equal(v, w) for v, w in zip(a.weights, b.weights, strict=True))
    target = one.networks()[1]
    found = [setting.data(target)[0].block(1)[0] for setting in (one, other)]
    assert torch.equal(*found)
    again = replace(one, seed=1)
    assert not torch.equal(found[0], again.data(again.networks()[1])[0].block(1)[0])


def test_several_problems_are_refused_together() -> None:
    with pytest.raises(InputError, match="of one problem"):
        measure([SMALL["fnn"], replace(SMALL["fnn"], seed=1)])


@each_model
def test_a_row_does_not_depend_on_the_others(model: str) -> None:
    small = SMALL[model]
    settings = [replace(small, ranks=r, learning_rate=lr) for r in (0, 3) for lr in (1e-2, 1e-3)]
    settings.append(replace(small, method="construction", ranks=2))
    if model != "transformer":
        settings.append(replace(small, method="final", final=1))
    together = measure(settings)
    for setting, row in zip(settings, together, strict=True):
        assert_same(measure([setting])[0], row)
    for row, backwards in zip(together, measure(settings[::-1])[::-1], strict=True):
        assert_same(backwards, row)


@each_model
def test_errors_are_mean_squares_over_fresh_inputs(model: str) -> None:
    setting = replace(SMALL[model], ranks=0, biases=False, every=10)
    frozen, target = setting.networks()
    (row,) = measure([setting])
    fresh = setting.data(target)[1]
    x = fresh.test(synthetic.TEST_SAMPLES)[0].double()
    # The network went through training, in single precision, and nothing of it was tuned.
    for name, inputs in (("error", x), ("shifted_error", synthetic.SHIFT * x)):
        wanted = (frozen(inputs) - target(inputs)).square().mean().item()
        assert row[name] == pytest.approx(wanted, rel=1e-5)
    assert row["signal"] == pytest.approx(target(x).square().mean().item(), rel=1e-12)
    best_constant = target(x).transpose(0, -2).flatten(1).mean(1, keepdim=True)
    left = target(x) - best_constant
    assert row["variance"] == pytest.approx(left.square().mean().item(), rel=1e-9)
    x, y = (part.double() for part in fresh.validation)
    wanted = (frozen(x) - y).square().mean().item()
    assert row["validation_loss"] == pytest.approx(wanted, rel=1e-5)
    assert row["best_step"] == 0
    assert not row["diverged"]
    assert math.isnan(row["accuracy"])
    assert math.isnan(row["training_error"])


@each_model
@pytest.mark.parametrize("pretraining", [1.0, PRETRAINED])
def test_constructions_are_exact_from_the_threshold(model: str, pretraining: float) -> None:
    # Half the width: two layers for each of the target's.
    settings = [
        replace(SMALL[model], method="construction", ranks=ranks, pretraining=pretraining)
        for ranks in (2, 3, 6)
    ]
    below, at, above = measure(settings)
    assert below["error"] > 1e-4 * below["signal"]
    for row in (at, above):
        # Double precision, of which condition numbers and biases cost some digits.
        assert row["error"] < 1e-16 * row["signal"]
        assert math.isnan(row["validation_loss"])
        assert row["best_step"] == -1


@each_model
def test_training_reduces_the_error(model: str) -> None:
    setting = replace(SMALL[model], ranks=3, steps=300, learning_rate=1e-2)
    untuned, tuned = measure([replace(setting, ranks=0, biases=False), setting])
    assert tuned["error"] < 0.7 * untuned["error"]
    assert tuned["validation_loss"] < 0.7 * untuned["validation_loss"]


@each_model
def test_pretrained_networks_have_a_third_of_the_loss(model: str) -> None:
    setting = replace(SMALL[model], ranks=0, biases=False, samples=256)
    (random,), (pretrained,) = (
        measure([replace(setting, pretraining=part)]) for part in (1.0, PRETRAINED)
    )
    # Pretraining stops at the first step that reaches it, within what that many steps can do.
    part = pretrained["validation_loss"] / random["validation_loss"]
    assert part <= PRETRAINED * (1 + 1e-5)
    assert part > 0.9 * PRETRAINED


@pytest.mark.parametrize("model", ["linear", "fnn"])
def test_near_targets_have_the_distance_asked_for(model: str) -> None:
    setting = replace(SMALL[model], depth=4, target_depth=2, distance=0.3, distance_rank=2)
    frozen, target = setting.networks()
    for l, weight in enumerate(target.weights):
        block = frozen.weights[2 * l + 1] @ frozen.weights[2 * l]
        change = weight - block
        assert torch.linalg.matrix_rank(change) == 2
        size = torch.linalg.matrix_norm(change) / torch.linalg.matrix_norm(block)
        assert size.item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_accuracy_is_the_part_in_the_targets_class(task: str) -> None:
    setting = replace(SMALL["fnn"], task=task, ranks=0, biases=False)
    exact = replace(setting, method="construction", ranks=3)
    untuned, constructed = measure([setting, exact])
    assert constructed["accuracy"] == 1
    frozen, target = setting.networks()
    x = setting.data(target)[1].test(synthetic.TEST_SAMPLES)[0].double()

    def classes(out: torch.Tensor) -> torch.Tensor:
        return out.argmax(0) if task == "multiclass" else (out[3:].sum(0) > out[:3].sum(0)).long()

    wanted = (classes(frozen(x)) == classes(target(x))).double().mean().item()
    # Some inputs may be so near a boundary that rounding to single precision decides.
    assert untuned["accuracy"] == pytest.approx(wanted, abs=2 / synthetic.TEST_SAMPLES)
    tuned = measure([replace(setting, ranks=6, biases=True, steps=300, learning_rate=1e-2)])[0]
    assert tuned["accuracy"] > untuned["accuracy"]


def test_a_fixed_training_set_is_learnt_better_than_fresh_inputs() -> None:
    setting = replace(
        SMALL["fnn"], fixed=True, samples=8, steps=500, ranks=6, learning_rate=1e-2, every=10
    )
    (row,) = measure([setting])
    assert row["training_error"] < 0.5 * row["error"]


def test_runs_that_diverge_are_rows_like_others() -> None:
    setting = replace(SMALL["fnn"], depth=4, ranks=2)
    good, bad = measure([setting, replace(setting, learning_rate=1e6)])
    assert_same(measure([setting])[0], good)
    assert bad["diverged"]
    assert math.isfinite(bad["error"])
    assert math.isfinite(bad["validation_loss"])


def test_the_best_grid_point_has_the_least_validation_loss() -> None:
    settings = [
        replace(SMALL["fnn"], ranks=ranks, learning_rate=rate, weight_decay=decay)
        for ranks in (1, 2)
        for rate in (1e-2, 1e-3, 1e-4)
        for decay in (0.0, 0.1)
    ]
    settings.append(replace(SMALL["fnn"], ranks=1, method="construction"))
    losses = [5, 2, math.nan, 3, 2.5, 9, math.inf, math.nan, 1, 1, 4, 7, math.nan]
    rows = [
        {**asdict(setting), "validation_loss": loss}
        for setting, loss in zip(settings, losses, strict=True)
    ]
    # Of two that are equal, the first.
    assert best(pd.DataFrame(rows)).index.tolist() == [1, 8, 12]


def test_sweeps_give_a_row_for_each_setting_in_order(tmp_path: Path) -> None:
    settings = [
        replace(SMALL["fnn"], ranks=ranks, seed=seed, learning_rate=rate)
        for seed in (0, 1)
        for ranks in (2, (1, 3))
        for rate in (1e-2, 1e-3)
    ]
    table = synthetic.sweep(settings, tmp_path, progress=False)
    again = synthetic.sweep(settings[::-1], tmp_path, progress=False)
    pd.testing.assert_frame_equal(again[::-1].reset_index(drop=True), table)
    for setting, (_, row) in zip(settings, table.iterrows(), strict=True):
        (wanted,) = measure([setting])
        assert {name: row[name] for name in ("error", "validation_loss", "best_step")} == {
            name: wanted[name] for name in ("error", "validation_loss", "best_step")
        }
    assert len(best(table)) == 4


def test_gain_scales_the_frozen_weights_alone() -> None:
    settings = Setting(depth=3, width=5), Setting(depth=3, width=5, gain=2.0)
    networks: Any = [setting.networks() for setting in settings]
    (plain, target), (scaled, same) = networks
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=0, atol=0)
    for one, other in zip(
        [*plain.biases, *target.weights, *target.biases],
        [*scaled.biases, *same.weights, *same.biases],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gain_is_a_factor_and_not_for_transformers() -> None:
    with pytest.raises(InputError, match="gain"):
        Setting(gain=0.0)
    with pytest.raises(InputError, match="gain"):
        Setting(model="transformer", depth=1, gain=2.0)


def mean_square(setting: Setting) -> float:
    frozen, target = setting.start()
    data, _ = setting.data(target)
    x, y = (part.double() for part in data.validation)
    return float((frozen(x) - y).square().mean())


def test_start_is_as_drawn_or_pretrained_to_the_given_part_of_the_loss() -> None:
    setting = Setting(depth=2, width=6, seed=4)
    for one, other in zip(setting.start()[0].weights, setting.networks()[0].weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    losses = [mean_square(Setting(depth=2, width=6, seed=4, pretraining=p)) for p in (1.0, 0.25)]
    assert losses[1] <= 0.25 * losses[0] * (1 + 1e-5)
    # A step earlier it was above, and one step of this learning rate changes little.
    assert losses[1] >= 0.2 * losses[0]


def test_region_decides_where_a_construction_is_exact() -> None:
    near, far = measure(
        [Setting(width=6, method="construction", ranks=3, region=region) for region in (1.0, SHIFT)]
    )
    for found in (near, far):
        assert found["error"] < 1e-20 * found["signal"]
    assert far["shifted_error"] < 1e-18 * SHIFT**2 * far["signal"]
    assert near["shifted_error"] > 1e-4 * SHIFT**2 * near["signal"]


def test_region_is_of_constructions_of_relu_networks() -> None:
    for refused in ({"region": 2.0}, {"region": 0.0, "method": "construction"}):
        with pytest.raises(InputError, match="region"):
            Setting(**refused)
    with pytest.raises(InputError, match="region"):
        Setting(model="linear", method="construction", region=2.0)
