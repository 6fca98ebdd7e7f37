"""Check annotations, shapes included, when functions return.

The option ``--jaxtyping-packages`` in ``pyproject.toml`` names the packages. What front doors are
given may be wrong on purpose, and they refuse it themselves; so arguments are checked only once a
function has returned. What is found then is an annotation that is not true.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction, signature
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

# Integers are taken where floats are.
_CONF = BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check one of the two functions that jaxtyping makes of each: that called at its return."""
    names = [*signature(function).parameters] if isfunction(function) else []
    last = names[-1] if names else ""
    if not (last.startswith("ret") and last[3:].isdigit()):
        return function
    try:
        return beartype(conf=_CONF)(function)
    except BeartypeDecorHintException:  # such as Self, outside of classes
        return function
