"""How sure plans are: paired intervals, the worst texts, and what holds for sure."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorapower.checkpoints import Measured, workflow
from lorapower.checkpoints._measuring import (
    largest_share,
    lower_limit,
    paired_ratio,
    ratio,
    upper_limit,
)


def test_limits_of_shares_are_those_of_the_binomial() -> None:
    equal, one = np.array([1.0] * 59), np.ones(59)
    assert lower_limit(equal, one) == pytest.approx(0.05 ** (1 / 59))
    equal[:4] = 0
    low = lower_limit(equal, one)
    assert stats.binom.sf(54, 59, low) == pytest.approx(0.05)
    assert lower_limit(np.zeros(9), np.ones(9)) == 0
    assert math.isnan(lower_limit(np.full(3, np.nan), np.ones(3)))


def test_limits_of_shares_within_texts() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(3, 20, 80).astype(float)
    equal = draw.binomial(sizes.astype(int), 0.9).astype(float)
    share = equal.sum() / sizes.sum()
    assert 0.85 < lower_limit(equal, sizes) < share
    assert 0.9 < lower_limit(sizes, sizes) < 1


def test_limits_of_errors_hold_as_often_as_they_say() -> None:
    held, draw = 0, np.random.default_rng(1)
    for trial in range(200):
        effect = draw.lognormal(0, 0.5, 80)
        # Skewed, and in the mean .01 of the effect.
        squares = effect * draw.lognormal(-0.5, 1, 80) / 100
        held += upper_limit(squares, effect, seed=trial) >= 0.1
    # 190 are promised; if no more were, so few would be in one case of a thousand.
    # A limit far off would hold always.
    assert stats.binom.ppf(0.001, 200, 0.95) <= held < 200


def test_limits_of_errors_that_cannot_be_told() -> None:
    assert upper_limit(np.zeros(5), np.ones(5)) == 0
    assert upper_limit(np.array([0.0] * 79 + [1.0]), np.ones(80)) == math.inf
    assert ratio(np.zeros(2), np.zeros(2)) == 0
    assert ratio(np.ones(2), np.zeros(2)) == math.inf


def test_intervals_of_ratios_hold_as_often_as_they_say() -> None:
    held, draw = 0, np.random.default_rng(2)
    for trial in range(200):
        both = draw.lognormal(0, 1, 100)
        first, second = (both * draw.lognormal(-0.125, 0.5, 100) * size for size in (0.36, 1))
        middle, low, high = paired_ratio(first, second, seed=trial)
        assert low <= middle <= high
        assert middle == pytest.approx(math.sqrt(first.sum() / second.sum()))
        # In the mean both have the same error but for the sizes.
        held += low <= 0.6 <= high
    assert stats.binom.ppf(0.001, 200, 0.95) <= held < 200


def test_intervals_are_narrow_where_texts_agree() -> None:
    draw = np.random.default_rng(3)
    errors = draw.lognormal(0, 1.5, 80)
    paired = paired_ratio(errors, 2 * errors * draw.lognormal(0, 0.05, 80))
    mixed = paired_ratio(errors, 2 * draw.permutation(errors))
    assert paired[2] - paired[1] < 0.1 * (mixed[2] - mixed[1])
    assert paired_ratio(errors, 4 * errors) == pytest.approx((0.5,) * 3)


def test_ratios_to_nothing() -> None:
    nothing, some = np.zeros(5), np.ones(5)
    assert paired_ratio(nothing, some) == (0.0,) * 3
    assert all(math.isnan(part) for part in paired_ratio(some, nothing))
    assert all(math.isnan(part) for part in paired_ratio(nothing, nothing))


def test_share_of_the_worst_texts() -> None:
    assert largest_share(np.arange(101.0)) == sum(range(95, 101)) / sum(range(101))
    assert largest_share(np.ones(60)) == 3 / 60
    assert math.isnan(largest_share(np.zeros(60)))


class Drawn:
    """As a `Planner`: adapters of an error by their size, and skewed errors of texts."""

    def __init__(self, draw: np.random.Generator) -> None:
        self.effect = draw.lognormal(0, 0.5, 120)
        # The mean square is that of an adapter of error 1.
        self.squares = self.effect * draw.lognormal(-0.72, 1.2, 120)
        self.test, self.seed = self, 0

    def smallest(self, error: float) -> tuple[str, Any]:
        return "effect", SimpleNamespace(error=error, parameters=round(1000 / error))

    def error(self, adapter: Any) -> float:
        return float(adapter.error)

    def compare(self, adapter: Any) -> Any:
        return SimpleNamespace(squares=adapter.error**2 * self.squares)

    def summarize(self, compared: Any, *, seed: int) -> Measured:
        limit = upper_limit(compared.squares, self.effect, seed=seed)
        return Measured(ratio(compared.squares, self.effect), limit, 1.0, 1.0, 0.0, 120)


def test_what_is_reached_for_sure_is_missed_once_in_twenty_at_most() -> None:
    missed, estimated, draw = 0, 0, np.random.default_rng(4)
    for _ in range(80):
        planner: Any = Drawn(draw)
        found = workflow._search(planner, 0.1, True)
        assert found.measured.error_upper <= 0.1
        raw: Any = found.adapter
        missed += raw.error > 0.1
        raw = workflow._search(planner, 0.1, False).adapter
        estimated += raw.error > 0.1 * 0.999
    assert missed <= stats.binom.ppf(0.99, 80, 0.05)
    # The estimate alone is missed much more often.
    assert estimated > 24
