"""Which runs are compared, at which rates, and intervals of their means."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import records
from lorapower import InputError
from lorapower.experiments import sweeps
from records import language, models, protocols, tables, texts, tune
from records.language import Lora, TextRun

# What runs of these tables have; the other columns are of `language.Part`.
COLUMNS = [name for name in tables.columns(TextRun) if name not in ("pattern", "recipe")]


def work(runs: list[TextRun]) -> list[language.TextResults]:
    """Results that depend on the run's settings alone."""
    about: dict[str, Any] = texts.find("movies").scores([1, 0], [1, 1])
    about |= dict.fromkeys(("baseline", "training_loss", "cut_off", "seconds"), 0.0)
    about["answers"] = records.pack([1, 0])
    return [language.TextResults(parameters=run.method.rank, **about) for run in runs]


def again(task: str) -> protocols.Rates:
    """The rates of a task that were chosen again."""
    table = records.read("rates").query("task == @task and part == 'validation'")
    return protocols.best_rates(table.assign(seed=0))


@pytest.mark.parametrize(
    ("name", "task", "source", "profile", "model"),
    [
        ("movies", "movies", "rated", "encoder", models.PACKAGED),
        ("decoder", "movies", "rated", "decoder", models.LANGUAGE),
        ("decoder", "movies-next", "rated", "decoder", models.LANGUAGE),
        ("decoder", "functions-next", "code", "decoder", models.LANGUAGE),
    ],
)
def test_recorded_runs_are_those_of_the_protocol(
    name: str, task: str, source: str, profile: str, model: str
) -> None:
    """What lists runs, and chooses rates by recorded scores, gives the settings recorded."""
    recorded = records.read(name).query("task == @task")
    rates = protocols.best_rates(recorded[recorded.part == "validation"])
    about = profile, task, source, model
    seeds = recorded.seed.nunique()
    searched = tune.choose(protocols.search(*about))
    runs = [*searched, *protocols.compare(*about, seeds=seeds, rates=rates)]
    if task in tune.AGAIN:
        runs += protocols.compare(*about, seeds=seeds, rates=again(task))
    known = sweeps.run(runs, work, progress=False)[COLUMNS].drop_duplicates()
    assert not recorded[COLUMNS].duplicated().any()
    assert len(recorded[COLUMNS].merge(known)) == len(recorded)
    assert (recorded.part == "validation").sum() == len(searched)


def test_tables_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"{rank}.sqlite" for rank in (1, 2)]
    for rank, path in enumerate(paths, 1):
        sweeps.run([TextRun(method=Lora(rank=rank))], work, path, progress=False)
    for name, order in (("one", paths), ("other", [*paths[::-1], paths[0]])):
        tables.put(tables.merge(order, TextRun), name, tmp_path)
    one, other = ((tmp_path / f"{name}.csv.gz").read_bytes() for name in ("one", "other"))
    assert gzip.decompress(one) == gzip.decompress(other)
    with pytest.raises(InputError, match="name must be one of decoder, facts"):
        records.read("texts")


def test_the_best_rate_is_the_lowest_of_those_not_worse() -> None:
    columns = ["seed", "method", "targets", "rank", "pretrained", "learning_rate", "score"]
    rows = [
        (0, "lora", "all", 1, True, 0.1, 0.8),
        (0, "lora", "all", 1, True, 0.2, 0.9),
        (0, "lora", "all", 8, True, 0.3, 0.5),
        (0, "lora", "all", 1, False, 0.1, 0.7),
        (0, "lora", "all", 1, False, 0.2, 0.6),
        (0, "lora", "attention", 8, True, 0.1, 0.9),
        (0, "lora", "attention", 8, True, 0.2, 0.8),
        (0, "full", math.nan, math.nan, True, 0.1, 0.5),  # of equal ones the lowest
        (0, "full", math.nan, math.nan, True, 0.2, 0.5),
        # A little worse in the mean, and better with one seed.
        *((seed, "lora", "all", 4, True, 0.1, (0.6, 0.85, 0.6)[seed]) for seed in range(3)),
        *((seed, "lora", "all", 4, True, 0.2, 0.7) for seed in range(3)),
    ]
    for order in (rows, rows[::-1]):
        assert protocols.best_rates(pd.DataFrame(order, columns=columns)) == {
            ("lora", True): {1: 0.2, 4: 0.1, 8: 0.3},
            ("lora", False): {1: 0.1},
            ("attention", True): {8: 0.1},
            ("full", True): {0: 0.1},
        }


def test_a_search_widens_until_the_best_rate_is_inside() -> None:
    problem = language.TextProblem(part="validation")
    tried = [
        TextRun(problem=problem.replace(seed=seed), method=Lora(rank=rank, learning_rate=rate))
        for seed in range(3)
        for rank in (1, 64)
        for rate in (0.002, 0.004, 0.008)
    ]

    def run(runs: Sequence[TextRun]) -> pd.DataFrame:
        """Scores fall on both sides of a best rate: the second tried, or beyond the last."""
        table = sweeps.run(runs, work, progress=False)
        peaks = table["rank"].map({1: 0.004, 64: 0.03})
        return table.assign(score=-np.log2(table.learning_rate / peaks).abs())

    more = protocols.widen(tried, run(tried))
    assert {(r.method.rank, r.method.learning_rate) for r in more} == {(64, 0.016)}
    assert len(more) == 3
    assert protocols.choose_rates(tried, run) == {("lora", True): {1: 0.004, 64: 0.032}}


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


def test_every_third_answer_contributes_as_among_all() -> None:
    table = records.read("movies").query("part == 'test' and method == 'full' and pretrained")
    whole = table[table.samples == table.samples.max()]
    packed = whole.answers.map(lambda answers: records.pack(records.unpack(answers)[::3]))
    found = protocols.contributions(whole.assign(answers=packed), stride=3)
    np.testing.assert_array_equal(found, protocols.contributions(whole)[:, ::3])
    # Their mean over all is the recorded score.
    scores = whole.sort_values("seed").score
    np.testing.assert_allclose(protocols.contributions(whole).mean(1), scores)
