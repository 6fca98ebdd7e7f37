"""Which runs are compared, that recorded ones are of these, and intervals of their means."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import records
from lorapower import InputError
from lorapower.experiments import sweeps
from records import before, language, models, protocols, record, texts, tune
from records.language import Lora, Setting
from records.protocols import PROFILES

# What settings of these tables have; the other columns are of `language.Part`.
COLUMNS = [name for name in sweeps.columns(Setting) if name not in ("pattern", "recipe")]


def ways(settings: Iterable[Setting]) -> Counter[tuple[str, int]]:
    """How often each way is there, with its rank."""
    return Counter((s.method.way, s.method.rank) for s in settings)


def test_the_protocol_compares_like_with_like() -> None:
    settings = protocols.compare("encoder", ["movies", "tweets"], "rated", "packaged", seed=7)
    about = PROFILES["encoder"]
    ranks, most = about.ranks, about.samples[-1]
    assert {s.problem.seed for s in settings} == {*range(7, 7 + about.seeds)}
    assert {s.problem.part for s in settings} == {"test"}
    assert len({*settings}) == len(settings)
    for problem in {s.problem for s in settings}:
        methods = [s.method for s in settings if s.problem == problem]
        adapters = {(m.targets, m.rank) for m in methods if isinstance(m, Lora)}
        if problem.samples not in (0, most):
            assert adapters == {("all", ranks[0]), ("all", ranks[-1])}
        elif problem.pretrained:
            assert {m.kind for m in methods} == {"lora", "final", "full", "head"}
            equal = language.equal_ranks("packaged", ranks[-1], "mean")
            assert {*equal.items(), *(("all", rank) for rank in ranks)} <= adapters
        else:
            assert ("all", ranks[-1]) in adapters


@pytest.mark.parametrize(("task", "source"), [("movies-next", "rated"), ("functions-next", "code")])
def test_a_decoder_is_compared_as_it_is_shipped_and_with_its_own_head(
    task: str, source: str
) -> None:
    settings = protocols.compare("decoder", [task], source, "packaged")
    about = PROFILES["decoder"]
    equal = language.equal_ranks("packaged", 4, "own", about.layers)
    assert set(equal) == {"attention", "feed-forward", "queries and keys"}
    few = [("lora", 1), ("lora", 64), ("full", 0)]
    most = [*(("lora", rank) for rank in (*about.ranks, 192)), *equal.items()]
    most += [(kind, 0) for kind in about.whole]
    for seed in range(3):
        for samples, wanted in ((160, few), (2000, most)):
            one = [s for s in settings if (s.problem.seed, s.problem.samples) == (seed, samples)]
            assert ways(one) == Counter(wanted)
    tried = protocols.search("decoder", [task], source, "packaged")
    for part, each in (("test", settings), ("validation", tried)):
        assert {(s.problem.part, s.problem.pretrained, s.problem.head) for s in each} == {
            (part, True, "own")
        }
    # Each way has three rates or more; nothing is trained to measure the base.
    found = ways(tried)
    lora = {("lora", rank) for rank in (1, 64, 192)}
    assert {*found} == lora | {*equal.items(), ("full", 0), ("linear", 0)}
    assert min(found.values()) >= 3


def test_the_protocol_takes_seeds_rates_and_samples() -> None:
    def sizes(samples: int) -> set[int]:
        settings = protocols.compare("encoder", ["tweets"], "rated", "packaged", samples=samples)
        return {s.problem.samples for s in settings}

    rates = {("lora", True): {1: 0.5, 4: 0.125}, ("lora", False): {1: 0.25}}
    some = protocols.compare(
        "encoder", ["tweets"], "rated", "packaged", seed=4, seeds=2, rates=rates
    )
    assert {s.problem.seed for s in some} == {4, 5}
    # Halfway between ranks 1 and 4 on a logarithmic scale.
    of_two = [s.method.learning_rate for s in some if (s.method.way, s.method.rank) == ("lora", 2)]
    assert of_two == pytest.approx([0.25] * len(of_two))
    assert sizes(64) == {64}
    assert sizes(10**6) == {0, 1000, 2000}  # of 2474


def test_rates_are_chosen_on_texts_of_their_own() -> None:
    settings = protocols.search("encoder", ["movies"], "rated", "packaged")
    assert {s.problem.part for s in settings} == {"validation"}
    tried = Counter((s.method.kind, s.method.rank, s.problem.pretrained) for s in settings)
    assert set(tried.values()) == {3}
    assert len(tried) == 10
    columns = ["seed", "method", "targets", "rank", "pretrained", "learning_rate", "score"]
    rows = [
        ("lora", "all", 1, True, 0.1, 0.8),
        ("lora", "all", 1, True, 0.2, 0.9),
        ("lora", "all", 8, True, 0.3, 0.5),
        ("lora", "all", 1, False, 0.1, 0.7),
        ("lora", "all", 1, False, 0.2, 0.6),
        ("lora", "attention", 8, True, 0.1, 0.9),
        ("lora", "attention", 8, True, 0.2, 0.8),
        ("full", math.nan, math.nan, True, 0.1, 0.5),  # of equal ones the lowest
        ("full", math.nan, math.nan, True, 0.2, 0.5),
    ]
    best = {
        ("lora", True): {1: 0.2, 8: 0.3},
        ("lora", False): {1: 0.1},
        ("attention", True): {8: 0.1},
        ("full", True): {0: 0.1},
    }
    for order in (rows, rows[::-1]):
        table = pd.DataFrame([(0, *row) for row in order], columns=columns)
        assert protocols.best_rates(table) == best


def test_rates_are_chosen_again_with_as_many_texts_and_three_seeds() -> None:
    about = "decoder", ["movies-next"], "rated", models.LANGUAGE
    settings = tune.choose(protocols.search(*about, again=True))
    assert {(s.problem.part, s.problem.samples) for s in settings} == {("validation", 2000)}
    found = ways(settings)
    adapted = [("lora", 1), ("lora", 4), ("lora", 16), ("lora", 64)]
    assert {*found} == {
        *adapted,
        ("attention", 11),
        ("feed-forward", 6),
        ("full", 0),
        ("linear", 0),
    }
    assert {*found.values()} == {9}

    # Scores fall on both sides of a best rate, by 2 for each factor of two.
    table = sweeps.run(settings, work, progress=False)
    peaks = table["rank"].map({4: 0.008}).fillna(0.004)
    table["score"] = -2 * np.log2(table.learning_rate / peaks).abs()
    best = protocols.best_rates(table)
    assert best["lora", True] == {1: 0.004, 4: 0.008, 16: 0.004, 64: 0.004}
    more = protocols.widen(settings, table)
    assert {*ways(more).values()} == {3}
    assert {(s.method.rank, s.method.learning_rate) for s in more if s.method.way == "lora"} == {
        (4, 0.016),
        (16, 0.008),
        (64, 0.008),
    }

    def run(tried: Sequence[Setting]) -> pd.DataFrame:
        found = sweeps.run(tried, work, progress=False)
        return found.assign(score=-found.learning_rate.div(0.02).map(np.log2).abs())

    inside = protocols.choose_rates(settings, run)
    assert inside["lora", True][64] == 0.016  # three rates beyond those of the search
    assert inside["full", True] == {0: pytest.approx(0.0256)}
    # A lower rate is a little worse in the mean, and better with one seed.
    worse = table.learning_rate.eq(0.002) & table["rank"].eq(1)
    near = table.score.where(~worse, -0.1 + 0.2 * table.seed.eq(1))
    assert protocols.best_rates(table.assign(score=near))["lora", True][1] == 0.002


def test_rates_of_ranks_between_are_between() -> None:
    by_rank = {1: 0.01, 4: 0.005, 16: 0.001}
    for rank, wanted in by_rank.items():
        assert protocols._rate(by_rank, rank) == pytest.approx(wanted)
    assert protocols._rate(by_rank, 2) == pytest.approx(math.sqrt(0.01 * 0.005))
    assert protocols._rate(by_rank, 64) == pytest.approx(0.0002)
    assert protocols._rate({0: 0.3}, 0) == 0.3


# Records


def work(settings: list[Setting]) -> list[language.Found]:
    """Results that depend on the setting alone."""
    about: dict[str, Any] = texts.find("movies").scores([1, 0], [1, 1])
    about |= dict.fromkeys(("baseline", "training_loss", "cut_off", "seconds"), 0.0)
    about["answers"] = records.pack([1, 0])
    return [language.Found(parameters=s.method.rank, **about) for s in settings]


RECORDED = pytest.mark.parametrize(
    ("name", "task", "source", "profile", "model", "samples"),
    [
        ("movies", "movies", "rated", "encoder", "packaged", 4000),
        ("encoder", "tweets", "rated", "encoder", "packaged", 2000),
        ("encoder", "products", "rated", "encoder", "packaged", 2000),
        ("decoder", "movies", "rated", "decoder", models.LANGUAGE, 0),
        ("decoder", "movies-next", "rated", "decoder", models.LANGUAGE, 0),
        ("decoder", "functions-next", "code", "decoder", models.LANGUAGE, 0),
    ],
)


def again(task: str) -> protocols.Rates:
    """The rates of a task that were chosen again."""
    table = records.read("rates").query("task == @task and part == 'validation'")
    return protocols.best_rates(table.assign(seed=0))


@RECORDED
def test_the_recorded_run_is_part_of_the_protocol(
    name: str, task: str, source: str, profile: str, model: str, samples: int
) -> None:
    table = records.read(name).query("task == @task")
    # The encoder's other tasks have the rates of its first.
    chosen = table if name != "encoder" else records.read("movies")
    rates = protocols.best_rates(chosen[chosen.part == "validation"])
    about = profile, [task], source, model
    seeds = table.seed.nunique()
    searched = tune.choose(protocols.search(*about))
    settings = [*searched, *protocols.compare(*about, samples=samples, seeds=seeds, rates=rates)]
    if task in tune.AGAIN:
        settings += protocols.compare(*about, seeds=seeds, rates=again(task))
    known = sweeps.run(settings, work, progress=False)[COLUMNS].drop_duplicates()
    recorded = table[COLUMNS]
    assert not recorded.duplicated().any()
    assert len(recorded.merge(known)) == len(recorded)
    assert (table.part == "validation").sum() == len(searched) * (name != "encoder")


def test_the_record_of_further_tasks_is_what_its_command_trains() -> None:
    known = sweeps.run(before.trainings(), work, progress=False)[COLUMNS]
    recorded = records.read("encoder")[COLUMNS]
    assert len(recorded.merge(known)) == len(recorded) == len(known)


def test_records_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{rank}.sqlite" for rank in (1, 2)]
    for rank, file in enumerate(files):
        sweeps.run([Setting(method=Lora(rank=rank + 1))], work, file, progress=False)
    for name, order in (("one", files), ("other", [*files[::-1], files[0]])):
        table = record.merge(order)
        assert [*table["rank"]] == [1, 2]
        record.put(table, name, tmp_path)
    one, other = ((tmp_path / f"{name}.csv.gz").read_bytes() for name in ("one", "other"))
    assert gzip.decompress(one) == gzip.decompress(other)


def test_unknown_records_are_refused() -> None:
    with pytest.raises(InputError, match="name must be one of before, decoder, encoder"):
        records.read("texts")


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


@pytest.mark.parametrize("values", [[1, 0], [[1]], []])
def test_intervals_of_nothing_are_refused(values: list[Any]) -> None:
    with pytest.raises(InputError, match=r"values must be \[seeds, at least two texts\]; got"):
        protocols.interval(values)


def test_every_third_answer_contributes_as_among_all() -> None:
    table = records.read("movies").query("part == 'test' and method == 'full' and pretrained")
    whole = table[table.samples == table.samples.max()]
    packed = whole.answers.map(lambda answers: records.pack(records.unpack(answers)[::3]))
    found = protocols.contributions(whole.assign(answers=packed), stride=3)
    np.testing.assert_array_equal(found, protocols.contributions(whole)[:, ::3])
    assert found.std() > 0.3  # right and wrong answers
