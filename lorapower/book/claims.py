"""Claim what a chapter predicted and measured, and record whether they agree.

A claim at the end of a cell shows itself, and leaves a record for the scorecard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from . import _run

MIME = "application/vnd.lorapower.claim+json"


@dataclass(frozen=True)
class Claim:
    """One checked statement, to be understood by itself; all fields but ``holds`` are Markdown.

    ``label`` names a statement of the book, whose prediction or requirement is ``predicted``. The
    requirement is ``by_hand`` where the statement is proved and says less than it, and is asked of
    the book's parameters alone: ``elsewhere`` only what is predicted counts. Nothing was there to
    check where ``measured`` is empty.
    """

    statement: str
    label: str
    predicted: str
    measured: str
    holds: bool
    by_hand: bool = False
    elsewhere: bool = False

    @property
    def observed(self) -> bool:
        """Whether it belongs to an observation: its bar was set by hand, nothing is proved."""
        return self.label.startswith("obs-")

    @property
    def expected(self) -> str:
        """What ``predicted`` is: ``"required"`` if set by hand, else ``"predicted"``."""
        return "required" if self.observed or self.by_hand else "predicted"

    @property
    def fails(self) -> bool:
        """Whether it does not hold though it should, with these parameters."""
        return not self.holds and not (self.elsewhere and self.expected == "required")

    @property
    def line(self) -> str:
        """All of it in a line, as a cell shows it."""
        if not self.measured:
            return f"– Nothing to check: {self.statement} (with these parameters)"
        if self.elsewhere and self.expected == "required":
            bar = f"{self.predicted} required with the book's parameters only"
            return f"○ Measured: {self.statement} ({self.measured}; {bar})"
        verdict = "✓ Holds" if self.holds else "✗ Fails"
        numbers = f"measured {self.measured}; {self.expected} {self.predicted}"
        return f"{verdict}: {self.statement} ({numbers})"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return {MIME: asdict(self), "text/markdown": self.line}


def equal(
    statement: str,
    label: str,
    *,
    predicted: ArrayLike,
    measured: ArrayLike,
    rtol: float = 0.0,
    scale: ArrayLike | None = None,
    seeds: int | None = None,
) -> Claim:
    """Claim ``|measured − predicted| ≤ rtol · scale`` for all entries; broadcasts.

    ``scale`` is by default ``|predicted|``. ``seeds`` ends the statement.
    """
    statement, found = _count_seeds(statement, seeds), _numbers(measured)
    if not found.size:
        return _nothing(statement, label)
    expected = _numbers(predicted)
    unit = np.abs(expected) if scale is None else _numbers(scale)
    difference, unit = np.broadcast_arrays(np.abs(found - expected), unit)
    # `<=` is false for NaN, which thus never holds.
    holds = difference <= rtol * unit
    if rtol:
        allowed = f"{_range(expected)}, within {number(rtol, 3)} relative"
        shown = f"off by {_deviation(difference, unit)}"
    else:
        allowed, shown = _range(expected), _range(found)
    elsewhere = bool(_run.changed)
    return Claim(statement, label, allowed, shown, bool(holds.all()), elsewhere=elsewhere)


def at_most(
    statement: str,
    label: str,
    *,
    measured: ArrayLike,
    bound: ArrayLike,
    seeds: int | None = None,
    by_hand: bool = False,
) -> Claim:
    """Claim ``measured ≤ bound`` for all entries; broadcasts. ``seeds`` ends the statement.

    The bound is set ``by_hand`` where no proof gives it, as the part of searches that converge.
    """
    statement = _count_seeds(statement, seeds)
    return _compare("≤", np.less_equal, statement, label, measured, bound, by_hand)


def at_least(
    statement: str,
    label: str,
    *,
    measured: ArrayLike,
    bound: ArrayLike,
    seeds: int | None = None,
    by_hand: bool = False,
) -> Claim:
    """Claim ``measured ≥ bound`` for all entries; broadcasts. ``seeds`` ends the statement.

    The bound is set ``by_hand`` where no proof gives it, as the part of searches that converge.
    """
    statement = _count_seeds(statement, seeds)
    return _compare("≥", np.greater_equal, statement, label, measured, bound, by_hand)


def number(value: float, digits: int) -> str:
    """Write a number with so many significant digits as Markdown: powers of ten are typeset."""
    if np.isnan(value):
        return "NaN"
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    if not exponent:
        return mantissa
    factor = "" if mantissa == "1" else rf"{mantissa}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def _deviation(difference: NDArray[np.float64], unit: NDArray[np.float64]) -> str:
    """Write the largest difference relative to its unit, or itself where the unit is 0."""
    if np.isnan(difference + unit).any():
        return number(np.nan, 2)
    exact = (unit == 0) & (difference > 0)
    if exact.any():
        return f"{number(difference[exact].max(), 2)} where 0 is allowed"
    return number(np.divide(difference, unit, where=unit > 0, out=np.zeros(unit.shape)).max(), 2)


def _compare(
    sign: str,
    compare: np.ufunc,
    statement: str,
    label: str,
    measured: ArrayLike,
    bound: ArrayLike,
    by_hand: bool,
) -> Claim:
    claim = Claim(statement, label, "", "", True, by_hand, bool(_run.changed))
    found, limit = _numbers(measured), _numbers(bound)
    if found.size and claim.elsewhere and claim.expected == "required":
        # What cannot be measured with these parameters is no finding.
        found, limit = (each[~np.isnan(found)] for each in np.broadcast_arrays(found, limit))
    if not found.size:
        return _nothing(statement, label)
    # Different bounds must not read like one interval for all values.
    limits = _range(limit) + ("" if limit.min() == limit.max() else ", each its own")
    holds = bool(compare(found, limit).all())
    return replace(claim, predicted=f"{sign} {limits}", measured=_range(found), holds=holds)


def _nothing(statement: str, label: str) -> Claim:
    """Claim nothing, which with the book's parameters is refused."""
    if not _run.changed:
        given = "none: nothing was checked"
        raise InputError("measured", allowed="at least one number", given=given)
    return Claim(statement, label, "", "", True, elsewhere=True)


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _range(numbers: NDArray[np.float64]) -> str:
    low, high = (number(value, 3) for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} … {high}"


def _count_seeds(statement: str, seeds: int | None) -> str:
    return statement + {None: "", 1: " (one seed)"}.get(seeds, f" ({seeds} seeds)")
