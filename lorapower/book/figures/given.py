"""What figures are given: mappings from labels to what is to be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError


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
