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
    LEAST_TEXTS,
    judge,
    largest_share,
    lower_limit,
    paired_ratio,
    quantile_limit,
    ratio,
    texts_for,
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


@pytest.mark.parametrize(("texts", "place"), [(60, 59), (120, 114), (180, 169), (300, 279)])
def test_certificates_are_order_statistics(texts: int, place: int) -> None:
    losses = np.arange(1, texts + 1, dtype=np.float64)
    np.random.default_rng(texts).shuffle(losses)
    assert quantile_limit(losses) == place
    assert stats.binom.sf(place - 1, texts, 0.9) <= 0.05 < stats.binom.sf(place - 2, texts, 0.9)


def test_few_texts_certify_nothing() -> None:
    assert quantile_limit(np.zeros(28)) == math.inf
    assert quantile_limit(np.zeros(29)) == 0


@pytest.mark.parametrize("shape", ["skewed", "heavy", "two values", "constant"])
def test_certificates_hold_for_any_distribution(shape: str) -> None:
    draw = np.random.default_rng(len(shape))
    size = (2000, 60)
    losses, quantile = {
        "skewed": (draw.lognormal(0, 2, size), math.exp(2 * stats.norm.ppf(0.9))),
        "heavy": (draw.pareto(0.3, size), 0.1 ** (-1 / 0.3) - 1),
        # The larger one is as rare as it may be without being the quantile.
        "two values": (1.0 * (draw.random(size) < 0.1001), 1.0),
        "constant": (np.ones(size), 1.0),
    }[shape]
    held = sum(quantile_limit(each) >= quantile * (1 - 1e-12) for each in losses)
    assert held >= stats.binom.ppf(0.001, 2000, 0.95)


def test_fresh_texts_confirm_what_is_true_and_contradict_what_is_not() -> None:
    draw = np.random.default_rng(5)
    verdicts = [judge(each, 0.9)[0] for each in draw.random((2000, 120))]
    assert verdicts.count("failed") <= 100
    assert {*verdicts} == {"confirmed", "consistent", "failed"}
    # Of these only 8 of 10 are within.
    most = max(k for k in range(121) if stats.binom.cdf(k, 120, 0.9) <= 0.05)
    found = np.mean([judge(each, 0.8)[0] == "failed" for each in draw.random((2000, 120))])
    assert found == pytest.approx(stats.binom.cdf(most, 120, 0.8), abs=0.03)


def test_what_is_no_number_is_no_small_loss() -> None:
    assert judge(np.full(60, np.nan), 1.0) == ("failed", 60)
    assert not quantile_limit(np.full(60, np.nan)) <= 1


def test_texts_that_would_certify() -> None:
    losses = np.array([0.05] * 96 + [0.2] * 4)
    needed = texts_for(losses, 0.1)
    assert LEAST_TEXTS < needed <= 256
    many = np.where(np.arange(needed) < 0.96 * needed, 0.05, 0.2)
    assert quantile_limit(many) == 0.05
    assert texts_for(losses, 0.04) == math.inf
    assert texts_for(np.array([0.05] * 91 + [0.2] * 9), 0.1) == math.inf
    assert texts_for(np.zeros(100), 0.1) == LEAST_TEXTS


class Drawn:
    """As a `Planner`: adapters of an error by their size, and skewed losses of texts."""

    #: The loss that nine of ten texts do not exceed, if the error is 1.
    QUANTILE = math.exp(0.65 * stats.norm.ppf(0.9) - 0.4225)

    def __init__(self, draw: np.random.Generator) -> None:
        self.losses_of_one = draw.lognormal(-0.4225, 0.65, 120)
        self.test, self.seed = self, 0

    def descend(self, error: float) -> Any:
        for k in range(40):
            found = error / 3 * 1.05**k
            yield SimpleNamespace(error=found, parameters=round(1000 / found))

    def report(self, *_: Any) -> None:
        """Tell nobody."""

    def compare(self, adapter: Any) -> Any:
        return SimpleNamespace(squares=(adapter.error * self.losses_of_one) ** 2)

    def summarize(self, compared: Any, *, seed: int) -> Measured:
        losses = np.sqrt(compared.squares)
        error = math.sqrt(compared.squares.mean())
        return Measured(error, math.nan, 1.0, 1.0, 0.0, 120, quantile_limit(losses))


def test_what_is_certified_is_missed_once_in_twenty_at_most() -> None:
    missed, smaller, draw = 0, [], np.random.default_rng(4)
    for _ in range(400):
        planner: Any = Drawn(draw)
        found = workflow._certify(planner, 0.1)
        raw: Any = found.adapter
        missed += found.reached and raw.error * Drawn.QUANTILE > 0.1
        smaller.append(raw.error * Drawn.QUANTILE)
    assert missed <= stats.binom.ppf(0.999, 400, 0.05)
    # The limit is the 114th of 120 losses, and adapters differ by a factor of 1.05.
    above = 0.65 * (stats.norm.ppf(114 / 121) - stats.norm.ppf(0.9))
    assert np.median(smaller) == pytest.approx(0.1 / (1.05 * math.exp(above)), rel=0.05)


def test_what_fails_first_is_not_certified() -> None:
    planner: Any = Drawn(np.random.default_rng(6))
    planner.losses_of_one *= 10
    found = workflow._certify(planner, 0.1)
    assert not found.reached
