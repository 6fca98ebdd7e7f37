"""Errors of texts in one number, and limits that hold for any distribution of texts."""

from __future__ import annotations

import math

import numpy as np
import scipy
from numpy.typing import NDArray

_CONFIDENCE = 0.95
#: The share of texts that a certificate speaks of.
SHARE = 0.9
# The part of its capital that a bet on a mean risks at most.
_RISKED = 0.9


def ratio(squares: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """``(Σ e / Σ d)^{1/2}``; 0 where nothing was lost of nothing."""
    lost, whole = squares.sum(), effect.sum()
    if whole == 0:
        return 0.0 if lost == 0 else math.inf
    return float(math.sqrt(lost / whole))


def quantile(losses: NDArray[np.float64]) -> float:
    """The least loss that nine of ten texts do not exceed."""
    return float(np.quantile(losses, SHARE, method="inverted_cdf"))


def quantile_limit(losses: NDArray[np.float64]) -> float:
    """Compute an upper limit at 95% of what 90% of texts lose at most [prop-certificate].

    It holds for any distribution from which the ``losses``, ``[n]``, were drawn independently.
    Returns the k-th smallest, with the least k such that a binomial number of ``n`` draws with
    probability 0.9 is at least k in at most 5% of cases (Wilks, 1941); infinite if there is none.
    """
    found = scipy.stats.quantile_test(losses, p=SHARE, alternative="less")
    limit = float(found.confidence_interval(_CONFIDENCE).high)
    return math.inf if math.isnan(limit) else limit


def judge(losses: NDArray[np.float64], limit: float) -> tuple[str, int]:
    """Judge a certified limit by fresh texts: ``verdict`` and ``exceeding`` of `Measured`."""
    # Merged and unmerged adapters differ by rounding.
    limit = 1.001 * limit + 1e-5
    exceeding = int((~(losses <= limit)).sum())
    if quantile_limit(losses) <= limit:
        return "confirmed", exceeding
    chance = scipy.stats.binom.cdf(len(losses) - exceeding, len(losses), SHARE)
    return "failed" if chance <= 1 - _CONFIDENCE else "consistent", exceeding


def mean_limit(values: NDArray[np.float64], *, binary: bool = False) -> float:
    """Compute an upper limit of a mean at 95%, for any distribution on [0, 1].

    The ``values``, ``[n]``, were drawn independently from it, in this order; ``binary`` ones are 0
    or 1. Returns the least multiple ``m`` of 0.001 at which a gambler who bets that values are
    below ``m`` on average would have had 20 times the capital that he began with (Waudby-Smith and
    Ramdas, 2024), or 1; for ``binary`` ones the limit of Clopper and Pearson. NaN for values that
    are.
    """
    n, total = len(values), float(values.sum())
    if math.isnan(total):
        return math.nan
    if binary:
        return float(scipy.stats.beta.ppf(_CONFIDENCE, total + 1, n - total)) if total < n else 1.0
    before = np.arange(2, n + 2)
    mean = (0.5 + values.cumsum()) / before
    spread = (0.25 + np.square(values - mean).cumsum()) / before
    wanted = math.log(1 / (1 - _CONFIDENCE))
    stake = np.sqrt(2 * wanted / (n * np.array([0.25, *spread[:-1]])))[:, None]
    m = np.arange(1, 1000) / 1000
    gain = np.minimum(stake, _RISKED / (1 - m)) * (m - values[:, None])
    won = (np.log1p(gain).cumsum(0).max(0) >= wanted).nonzero()[0]
    return float(m[won[0]]) if len(won) else 1.0
