"""Claim what a chapter predicted and measured, and record whether they agree.

A claim at the end of a cell shows itself, and leaves a record for the scorecard.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

MIME = "application/vnd.lorapower.claim+json"


@dataclass(frozen=True)
class Claim:
    """One checked statement, to be understood by itself; all fields but ``holds`` are Markdown.

    ``label`` names a statement of the book, whose prediction or requirement is ``predicted``. The
    requirement is ``by_hand`` where the statement is proved and says less than it.
    """

    statement: str
    label: str
    predicted: str
    measured: str
    holds: bool
    by_hand: bool = False

    @property
    def observed(self) -> bool:
        """Whether it belongs to an observation: its bar was set by hand, nothing is proved."""
        return self.label.startswith("obs-")

    @property
    def expected(self) -> str:
        """What ``predicted`` is: ``"required"`` if set by hand, else ``"predicted"``."""
        return "required" if self.observed or self.by_hand else "predicted"

    @property
    def line(self) -> str:
        """All of it in a line, as a cell shows it."""
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
    expected, found = _numbers("predicted", predicted), _numbers("measured", measured)
    unit = np.abs(expected) if scale is None else _numbers("scale", scale)
    difference, unit = np.broadcast_arrays(np.abs(found - expected), unit)
    # `<=` is false for NaN, which thus never holds.
    holds = difference <= rtol * unit
    if rtol:
        allowed = f"{_range(expected)}, within {number(rtol, 3)} relative"
        shown = f"off by {_deviation(difference, unit)}"
    else:
        allowed, shown = _range(expected), _range(found)
    return Claim(_count_seeds(statement, seeds), label, allowed, shown, bool(holds.all()))


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
    claim = _compare("≤", np.less_equal, _count_seeds(statement, seeds), label, measured, bound)
    return replace(claim, by_hand=by_hand)


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
    claim = _compare("≥", np.greater_equal, _count_seeds(statement, seeds), label, measured, bound)
    return replace(claim, by_hand=by_hand)


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
    sign: str, compare: np.ufunc, statement: str, label: str, measured: ArrayLike, bound: ArrayLike
) -> Claim:
    found, limit = _numbers("measured", measured), _numbers("bound", bound)
    # Different bounds must not read like one interval for all values.
    limits = _range(limit) + ("" if limit.min() == limit.max() else ", each its own")
    holds = bool(compare(found, limit).all())
    return Claim(statement, label, f"{sign} {limits}", _range(found), holds)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        raise InputError(name, allowed="at least one number", given="none: nothing was checked")
    return numbers


def _range(numbers: NDArray[np.float64]) -> str:
    low, high = (number(value, 3) for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} … {high}"


def _count_seeds(statement: str, seeds: int | None) -> str:
    return statement + {None: "", 1: " (one seed)"}.get(seeds, f" ({seeds} seeds)")
