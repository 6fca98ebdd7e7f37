"""How rates are chosen, ways to tune named, findings checked, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower.errors import InputError
from records import texts, unpack

# Columns of a way to tune, of which a table has some.
_WAY = ["method", "targets", "recipe", "rank"]


def best_rates(search: pd.DataFrame) -> pd.DataFrame:
    """Find the learning rate with the best score, in a table of a search, for each way to tune.

    Scores are means over seeds. Of rates that are at most one standard error worse than the best,
    seed by seed, the lowest is taken.
    """

    def best(rows: pd.DataFrame) -> float:
        scores = rows.pivot(index="seed", columns="learning_rate", values="score")
        worse = scores.sub(scores[scores.mean().idxmax()], axis=0)
        # With one seed nothing is known of the error.
        ties = worse.mean() >= -worse.sem().fillna(0)
        return float(ties.index[ties][0])

    way = [name for name in _WAY if name in search]
    found = search.groupby(way, dropna=False)[["seed", "learning_rate", "score"]].apply(best)
    return found.rename("learning_rate").reset_index()


def at_best_rates(table: pd.DataFrame, search: pd.DataFrame) -> pd.DataFrame:
    """Keep each way's runs at the rate that is best in a search."""
    return table.merge(best_rates(search))


def name_ways(runs: pd.DataFrame) -> pd.Series[str]:
    """Name what each run tunes: a rank on all linear layers, some layers, or weights in full."""
    whole = {"full": "all weights", "linear": "linear layers in full", "head": "the base"}
    names = runs.method.map(whole).fillna(runs.targets)
    return names.mask(names == "all", "rank " + runs["rank"].map("{:.0f}".format))


def halves(table: pd.DataFrame, statistic: Callable[[pd.DataFrame], Any]) -> list[Any]:
    """Compute a statistic on the first half of the problems, by ``seed``, and on the second.

    A bar that is set on the first half is checked on the second. One problem has no second half.
    """
    seeds = np.sort(table.seed.unique())
    first = table.seed.isin(seeds[: -(-len(seeds) // 2)])
    return [statistic(rows) for rows in (table[first], table[~first]) if len(rows)]


def contributions(runs: pd.DataFrame) -> NDArray[np.float64]:
    """Compute what texts add to the score, ``[seeds, texts]``, by `texts.contributions`.

    ``runs`` are rows of one task and method in a table, one for each seed.
    """
    task, part = runs[["task", "part"]].iloc[0]
    labels = texts.read(task, part).labels if texts.has_classes(task) else ()
    given = map(unpack, runs.sort_values("seed").answers)
    return np.array([texts.contributions(task, answers, labels) for answers in given])


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
