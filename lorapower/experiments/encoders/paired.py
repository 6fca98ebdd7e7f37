"""Intervals for scores and for their differences, from what single texts contribute."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InputError

#: Half the width of an interval, in standard errors: nineteen of twenty intervals hold the mean.
WIDTH = 1.96


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
    is ``s²_texts/texts + s²_seeds/seeds``, with the variances of the means over seeds and texts.
    Each holds part of the other's noise, so that the interval is rather too wide than too narrow.
    One seed says nothing of the second part, which then is left out.

    Raises `InputError` for values of other shape, or for fewer than two texts.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise InputError("values", allowed="[seeds, at least two texts]", given=table.shape)
    variance = table.mean(0).var(ddof=1) / table.shape[1]
    if len(table) > 1:
        variance += table.mean(1).var(ddof=1) / len(table)
    mean, error = float(table.mean()), float(np.sqrt(variance))
    return Interval(mean, error, mean - WIDTH * error, mean + WIDTH * error)
