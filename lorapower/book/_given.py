"""Checks of what claims and figures are given; all raise `InputError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, brief


def check_named(**given: Any) -> None:
    """Refuse what has no labels for what is to be drawn."""
    for name, entries in given.items():
        if not isinstance(entries, Mapping):
            raise InputError(
                name, allowed="a mapping from labels to values", given=type(entries).__name__
            )


def check_some(**given: Any) -> None:
    """Refuse what has no labels, or nothing that is to be drawn."""
    check_named(**given)
    for name, entries in given.items():
        if not entries:
            raise InputError(name, allowed="a mapping with an entry or more", given="none")


def numbers(name: str, values: Any, count: int | None = None) -> NDArray[np.float64]:
    """Numbers in double precision, ``count`` of them (or rows of them)."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise InputError(name, allowed="numbers", given=brief(values)) from error
    if count is not None and (not found.ndim or len(found) != count):
        raise InputError(name, allowed=f"{count} of them", given=f"shape {found.shape}")
    return found


def points(name: str, pair: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates of points that can be drawn."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise InputError(name, allowed="a pair of x and y", given=brief(pair))
    x = np.atleast_1d(numbers(f"x of {name}", pair[0]))
    return x, np.atleast_1d(numbers(f"y of {name}", np.atleast_1d(pair[1]), len(x)))
