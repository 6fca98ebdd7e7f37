"""Errors of texts in one number, and limits that hold for any distribution of texts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

#: The share of texts that a certificate speaks of.
SHARE = 0.9
#: How often a certificate may be wrong. All that is said of the confidence follows from this.
DOUBT = 0.05
#: Sizes of adapters that are certified together, each at this part of the doubt.
SIZES = 7
#: What is certified and what it is a part of, in words.
PROMISE = f"at least {SHARE:.0%} of texts like these lose at most"
UNIT = "of what tuning typically changes in a text"
#: How often a certificate of first plans is wrong, in words.
SELDOM = f"at most one in {1 / DOUBT:.3g}"
# Evidence for or against a certificate is enough at this logarithm of a likelihood ratio.
_ENOUGH = math.log(1 / DOUBT)
# Logarithms of likelihood ratios of one text that does not exceed a limit and of one that does: if
# a twentieth exceed it rather than a tenth, and if a fifth do.
_RATIOS = [(math.log(0.95 / 0.9), math.log(0.5)), (math.log(0.8 / 0.9), math.log(2))]
# Of independent draws 1% have a larger rank correlation of neighbours, in units of its spread.
_ALIKE = 2.33


def confidence(doubt: float = DOUBT) -> str:
    """Write the confidence of a certificate for people."""
    return f"{1 - doubt:.1%}".replace(".0%", "%")


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
def allowed(texts: int, doubt: float = DOUBT) -> int:
    """Count how many of so many texts may exceed what they certify; -1 if they are too few.

    It is the most that a binomial number of draws with probability 0.1 does not exceed in at most
    ``doubt`` of cases (Wilks, 1941).
    """
    most = int(scipy.stats.binom.ppf(doubt, texts, 1 - SHARE))
    return most - int(scipy.stats.binom.cdf(most, texts, 1 - SHARE) > doubt)


#: Texts that each part needs, or groups of them: two of these may exceed what they certify, of
#: fewer one; and fewer say little about the inputs of modules.
LEAST_TEXTS = next(n for n in itertools.count(1) if allowed(n) == 2)


def fewest(texts: int) -> int:
    """Find the fewest texts of which as many may exceed a limit as of so many [prop-certificate].

    More of them only make the limit larger.
    """
    return next(n for n in range(texts, 0, -1) if allowed(n - 1) < allowed(texts))


def quantile_limit(losses: NDArray[np.float64], doubt: float = DOUBT) -> float:
    """Compute an upper limit of what 90% of texts lose at most [prop-certificate].

    It holds for any distribution from which the ``losses``, ``[n]``, were drawn independently, but
    for a share ``doubt`` of such draws. Infinite for too few losses: fewer than 29 at 0.05.
    """
    exceeding = allowed(len(losses), doubt)
    return math.inf if exceeding < 0 else float(np.sort(losses)[-1 - exceeding])


def search(
    lost: Callable[[int], float], number: int, start: int, aim: float, *, estimate: bool = False
) -> int:
    """Find the last of adapters before the first that loses more than the aim [prop-certificate].

    Of so many, from large to small, those from ``start`` on are tried. If the first one misses, it
    is that; for an ``estimate`` the first from there to larger ones that does not. A loss that is
    no number ends the search.
    """
    if estimate and lost(start) > aim:
        return next((k for k in reversed(range(start)) if not lost(k) > aim), 0)
    return max(itertools.takewhile(lambda k: lost(k) <= aim, range(start, number)), default=start)


class Evidence(NamedTuple):
    """What fresh texts say of a certificate, counted one after another in any number of checks.

    ``texts`` were counted, of which so many are ``exceeding`` the limit. ``confirming`` is the
    largest logarithm so far of the likelihood that a twentieth exceed it over that of a tenth, and
    ``contradicting`` that of a fifth over a tenth [prop-certificate].
    """

    texts: int = 0
    exceeding: int = 0
    confirming: float = 0.0
    contradicting: float = 0.0

    def add(self, exceeds: NDArray[np.bool_]) -> Evidence:
        """Count more texts, each of which exceeds the limit or does not."""
        outside = self.exceeding + exceeds.cumsum()
        inside = self.texts + np.arange(1, len(exceeds) + 1) - outside
        highest = [
            max(before, float((inside * below + outside * above).max()))
            for before, (below, above) in zip(self[2:], _RATIOS, strict=True)
        ]
        return Evidence(self.texts + len(exceeds), int(outside[-1]), *highest)

    @property
    def verdict(self) -> str:
        """``"failed"``, ``"confirmed"`` or ``"undecided"``.

        A certificate that is wrong is ever confirmed in at most a share ``DOUBT`` of cases, however
        often one checks, and a true one ever fails in at most as many.
        """
        if self.contradicting >= _ENOUGH:
            return "failed"
        return "confirmed" if self.confirming >= _ENOUGH else "undecided"

    def missing(self, share: float) -> int:
        """Estimate how many more texts would confirm the certificate, if this share exceed it."""
        below, above = _RATIOS[0]
        now = (self.texts - self.exceeding) * below + self.exceeding * above
        return math.ceil((_ENOUGH - now) / ((1 - share) * below + share * above))


def exceed(losses: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    """Say which losses exceed a limit by more than merged and unmerged adapters differ."""
    exceeding: NDArray[np.bool_] = ~(losses <= 1.001 * limit + 1e-5)
    return exceeding


def are_alike(losses: NDArray[np.float64]) -> bool:
    """Whether neighbouring losses go together as those of only 1% of independent draws do."""
    ranks = scipy.stats.rankdata(losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    return correlation * math.sqrt(len(losses)) > _ALIKE
