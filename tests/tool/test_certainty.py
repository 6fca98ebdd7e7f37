"""How sure plans are: paired intervals, the worst texts, and what holds for sure."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lorapower import InputError, checkpoints
from lorapower.checkpoints import Measured, workflow
from lorapower.checkpoints._measuring import largest_share, paired_ratio, ratio, upper_limit

TEXTS = files.texts(140)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("pair"))


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
    assert held >= stats.binom.ppf(0.001, 200, 0.95)
    assert held < 200


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
        self.test, self.network, self.seed, self.now = self, None, 0, 0.0

    def smallest(self, error: float) -> tuple[str, Any]:
        return "effect", SimpleNamespace(error=error, parameters=round(1000 / error))

    def error(self, adapter: Any) -> float:
        return float(adapter.error)

    def put(self, adapter: Any) -> None:
        self.now = adapter.error

    def measure_texts(self, _: Any, *, seed: int) -> tuple[Measured, NDArray[np.float64]]:
        squares = self.now**2 * self.squares
        limit = upper_limit(squares, self.effect, seed=seed)
        return Measured(ratio(squares, self.effect), limit, 1.0, 1.0, 0.0, 120), squares


def test_what_is_reached_for_sure_is_missed_once_in_twenty_at_most() -> None:
    missed, estimated, draw = 0, 0, np.random.default_rng(4)
    for _ in range(80):
        planner: Any = Drawn(draw)
        found = workflow._search(planner, 0.1, sure=True)
        assert found.stated[0].error_upper <= 0.1
        raw: Any = found.adapter
        missed += raw.error > 0.1
        raw = workflow._search(planner, 0.1, sure=False).adapter
        estimated += raw.error > 0.1 * 0.999
    assert missed <= stats.binom.ppf(0.99, 80, 0.05)
    # The estimate alone is missed much more often.
    assert estimated > 24


def test_plans_for_sure(places: tuple[str, str]) -> None:
    bold = checkpoints.plan(*places, TEXTS, rank=1, max_rank=8)
    aim = (bold.measured.error + bold.measured.error_upper) / 2
    plan = checkpoints.plan(*places, TEXTS, error=aim, sure=True, max_rank=8)
    assert plan.reached
    assert plan.measured.error_upper <= aim
    report = plan.report()
    assert (report["sure"], report["reached"], report["limit_reached"]) == (True, True, True)
    options: Any
    for options in ({"rank": 1}, {"parameters": 9}):
        with pytest.raises(InputError, match="sure must be used with an error; got"):
            checkpoints.plan(*places, TEXTS, sure=True, **options)
    # Where nothing reaches an error, the limit does not either.
    never = checkpoints.plan(*places, TEXTS, error=1e-9, sure=True, max_rank=1)
    assert not never.reached


def test_plans_state_ratios_to_uniform_ranks(places: tuple[str, str]) -> None:
    plan = checkpoints.plan(*places, TEXTS, rank=2, max_rank=8)
    middle, low, high = plan.versus_uniform
    error, parameters = plan.baselines["uniform"]
    assert parameters == plan.planner.parameters(2)
    assert middle == pytest.approx(plan.measured.error / error)
    assert low <= middle <= high
    report = plan.report()
    assert (report["versus_uniform_lower"], report["versus_uniform_upper"]) == (low, high)
    assert 0.05 <= report["largest_share"] <= 1
