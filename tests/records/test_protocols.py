"""What recorded tables hold, at which rates, and intervals of means of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import records
from lorapower import InputError
from records import Results, again, protocols

# Rates of these ways on sentences were chosen again.
AGAIN = [1, 4]


def unrun(settings: list[Any]) -> list[Results]:
    return [Results() for _ in settings]


@pytest.mark.parametrize(("name", "made"), again.MADE.items())
def test_rows_of_a_table_are_settings(name: str, made: tuple[Any, Callable[..., Any]]) -> None:
    """A table that is made again has the same settings in its rows."""
    recorded = records.read(name)
    settings = again.settings(recorded, made[0])
    assert len({*settings}) == len(recorded)
    found = records.run(settings, unrun).drop(columns=["version", "revision"])
    there = [column for column in found if column in recorded]
    # Recipes are columns of tables that have other than the plain one.
    assert {*found} - {*there} <= {"recipe"}
    pd.testing.assert_frame_equal(found[there], recorded[there], check_dtype=False)


@pytest.mark.parametrize("name", ["movies", "decoder"])
def test_recorded_runs_have_the_best_rates_of_their_search(name: str) -> None:
    recorded = records.read(name).query("pretrained")
    for task, runs in recorded.groupby("task"):
        chosen = protocols.best_rates(runs[runs.part == "validation"])
        tested = runs[runs.part == "test"].merge(chosen, on=["method", "targets", "rank"])
        differ = tested[tested.learning_rate_x != tested.learning_rate_y]
        assert len(tested.drop_duplicates(["method", "targets", "rank"])) >= 4
        assert differ.empty or (task == "movies-next" and {*differ["rank"]} <= {*AGAIN})


def test_rates_of_sentences_were_chosen_again() -> None:
    means = records.read("rates").query("seed.isna() and part == 'validation'").assign(seed=0)
    best = protocols.best_rates(means).set_index("rank").learning_rate
    recorded = records.read("decoder").query("task == 'movies-next' and part == 'test'")
    sentences = recorded.query("samples == 2000 and targets == 'all'")
    for rank in AGAIN:
        assert {*sentences.learning_rate[sentences["rank"] == rank]} == {best[rank]}


def test_wrong_names_of_tables_are_refused() -> None:
    with pytest.raises(InputError, match="name must be one of commands, costs, decoder"):
        records.read("texts")


def test_the_best_rate_is_the_lowest_of_those_not_worse() -> None:
    columns = ["seed", "method", "targets", "rank", "learning_rate", "score"]
    rows = [
        (0, "lora", "all", 1, 0.1, 0.8),
        (0, "lora", "all", 1, 0.2, 0.9),
        (0, "lora", "all", 8, 0.3, 0.5),
        (0, "lora", "attention", 8, 0.1, 0.9),
        (0, "lora", "attention", 8, 0.2, 0.8),
        (0, "full", math.nan, math.nan, 0.1, 0.5),  # of equal ones the lowest
        (0, "full", math.nan, math.nan, 0.2, 0.5),
        # A little worse in the mean, and better with one seed.
        *((seed, "lora", "all", 4, 0.1, (0.6, 0.85, 0.6)[seed]) for seed in range(3)),
        *((seed, "lora", "all", 4, 0.2, 0.7) for seed in range(3)),
    ]
    for order in (rows, rows[::-1]):
        table = pd.DataFrame(order, columns=columns)
        found = protocols.best_rates(table).fillna({"targets": "", "rank": 0})
        assert {*found.itertuples(index=False, name=None)} == {
            ("lora", "all", 1, 0.2),
            ("lora", "all", 4, 0.1),
            ("lora", "all", 8, 0.3),
            ("lora", "attention", 8, 0.1),
            ("full", "", 0, 0.1),
        }
        kept = protocols.at_best_rates(table, table)
        assert len(kept) == 4 + 3


def test_findings_are_taken_on_both_halves_of_the_problems() -> None:
    rows = [(seed, way, float(seed)) for way in "ab" for seed in (7, 3, 5, 4, 6)]
    table = pd.DataFrame(rows, columns=["seed", "way", "error"])
    assert protocols.halves(table, lambda rows: [*rows.error]) == [[3, 5, 4] * 2, [7, 6] * 2]
    assert protocols.halves(table[table.seed == 3], len) == [2]


# Intervals


def test_intervals_of_known_values() -> None:
    found = protocols.interval([[1, 0, 1, 1]])
    assert found.mean == 0.75
    assert found.error == pytest.approx(math.sqrt(0.25 / 4))
    wide = 3.182446305284263 * 0.25  # Student's distribution, three degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.75 - wide, 0.75 + wide))
    # Seeds that differ, texts that do not: one degree of freedom.
    found = protocols.interval([[1, 1], [0, 0]])
    assert found.error == pytest.approx(0.5)
    assert found.high - found.mean == pytest.approx(12.7062 * 0.5, rel=1e-5)
    assert protocols.interval([[1, 1], [1, 1]])[:2] == (1, 0)
    values: Any
    for values in ([1, 0], [[1]], []):
        with pytest.raises(InputError, match=r"values must be \[seeds, at least two texts\]; got"):
            protocols.interval(values)


@pytest.mark.parametrize(
    ("seeds", "luck"),
    [
        (3, 0.02),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in ((1, 0), (2, 0.02), (3, 0), (5, 0.01))
        ),
    ],
)
def test_intervals_hold_the_mean_as_often_as_they_say(seeds: int, luck: float) -> None:
    """Texts of different difficulty, trainings of different luck; the mean over all is known."""
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        texts = random.normal(size=800)
        # Two methods on the same texts, the second 0.05 better; difficulty cancels, luck does not.
        one, other = (
            random.random((seeds, 800))
            < np.clip(0.5 + 0.1 * texts + luck * random.normal(size=(seeds, 1)) + shift, 0, 1)
            for shift in (0, 0.05)
        )
        low, high = protocols.interval(other.astype(float) - one)[2:]
        held.append(low <= 0.05 <= high)
    assert 0.93 <= np.mean(held)


@pytest.mark.parametrize("name", ["movies", "decoder"])
def test_contributions_have_the_recorded_scores_as_means(name: str) -> None:
    runs = records.read(name).query("part == 'test' and method == 'full'")
    for _, rows in runs.groupby(["task", "samples"]):
        scores = rows.sort_values("seed").score
        np.testing.assert_allclose(protocols.contributions(rows).mean(1), scores, rtol=1e-6)
