"""Checks of arguments: each returns the usable value or raises `InputError`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch

from ._errors import InputError


def integer(name: str, value: Any, low: int, high: int = sys.maxsize, *, limit: str = "") -> int:
    """Read an integer between ``low`` and ``high``; ``limit`` says what ``high`` is."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and low <= value <= high:
        return int(value)
    allowed = f"an integer from {low}" + (f" to {high}" if high != sys.maxsize else "")
    raise InputError(name, allowed=f"{allowed} ({limit})" if limit else allowed, value=value)


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Refuse a value that is not one of the options."""
    if value not in options:
        raise InputError(name, allowed=f"one of {', '.join(map(repr, options))}", value=value)


def flag(name: str, value: Any) -> bool:
    """Read ``True`` or ``False``, and nothing that only counts as one of them."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InputError(name, allowed="True or False", value=value)


@contextmanager
def flushing() -> Iterator[None]:
    """Treat subnormal numbers as zeros in this thread and those it starts.

    Some processors are slow with subnormal numbers, and sums do not feel them.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
