"""Upper limits of mean losses and of quantiles that hold for any distribution of texts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray

#: How often a limit may be wrong. All that is said of the confidence follows from this.
DOUBT = 0.05
#: The share of texts that lose at most the stated part of what tuning changed in them.
SHARE = 0.9
# Stakes of the bets that hold at any time, as parts of the largest ones. Each is as likely.
_STAKES = (np.arange(256) + 0.5) / 256
# The largest stake where the number of texts is known before, lest one text ruins the bettor.
_LARGEST = 0.9
# Of independent draws 1% have a larger rank correlation of neighbours, in units of its spread.
_ALIKE = 2.33


def confidence() -> str:
    """Write the confidence of all limits for people."""
    return f"{1 - DOUBT:.1%}".replace(".0%", "%")


def binomial_limit(failed: int, texts: int) -> float:
    """Compute an upper limit of the share of all texts that fail, if so many of so many do.

    It is wrong in a share of 0.05 of independent draws at most, and the least that is (Clopper and
    Pearson, 1934) [prop-certificate].

    Examples
    --------
    >>> from loraplan import binomial_limit
    >>> round(binomial_limit(6, 116), 4)
    0.0995
    """
    if failed == texts:
        return 1.0
    return float(scipy.stats.beta.ppf(1 - DOUBT, failed + 1, texts - failed))


def mean_limit(losses: NDArray[np.float64]) -> float:
    """Compute an upper limit of a mean by bets against larger ones [prop-certificate].

    It holds for any distribution on [0, 1] from which the ``losses``, ``[n]``, were drawn
    independently, in this order, but for a share of 0.05 of such draws: they must not be sorted.
    Against a mean ``m`` a fortune grows by
    ``1 + λ (m − x)`` with each loss ``x``; the stake ``λ`` is made of the losses before. It is a
    martingale if ``m`` is the mean, so that it ever reaches 20 in at most that share of draws, and
    it grows with ``m``. Source: Waudby-Smith and Ramdas (2024), their predictable plug-in. Where
    losses can only be 0 or 1, `binomial_limit` is smaller.
    """
    if not len(losses):
        return 1.0
    counts = np.arange(2, len(losses) + 2)
    means = (0.5 + losses.cumsum()) / counts
    variances = (0.25 + np.square(losses - means).cumsum()) / counts
    before = np.concatenate([[0.25], variances[:-1]])
    stakes = np.sqrt(2 * math.log(1 / DOUBT) / (len(losses) * before))

    def fortune(m: float) -> float:
        kept = np.minimum(stakes, _LARGEST / (1 - m))
        return float(np.log1p(kept * (m - losses)).cumsum().max())

    return _least(fortune, 0.0)


def repeated_limit(losses: NDArray[np.float64]) -> float:
    """Compute a limit of a mean that holds however often one looks, with ever more texts.

    A fortune is divided among stakes ``c/(1 − m)``, with ``0 < c < 1``, against a mean ``m``, and
    grows to the average of ``Π (1 + c (m − x)/(1 − m))`` over them. It depends on no order of the
    ``losses``, ``[n]``. Where the mean is at least ``m`` it is a supermartingale, and ever reaches
    20 in at most a share of 0.05 of cases (Ville) [prop-certificate]. For losses of 0 and
    1 it is a likelihood ratio, with all shares below ``m`` as likely.
    """
    values, counts = np.unique(losses, return_counts=True)

    def fortune(m: float) -> float:
        gains = np.log1p(_STAKES[:, None] * (m - values) / (1 - m)) @ counts
        return float(np.logaddexp.reduce(gains)) - math.log(len(_STAKES))

    return _least(fortune, float(losses.mean()) if len(losses) else 0.0)


def _least(fortune: Callable[[float], float], low: float) -> float:
    """Find the least mean at which the logarithm of a fortune, which grows, is ``1/DOUBT``."""
    high, goal = 1 - 1e-9, math.log(1 / DOUBT)
    if not (low < high and fortune(high) > goal):
        return 1.0
    return float(scipy.optimize.brentq(lambda m: fortune(m) - goal, low, high, xtol=1e-9))


def ratio(squares: NDArray[np.float64], effect: NDArray[np.float64]) -> float:
    """``(Σ e / Σ d)^{1/2}``; 0 where nothing was lost of nothing."""
    lost, whole = squares.sum(), effect.sum()
    if whole == 0:
        return 0.0 if lost == 0 else math.inf
    return float(math.sqrt(lost / whole))


def quantile(losses: NDArray[np.float64]) -> float:
    """The least loss that nine of ten texts do not exceed."""
    return float(np.quantile(losses, SHARE, method="inverted_cdf"))


@functools.cache
def allowed(texts: int, *, repeated: bool = False) -> int:
    """Count how many of so many texts may lose more than nine of ten do; -1 if they are too few.

    It is the most by which at least nine of ten lose no more: by `binomial_limit` (Wilks, 1941) or,
    ``repeated``, by `repeated_limit`.
    """

    def limit(failed: int) -> float:
        if not repeated:
            return binomial_limit(failed, texts)
        return repeated_limit(np.repeat([1.0, 0.0], [failed, texts - failed]))

    return next(k for k in range(texts + 1) if limit(k) > 1 - SHARE) - 1


#: Texts that each part needs, or groups of them: two of these may exceed what they certify, of
#: fewer one; and fewer say little about the inputs of modules.
LEAST_TEXTS = next(n for n in itertools.count(1) if allowed(n) == 2)


def fewest(texts: int) -> int:
    """Find the fewest texts of which as many may exceed a limit as of so many [prop-certificate].

    More of them only make the limit larger.
    """
    return next(n for n in range(texts, 0, -1) if allowed(n - 1) < allowed(texts))


def quantile_limit(losses: NDArray[np.float64], *, repeated: bool = False) -> float:
    """Compute an upper limit of what 90% of texts lose at most [prop-certificate].

    It holds for any distribution from which the ``losses``, ``[n]``, were drawn independently, but
    for a share of 0.05 of such draws or, ``repeated``, of all who look at ever more texts as often
    as they like. Infinite for too few: fewer than 29, or 43.
    """
    exceeding = allowed(len(losses), repeated=repeated)
    return math.inf if exceeding < 0 else float(np.sort(losses)[-1 - exceeding])


def search(holds: Callable[[int], bool], number: int) -> int:
    """Find the last of so many adapters before the first that does not hold [prop-certificate].

    They are tried from large to small. If the first one does not hold, it is that.
    """
    return max(itertools.takewhile(holds, range(number)), default=0)


def are_alike(losses: NDArray[np.float64]) -> bool:
    """Whether neighbouring losses go together as those of only 1% of independent draws do."""
    ranks = scipy.stats.rankdata(losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    return correlation * math.sqrt(len(losses)) > _ALIKE


def drop_limit(tuned: NDArray[np.float64], standin: NDArray[np.float64]) -> float:
    """Compute an upper limit of how far a mean score in [0, 1] falls, from both scores of texts.

    It is `repeated_limit` of ``(1 + tuned − standin) / 2``, in units of the score; below 0 where
    the score rises. It depends on no order of the texts, and holds however often one looks.
    """
    return 2 * repeated_limit((1 + tuned - standin) / 2) - 1
