"""Errors that say what was given, what is allowed and what to do."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The most characters that a message shows of one part.
LONGEST = 300


def _shorten(text: str) -> str:
    """Write a text on one line, without its middle where it is too long."""
    line, half = " ".join(text.split()), (LONGEST - 3) // 2
    return line if len(line) <= LONGEST else f"{line[:half]}...{line[-half:]}"


class LorapowerError(Exception):
    """Base class of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is unpickled by calling its class with the message alone, which
        # these classes do not accept; errors of other processes arrive pickled.
        return copyreg.__newobj__, (type(self),), {**vars(self), "args": self.args}  # type: ignore[attr-defined]


class InputError(LorapowerError, ValueError):
    """Refuse an argument, before any work starts.

    Numbers that are not finite, ranks out of range and sizes that do not fit each other are refused
    everywhere; docstrings name what is refused besides. The message is one line: "``name`` must be
    ``allowed``; got ``given``: ``remedy``". ``name`` is the parameter, or a part of it such as
    ``"rank of layer 2"``. Pass ``given`` as a description, or the ``value`` to have it written out.
    ``remedy`` may be empty.
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


class MissingError(InputError, ImportError):
    """Refuse to start without a library that an extra of this package installs."""

    name: str


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import libraries of an extra in this block; raise `MissingError` for one that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library == __name__.partition(".")[0]:
            raise
        remedy = f"pip install '.[{extra}]' in a checkout of lorapower"
        raise MissingError(f"the extra `{extra}`", "installed", f"no {library}", remedy) from error


class SingularError(LorapowerError, ArithmeticError):
    """Report that every splitting of an update among layers loses more than half of the digits.

    ``layer``, counted from 1, has the worst system. Its ``condition_number`` is compared with
    ``singular_from``, from which on it counts as singular. ``rounding_error`` is that of the best
    splitting, relative to the result; ``member`` names the member of a batch.
    """

    def __init__(
        self,
        layer: int,
        condition_number: float,
        rounding_error: float,
        singular_from: float,
        member: str,
    ) -> None:
        self.layer = layer
        kind, remedy = "ill-conditioned", "use float64, give more rank, or accept it by throw=False"
        if condition_number > singular_from:
            kind = "singular"
            remedy = (
                "a singular layer needs the rank that it lacks, or more; or perturb its weights"
            )
        super().__init__(
            f"the best splitting leaves a relative rounding error of {rounding_error:.1e}, more "
            f"than half of the digits; what the adapter of layer {layer}{member} acts through is "
            f"{kind} (condition number {condition_number:.1e}): {remedy}"
        )


class PrecisionError(LorapowerError, ArithmeticError):
    """Report that the biases that make layers linear over a region cost too many digits.

    ``digits_lost`` decimal digits are expected in ``block``, counted from 1, above ``limit``.
    """

    def __init__(
        self, block: int, digits_lost: float, *, limit: float, dtype: object, member: str = ""
    ) -> None:
        self.block, self.digits_lost = block, digits_lost
        super().__init__(
            f"the biases that make block {block}{member} linear over the region cost about "
            f"{digits_lost:.1f} of the decimal digits of {dtype}; at most {limit:.1f} are accepted:"
            " take a smaller region, a wider type, or accept it by throw=False"
        )


class ResultsError(LorapowerError, OSError):
    """Report that a file of results cannot be used; nothing that it holds is lost."""

    def __init__(self, path: Path, problem: str, *, remedy: str) -> None:
        super().__init__(f"{path} {problem}: {remedy}")
