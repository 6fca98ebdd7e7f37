"""What may be promised of an adapter or another stand-in: a bounded loss of texts, on average."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._errors import InputError
from ._limits import SHARE, binomial_limit, quantile, quantile_limit
from ._measuring import Measured, Measurement
from .pair import ANSWER

# The part of what may be lost that the smallest adapter loses on texts for selection.
_SAFE = 0.6


class Promise(NamedTuple):
    """A kind of promise and its share; see `Measured`.

    At least the ``share`` of decisions (``"same"``) or of greedy answers (``"same_answers"``) is
    the tuned model's; or nine of ten texts lose at most the share of what tuning changed in them
    (``"error"``).
    """

    kind: Literal["same", "error", "same_answers"]
    share: float

    @classmethod
    def asked(cls, **shares: Any) -> Promise | None:
        """Find the one that is asked for, if any is; raises `InputError` for what is no share."""
        given = {kind: share for kind, share in shares.items() if share is not None}
        if len(given) > 1:
            raise InputError(", ".join(shares), "given alone, each of them", " and ".join(given))
        for kind, share in given.items():
            number = isinstance(share, Real) and not isinstance(share, bool)
            if not (number and 0 < share < 1):
                remedy = "write 0.9 for nine of ten"
                raise InputError(kind, "above 0 and below 1", value=share, remedy=remedy)
        return next((cls(kind, float(share)) for kind, share in given.items()), None)  # type: ignore[arg-type]

    @property
    def limit(self) -> str:
        """The limit of a `Measured` that says so."""
        return "own_effect" if self.kind == "error" else self.kind

    def holds(self, measured: Measured) -> bool:
        """Whether the limits from some texts say that as much is kept."""
        if self.kind == "error":
            return measured.own_effect <= self.share
        return float(getattr(measured, self.kind)) >= self.share

    def losses(self, measurement: Measurement) -> NDArray[np.float64]:
        """What each text loses: of its own effect, of its decisions, or its answer."""
        if self.kind == "error":
            return measurement.reference.own(measurement.squares)
        return measurement.differing if self.kind == "same" else measurement.compare().other_answers

    def lost(self, measurement: Measurement) -> float:
        """The part that texts for selection lose of what they safely may."""
        losses = self.losses(measurement)
        if self.kind == "error":
            return quantile(losses) / (_SAFE * self.share)
        return float(losses.mean()) / (_SAFE * (1 - self.share))

    def passes(self, measurement: Measurement) -> bool:
        """Whether texts certify it; the limits of `holds`, without all others."""
        losses = self.losses(measurement)
        if self.kind == "error":
            return quantile_limit(losses) <= self.share
        if self.kind == "same":
            return 1 - measurement.reference.limit(losses) >= self.share
        return 1 - binomial_limit(int(losses.sum()), len(losses)) >= self.share

    @property
    def error(self) -> float:
        """An error of the function that may suffice."""
        return 0.45 * self.share if self.kind == "error" else 1 - self.share

    @property
    def words(self) -> str:
        """The promise, for people."""
        if self.kind == "error":
            lost = f"{most(self.share)} of what tuning changed in them"
            return f"{SHARE:.0%} of texts lose at most {lost}"
        if self.kind == "same":
            return f"at least {least(self.share)} of decisions are the tuned model's"
        answer = f"the tuned model's answer, token for token up to {ANSWER}"
        return f"at least {least(self.share)} of prompts get {answer}"


def most(share: float) -> str:
    """Write an upper limit of a share for people, rounded up."""
    return percent(math.ceil(1000 * share - 1e-9) / 1000) if math.isfinite(share) else "–"


def least(share: float) -> str:
    """Write a lower limit of a share for people, rounded down."""
    return percent(math.floor(1000 * share + 1e-9) / 1000) if math.isfinite(share) else "–"


def percent(share: float) -> str:
    """Write a share for people."""
    return f"{share:.1%}".replace(".0%", "%") if math.isfinite(share) else "–"
