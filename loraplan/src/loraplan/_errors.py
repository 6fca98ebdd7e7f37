"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import copyreg
from pathlib import Path
from typing import Any

# The most characters that a message shows of one part.
_LONGEST = 300


def _shorten(text: str) -> str:
    """Write a text on one line, without its middle where it is too long."""
    line, half = " ".join(text.split()), (_LONGEST - 3) // 2
    return line if len(line) <= _LONGEST else f"{line[:half]}...{line[-half:]}"


class LoraplanError(Exception):
    """Base class of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is unpickled by calling its class with the message alone, which
        # these classes do not accept; errors of other processes arrive pickled.
        return copyreg.__newobj__, (type(self),), {**vars(self), "args": self.args}  # type: ignore[attr-defined]


class InputError(LoraplanError, ValueError):
    """Refuse an argument, before any work starts.

    The message is one line: "``name`` must be ``allowed``; got ``given``: ``remedy``". Pass
    ``given`` as a description, or the ``value`` to have it written out. ``remedy`` may be empty.
    """

    def __init__(
        self,
        name: str,
        allowed: str,
        given: object = None,
        remedy: str = "",
        *,
        value: object = None,
    ) -> None:
        self.name = name
        shown = repr(value) if given is None else str(given)
        message = f"{_shorten(name)} must be {_shorten(allowed)}; got {_shorten(shown)}"
        super().__init__(f"{message}: {_shorten(remedy)}" if remedy else message)


class ResultsError(LoraplanError, OSError):
    """Report that a file of results cannot be used; nothing that it holds is lost."""

    def __init__(self, path: Path, problem: str, *, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{path} {problem}: {remedy}")
