"""Which runs of language models are compared, and how sure a difference of their scores is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike, NDArray

from lorapower.errors import InputError
from lorapower.experiments import sweeps
from records import language, texts, unpack
from records.language import Kind, Lora, Method, Targets, TextProblem, TextRun, Whole

#: Learning rates by ``way`` of a method and whether weights are pretrained, then by rank (0 for
#: all). `compare` interpolates between ranks.
Rates = Mapping[tuple[str, bool], Mapping[int, float]]


@dataclass(frozen=True)
class Profile:
    """State which ways to tune a model are compared.

    Runs share ``problem`` and differ in ``seeds``. Adapters on all linear layers have ``ranks``,
    and ``widest`` if not 0. ``layers`` are compared at equal numbers of parameters, those of
    ``equal_rank`` on all, or of the highest for 0; with ``layers_at_each_rank`` at all ranks too.
    ``whole`` are kinds of `Whole`. From ``random`` weights these kinds of methods start too.
    ``samples`` are numbers to train on; all ways are compared with the last. ``rates`` are tried by
    `search` for each ``way`` and rank (0 for all), the default first; ``search`` is what it has
    otherwise in its problem.
    """

    problem: Mapping[str, Any]
    seeds: int
    ranks: list[int]
    layers: list[Targets]
    whole: list[Kind]
    samples: list[int]
    rates: Mapping[str, Mapping[int, list[float]]]
    search: dict[str, int]
    equal_rank: int = 0
    widest: int = 0
    layers_at_each_rank: bool = False
    random: tuple[str, ...] = ()
    again: Mapping[str, Mapping[int, list[float]]] = field(default_factory=dict)


#: Seeds of a search that is as large as the runs it is for.
AGAIN = 3
_FILE = Path(__file__).with_name("profiles.yaml")
#: The profiles ``"encoder"`` and ``"decoder"``.
PROFILES = {
    name: Profile(**values)
    for name, values in yaml.safe_load(_FILE.read_text(encoding="utf-8")).items()
}


def compare(
    profile: str,
    task: str,
    source: str,
    model: str,
    *,
    seed: int = 0,
    seeds: int = 0,
    rates: Rates | None = None,
) -> list[TextRun]:
    """List settings that compare ranks, layers, weights and numbers of samples, seed by seed.

    From pretrained weights and the most samples: all ways of the `Profile`. From random weights:
    those that it names. With fewer samples: the lowest and the highest rank on all layers, and all
    weights. For next tokens ``head`` is the base itself.

    ``seeds`` counts seeds from ``seed`` on, by default the profile's; `best_rates` finds other
    learning rates than its first.
    """
    about = PROFILES[profile]
    problems = [
        state_problem(about, task, source, model, number)
        for number in range(seed, seed + (seeds or about.seeds))
    ]
    equal = _equal(about, problems[0], about.ranks[-1])
    everywhere: list[Method] = [Lora(rank=rank) for rank in about.ranks]
    full = Whole(kind="full")
    fewer: list[Method] = [everywhere[0], everywhere[-1], full]
    pretrained: list[Method] = [*everywhere]
    if about.widest:
        pretrained.append(Lora(rank=about.widest))
    pretrained += [Lora(targets=targets, rank=rank) for targets, rank in equal.items()]
    drawn: list[Method] = everywhere[-1:]
    if about.layers_at_each_rank:
        pretrained += [
            Lora(targets=targets, rank=rank) for targets in equal for rank in about.ranks
        ]
        drawn = [*everywhere]
    pretrained += [Whole(kind=kind) for kind in about.whole]
    drawn = [
        method for method in (*drawn, Whole(kind="final"), full) if method.kind in about.random
    ]
    settings = []
    *few, most = about.samples
    for problem in problems:
        runs = [
            *((True, most, method) for method in pretrained),
            *((False, most, method) for method in drawn),
            *((True, less, method) for less in few for method in fewer),
        ]
        for shipped, size, method in dict.fromkeys(runs):
            way = method.way if method.way in about.rates else method.kind
            default = {rank: tried[0] for rank, tried in about.rates[way].items()}
            by_rank = (rates or {}).get((way, shipped), default)
            tuned = method.replace(learning_rate=_rate(by_rank, method.rank))
            place = problem.replace(pretrained=shipped, samples=size)
            settings.append(TextRun(problem=place, method=tuned))
    return settings


def search(
    profile: str, task: str, source: str, model: str, *, again: bool = False
) -> list[TextRun]:
    """List settings that try the profile's learning rates for each way of tuning.

    They have one seed and few samples, but about as many steps as most runs (half
    as many for a decoder); ``again``, as many samples as most runs and `AGAIN` seeds. Scores are on
    the validation part, not used otherwise.
    """
    about = PROFILES[profile]
    problem = state_problem(about, task, source, model, 0)
    changes = {"samples": about.samples[-1]} if again else about.search
    problem = problem.replace(**changes, part="validation")
    equal = _equal(about, problem, about.ranks[-1])
    whole: dict[str, Method] = {kind: Whole(kind=kind) for kind in about.whole}
    methods: list[Method] = []
    for way, by_rank in (about.again if again else about.rates).items():
        if way == "head" and texts.find(problem.task).next_tokens:
            continue
        for rank, rates in by_rank.items():
            one: Method = Lora(rank=max(rank, 1))
            if way in whole:
                one = whole[way]
            elif way in equal:
                one = Lora(targets=way, rank=equal[way])
            methods += [one.replace(learning_rate=tried) for tried in sorted(rates)]
    problems = [problem.replace(seed=seed) for seed in range(AGAIN if again else 1)]
    if about.random:
        problems = [p.replace(pretrained=each) for p in problems for each in (True, False)]
    return sweeps.grid(TextRun, problem=problems, method=methods)


def widen(settings: Sequence[Any], table: pd.DataFrame) -> list[Any]:
    """List what a search tries next: twice the rate, or half, where the best is the last tried."""
    best = best_rates(table)
    more = []
    for setting in settings:
        method, problem = setting.method, setting.problem
        tried = {
            s.method.learning_rate
            for s in settings
            if s.problem == problem and (s.method.way, s.method.rank) == (method.way, method.rank)
        }
        found = best[method.way, problem.pretrained][method.rank]
        if found == method.learning_rate in (min(tried), max(tried)):
            factor = 2 if found == max(tried) else 0.5
            more.append(setting.replace(method=method.replace(learning_rate=factor * found)))
    return more


def choose_rates(
    settings: Sequence[Any], run: Callable[[Sequence[Any]], pd.DataFrame]
) -> dict[tuple[str, bool], dict[int, float]]:
    """Find the `Rates` of a search, which ``run`` makes, widened until each best is inside."""
    tried = [*settings]
    trials = run(tried)
    while more := widen(tried, trials):
        tried += more
        trials = run(tried)
    return best_rates(trials)


def best_rates(table: pd.DataFrame) -> dict[tuple[str, bool], dict[int, float]]:
    """Find the `Rates` with the best scores in a table of `search`.

    Scores are means over seeds. Of rates that are at most one standard error worse than the best,
    seed by seed, the lowest is taken.
    """
    ranked = table.assign(way=_ways(table), rank=_ranks(table))
    rates: dict[tuple[str, bool], dict[int, float]] = {}
    for key, rows in ranked.groupby(["way", "pretrained", "rank"]):
        kind, shipped, rank = cast("tuple[str, bool, int]", key)
        scores = rows.pivot(index="seed", columns="learning_rate", values="score")
        worse = scores.sub(scores[scores.mean().idxmax()], axis=0)
        # With one seed nothing is known of the error.
        ties = worse.mean() >= -worse.sem().fillna(0)
        best = cast("float", ties.idxmax())
        rates.setdefault((kind, bool(shipped)), {})[int(rank)] = best
    return rates


def at_best_rates(table: pd.DataFrame, search: pd.DataFrame) -> pd.DataFrame:
    """Keep each way's runs, from pretrained weights, at the rate that is best in a search."""
    best = best_rates(search)
    rates = [best[way, True][rank] for way, rank in zip(_ways(table), _ranks(table), strict=True)]
    return table[table.learning_rate.to_numpy() == rates]


def _ways(table: pd.DataFrame) -> pd.Series[str]:
    """Write what each run tunes as ``way`` of its method does."""
    about = table.reindex(columns=["method", "targets", "pattern", "recipe"]).astype(object)
    plain = about.recipe.isna() | (about.recipe == "plain")
    of_part = about.pattern.fillna("") + (" " + about.recipe.astype(str)).mask(plain, "")
    layers = about.targets.where(about.targets != "all").fillna(about.method)
    return layers.mask(about.method == "part", of_part)


def _ranks(table: pd.DataFrame) -> pd.Series[int]:
    return table["rank"].fillna(0).astype(int)


def _rate(by_rank: Mapping[int, float], rank: int) -> float:
    """Interpolate the learning rate of a rank by the next two ranks, on logarithmic scales."""
    ranks = sorted(by_rank)
    if len(ranks) == 1:
        return by_rank[ranks[0]]
    at = min(max(1, int(np.searchsorted(ranks, rank))), len(ranks) - 1)
    low, high = ranks[at - 1 : at + 1]
    part = math.log(rank / low) / math.log(high / low)
    return by_rank[low] ** (1 - part) * by_rank[high] ** part


def state_problem(about: Profile, task: str, source: str, model: str, seed: int) -> TextProblem:
    """State the problem of a profile, scored on the test part."""
    shared: dict[str, Any] = {"part": "test", **about.problem}
    return TextProblem(task=task, source=source, model=model, seed=seed, **shared)


def _equal(about: Profile, problem: TextProblem, highest: int) -> dict[Targets, int]:
    """Find the ranks of some layers with as many numbers as one on all."""
    rank = about.equal_rank or highest
    return language.equal_ranks(problem.model, rank, problem.head, about.layers)


def name_ways(runs: pd.DataFrame) -> pd.Series[str]:
    """Name what each run tunes: a rank on all linear layers, some layers, or weights in full."""
    whole = {"full": "all weights", "linear": "linear layers in full", "head": "the base"}
    names = runs.method.map(whole).fillna(runs.targets)
    return names.mask(names == "all", "rank " + runs["rank"].map("{:.0f}".format))


def contributions(runs: pd.DataFrame, stride: int = 1) -> NDArray[np.float64]:
    """Compute what texts add to the score, ``[seeds, texts]``, by `texts.Task.contributions`.

    ``runs`` are rows of one task and method in a table of `sweeps.run`, one for each seed; they
    have answers to all texts, or to every ``stride``-th.
    """
    task, source, part = runs[["task", "source", "part"]].iloc[0]
    about = texts.find(task)
    labels: Sequence[float] = ()
    if not about.next_tokens:
        labels = texts.read(task, source, part).labels
    given = map(unpack, runs.sort_values("seed").answers)
    return np.array([about.contributions(answers, labels[::stride]) for answers in given])


#: The share of intervals that hold the mean.
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean, its standard error, and the limits of its interval."""

    mean: float
    error: float
    low: float
    high: float


def interval(values: ArrayLike) -> Interval:
    """Estimate the mean over seeds and texts, with its interval of 95%.

    Of ``values`` ``[seeds, texts]``, each is what a text contributes to a score
    (`texts.Task.contributions`), or, to compare two methods, the difference of theirs. The variance
    of the mean is ``s²_texts/texts + s²_seeds/seeds``, with the variances of the means over seeds
    and over texts; limits are Student's with Satterthwaite's degrees of freedom. With one seed the
    second part is missing: the interval is for these networks. Raises `InputError` for other shapes
    or one text.
    """
    from scipy import stats

    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise InputError("values", allowed="[seeds, at least two texts]", given=table.shape)
    seeds, number = table.shape
    parts = [(table.mean(0).var(ddof=1) / number, number - 1)]
    if seeds > 1:
        parts.append((table.mean(1).var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    width = stats.t.ppf((1 + LEVEL) / 2, variance**2 / spread) if spread else 0.0
    mean, error = float(table.mean()), float(np.sqrt(variance))
    return Interval(mean, error, mean - width * error, mean + width * error)
