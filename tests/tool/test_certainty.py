"""How sure plans are: the worst texts, and limits that hold for any distribution."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from scipy import stats

from lorapower.checkpoints import Measured, mean_limit, quantile_limit, workflow
from lorapower.checkpoints._limits import judge, quantile, ratio
from lorapower.checkpoints._measuring import Compared


def test_limits_of_shares_are_those_of_the_binomial() -> None:
    missed = np.zeros(59)
    assert mean_limit(missed, binary=True) == pytest.approx(1 - 0.05 ** (1 / 59))
    missed[:4] = 1
    high = mean_limit(missed, binary=True)
    assert stats.binom.cdf(4, 59, high) == pytest.approx(0.05)
    assert mean_limit(np.ones(9), binary=True) == 1
    assert math.isnan(mean_limit(np.full(3, np.nan)))


def cases(*names: Any) -> list[Any]:
    """The first of these in every run, the others in nightly ones."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in names[1:])]


@pytest.mark.parametrize("n", cases(60, 256))
@pytest.mark.parametrize("shape", cases("skewed", "small", "even", "rare", "constant"))
def test_limits_of_means_hold_for_any_distribution(shape: str, n: int) -> None:
    draw = np.random.default_rng(n)
    size = (1000, n)
    values, mean = {
        "small": (draw.beta(2, 60, size), 2 / 62),
        "skewed": (draw.beta(0.1, 2, size), 0.1 / 2.1),
        "even": (draw.random(size), 0.5),
        # So rare that samples without one are as frequent as they may be.
        "rare": (1.0 * (draw.random(size) < 3 / n), 3 / n),
        "constant": (np.full(size, 0.25), 0.25),
    }[shape]
    limits = np.array([mean_limit(each) for each in values])
    assert (limits >= mean).sum() >= stats.binom.ppf(0.001, 1000, 0.95)
    # Not far off: a single value of 1 among so many could always have been missed.
    assert np.median(limits) - mean <= 3.5 / n + 4 * values.std() / math.sqrt(n)


def test_bets_are_those_of_a_gambler() -> None:
    """The capital at the limit, bet by bet, is 20 for the first time; below it never is."""
    order = np.random.default_rng(0).beta(1, 9, 40)
    limit = mean_limit(order)

    def highest(m: float) -> float:
        capital = best = 1.0
        for i, value in enumerate(order):
            seen = order[:i]
            means = [(0.5 + seen[: k + 1].sum()) / (k + 2) for k in range(i)]
            spread = (0.25 + sum((seen[k] - means[k]) ** 2 for k in range(i))) / (i + 1)
            stake = math.sqrt(2 * math.log(20) / (len(order) * spread))
            capital *= 1 + min(stake, 0.9 / (1 - m)) * (m - value)
            best = max(best, capital)
        return best

    assert highest(limit) >= 20 > highest(limit - 0.001)


def test_errors_of_nothing() -> None:
    assert ratio(np.zeros(2), np.zeros(2)) == 0
    assert ratio(np.ones(2), np.zeros(2)) == math.inf


@pytest.mark.parametrize(("texts", "place"), [(60, 59), (120, 114), (180, 169), (300, 279)])
def test_certificates_are_order_statistics(texts: int, place: int) -> None:
    losses = np.arange(1, texts + 1, dtype=np.float64)
    np.random.default_rng(texts).shuffle(losses)
    assert quantile_limit(losses) == place
    assert stats.binom.sf(place - 1, texts, 0.9) <= 0.05 < stats.binom.sf(place - 2, texts, 0.9)


def test_few_texts_certify_nothing() -> None:
    assert quantile_limit(np.zeros(28)) == math.inf
    assert quantile_limit(np.zeros(29)) == 0


@pytest.mark.parametrize("shape", cases("two values", "skewed", "heavy", "constant"))
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


@pytest.mark.parametrize("n", cases(200, 2000))
def test_fresh_texts_confirm_what_is_true_and_contradict_what_is_not(n: int) -> None:
    draw = np.random.default_rng(5)
    verdicts = [judge(each, 0.9)[0] for each in draw.random((n, 120))]
    assert verdicts.count("failed") <= n / 20
    assert {*verdicts} == {"confirmed", "consistent", "failed"}
    # Of these only 8 of 10 are within.
    most = max(k for k in range(121) if stats.binom.cdf(k, 120, 0.9) <= 0.05)
    share = stats.binom.cdf(most, 120, 0.8)
    found = sum(judge(each, 0.8)[0] == "failed" for each in draw.random((n, 120)))
    assert stats.binom.ppf(0.001, n, share) <= found <= stats.binom.ppf(0.999, n, share)


def test_what_is_no_number_is_no_small_loss() -> None:
    assert judge(np.full(60, np.nan), 1.0) == ("failed", 60)
    assert not quantile_limit(np.full(60, np.nan)) <= 1


def test_rounding_of_merged_adapters_contradicts_no_limit() -> None:
    assert judge(np.full(60, 1.0005), 1.0) == ("confirmed", 0)
    assert judge(np.full(60, 5e-6), 0.0) == ("confirmed", 0)
    assert judge(np.full(60, 2e-5), 0.0) == ("failed", 60)


def test_nine_of_ten_do_not_exceed_the_quantile() -> None:
    assert quantile(np.arange(20.0)[::-1]) == 17


class Drawn:
    """As a `Planner`: adapters of an error by their size, and skewed losses of texts."""

    #: The loss that nine of ten texts do not exceed, if the error is 1.
    QUANTILE = math.exp(0.65 * stats.norm.ppf(0.9) - 0.4225)

    def __init__(self, draw: np.random.Generator) -> None:
        self.losses_of_one = draw.lognormal(-0.4225, 0.65, 120)
        self.test = self.network = self
        self.seed, self.effect = 0, np.ones(120)
        self.adapter: Any = None

    def descend(self, aim: float, *, estimate: bool) -> Any:
        for k in range(40):
            yield Scaled(aim / 3 * 1.05**k)

    def report(self, *_: Any) -> None:
        """Tell nobody."""

    def put(self, adapter: Any) -> None:
        self.adapter = adapter

    def losses(self, squares: np.ndarray) -> np.ndarray:
        return np.sqrt(squares)

    def squares(self, _: Any) -> np.ndarray:
        return (self.adapter.error * self.losses_of_one) ** 2

    def compare(self, adapter: Any) -> Compared:
        self.put(adapter)
        nothing = np.full(120, math.nan)
        return Compared(self.squares(None), *[nothing] * 5)

    def summarize(self, compared: Compared) -> Measured:
        squares = compared.squares
        error = math.sqrt(squares.mean())
        return Measured(error, math.nan, 1.0, 0.0, 120, quantile_limit(np.sqrt(squares)))


class Scaled:
    """As an adapter, of which only the error is known."""

    def __init__(self, error: float) -> None:
        self.error, self.parameters = error, round(1000 / error)


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    planner: Any = Drawn(np.random.default_rng(4))
    last: Any = workflow._search(planner, 0.1, False).adapter
    measure = planner.squares
    planner.squares = lambda network: measure(network) * [1.0, math.nan][planner.at == 2]
    planner.put = lambda adapter: vars(planner).update(adapter=adapter, at=planner.at + 1)
    planner.at = -1
    found: Any = workflow._search(planner, 0.1, False).adapter
    assert found.error < last.error
    assert found.error == 0.1 / 3 * 1.05


@pytest.mark.nightly
def test_what_is_certified_is_missed_once_in_twenty_at_most() -> None:
    missed, smaller, draw = 0, [], np.random.default_rng(4)
    for _ in range(400):
        planner: Any = Drawn(draw)
        found = workflow._search(planner, 0.1, False)
        raw: Any = found.adapter
        missed += found.reached and raw.error * Drawn.QUANTILE > 0.1
        smaller.append(raw.error * Drawn.QUANTILE)
    assert missed <= stats.binom.ppf(0.999, 400, 0.05)
    # The limit is the 114th of 120 losses, and adapters differ by a factor of 1.05.
    above = 0.65 * (stats.norm.ppf(114 / 121) - stats.norm.ppf(0.9))
    assert np.median(smaller) == pytest.approx(0.1 / (1.05 * math.exp(above)), rel=0.05)


def test_estimates_stop_at_the_error() -> None:
    found = workflow._search(cast("Any", Drawn(np.random.default_rng(7))), 0.1, True)
    assert 0.1 / 1.06 < found.measured.error <= 0.1 == found.aim
    assert found.reached
    assert math.isnan(found.certified)


def test_what_fails_first_is_not_certified() -> None:
    planner: Any = Drawn(np.random.default_rng(6))
    planner.losses_of_one *= 10
    found = workflow._search(planner, 0.1, False)
    assert not found.reached
