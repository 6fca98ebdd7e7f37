"""Claims: what a chapter predicted, what it measured, and whether the one meets the other.

A claim at the end of a notebook cell shows itself there and leaves a record in the cell's output.
`read` collects the records of an executed notebook; the book's scorecard is made of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _checks
from ..errors import InputError, brief
from . import _given

MIME = "application/vnd.lorapower.claim+json"


@dataclass(frozen=True)
class Claim:
    """One checked statement; all fields but ``holds`` are Markdown.

    Attributes
    ----------
    statement : what is claimed.
    label : of the theorem, proposition or example of the book that it belongs to.
    predicted, measured : what the mathematics says and what the run gave.
    criterion : the comparison that decided.
    holds : its result.
    """

    statement: str
    label: str
    predicted: str
    measured: str
    criterion: str
    holds: bool

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        verdict = "✓ holds" if self.holds else "✗ fails"
        return {
            MIME: asdict(self),
            "text/markdown": f"**{verdict}**: {self.statement}. Predicted {self.predicted}; "
            f"measured {self.measured}; criterion: {self.criterion}.",
        }


def equal(
    statement: str,
    label: str,
    *,
    predicted: ArrayLike,
    measured: ArrayLike,
    rtol: float = 0.0,
    scale: ArrayLike | None = None,
) -> Claim:
    """``|measured − predicted| ≤ rtol · scale`` for all entries; broadcasts.

    ``scale`` is by default ``|predicted|``. With ``rtol = 0`` the values must be the same.
    """
    expected, found = _numbers("predicted", predicted), _numbers("measured", measured)
    unit = np.abs(expected) if scale is None else _numbers("scale", scale)
    rtol = _checks.tolerance("rtol", rtol)
    _check_shapes(predicted=expected, measured=found, scale=unit)
    # `<=` is false for NaN, so that a value that is no number never holds.
    holds = np.abs(found - expected) <= rtol * unit
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.nan_to_num(np.abs(found - expected) / unit).max()
    return Claim(
        statement,
        label,
        predicted=_range(expected),
        measured=f"{_range(found)}, deviation at most {number(deviation, 2)}"
        if rtol
        else _range(found),
        criterion=f"relative deviation at most {number(rtol, 3)}" if rtol else "equal",
        holds=bool(holds.all()),
    )


def at_most(statement: str, label: str, *, measured: ArrayLike, bound: ArrayLike) -> Claim:
    """``measured ≤ bound`` for all entries; broadcasts."""
    found, limit = _numbers("measured", measured), _numbers("bound", bound)
    _check_shapes(measured=found, bound=limit)
    holds = bool((found <= limit).all())
    return Claim(statement, label, f"≤ {_range(limit)}", _range(found), "measured ≤ bound", holds)


def at_least(statement: str, label: str, *, measured: ArrayLike, bound: ArrayLike) -> Claim:
    """``measured ≥ bound`` for all entries; broadcasts."""
    found, limit = _numbers("measured", measured), _numbers("bound", bound)
    _check_shapes(measured=found, bound=limit)
    holds = bool((found >= limit).all())
    return Claim(statement, label, f"≥ {_range(limit)}", _range(found), "measured ≥ bound", holds)


def number(value: float, digits: int) -> str:
    """Markdown for a number of so many significant digits: powers of ten are typeset."""
    digits = _checks.integer("digits", digits, 1, 17)
    double = _numbers("value", value)
    if double.ndim:
        raise InputError("value", allowed="one number", given=brief(value))
    mantissa, _, exponent = f"{double.item():.{digits}g}".partition("e")
    if not exponent:
        return mantissa
    factor = "" if mantissa == "1" else rf"{mantissa}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def read(path: str | Path) -> list[Claim]:
    """The claims that an executed notebook recorded, in its order."""
    place = _checks.path("path", path)
    try:
        notebook = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("path", allowed="of a notebook", given=f"{place} ({error})") from error
    return [
        Claim(**output["data"][MIME])
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if MIME in output.get("data", {})
    ]


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    numbers = _given.numbers(name, values)
    if not numbers.size:
        raise InputError(name, allowed="at least one number", given="none: nothing was checked")
    return numbers


def _check_shapes(**given: NDArray[np.float64]) -> None:
    _checks.common_shape(
        " and ".join(given), [numbers.shape for numbers in given.values()], what="shapes"
    )


def _range(numbers: NDArray[np.float64]) -> str:
    low, high = (number(value, 4) for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} … {high}"
