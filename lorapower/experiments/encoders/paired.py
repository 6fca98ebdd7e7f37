"""Intervals for scores and for their differences, from what single texts contribute."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InputError

#: The share of intervals that hold the mean.
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean, its standard error, and the limits of its interval of 95%."""

    mean: float
    error: float
    low: float
    high: float


def interval(values: ArrayLike) -> Interval:
    """The mean of ``values`` ``[seeds, texts]`` over other texts and other seeds like these.

    Values are what texts contribute to a score (`tasks.Task.contributions`), or, for two methods
    on the same texts and seeds, the difference of both, which pairs them. The variance of the mean
    is ``s²_texts/texts + s²_seeds/seeds``, with the variances of the means over seeds and texts,
    and limits are those of Student's distribution with Satterthwaite's degrees of freedom. One seed
    says nothing of the second part: the interval then is one for these trained networks, and what
    another training would change is not in it.

    Raises `InputError` for values of other shape, or for fewer than two texts.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise InputError("values", allowed="[seeds, at least two texts]", given=table.shape)
    from scipy import stats

    seeds, texts = table.shape
    parts = [(table.mean(0).var(ddof=1) / texts, texts - 1)]
    if seeds > 1:
        parts.append((table.mean(1).var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    width = stats.t.ppf((1 + LEVEL) / 2, variance**2 / spread) if spread else 0.0
    mean, error = float(table.mean()), float(np.sqrt(variance))
    return Interval(mean, error, mean - width * error, mean + width * error)
