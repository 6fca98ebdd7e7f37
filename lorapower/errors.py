"""The package's errors: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import copyreg
import reprlib
from pathlib import Path
from typing import Any

# Most characters of a part of a message, and of a value in it.
LONGEST = 300
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 60


def _brief(value: object) -> str:
    """Write ``repr(value)`` on one line, shortened to at most ``LONGEST`` characters."""
    try:
        return _shorten(_SHOWN.repr(value))
    except ValueError:  # Python writes out no integer of thousands of digits
        return f"a value of class {type(value).__name__}"


def _shorten(text: str) -> str:
    """A text on one line, without its middle where it is too long."""
    line = " ".join(text.split())
    half = (LONGEST - 3) // 2
    return line if len(line) <= LONGEST else f"{line[:half]}...{line[-half:]}"


class LorapowerError(Exception):
    """Base class of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled, as on the way from another process, an exception is otherwise made anew from its
        # message alone, which is not what these constructors take.
        return copyreg.__newobj__, (type(self),), {**vars(self), "args": self.args}  # type: ignore[attr-defined]


class InputError(LorapowerError, ValueError):
    """An argument cannot be used; raised before any work starts.

    The message is one line: "``name`` must be ``allowed``; got ``given``: ``remedy``". ``name`` is
    the parameter's, or a part of the argument such as ``"rank of layer 2"``; programs may rely on
    it. ``given`` is a description, or else the ``value`` is written out; ``remedy`` may be empty.
    """

    def __init__(
        self,
        name: str,
        *,
        allowed: str,
        given: object = None,
        value: object = None,
        remedy: str = "",
    ) -> None:
        self.name, self.allowed, self.remedy = name, allowed, remedy
        self.given = _brief(value) if given is None else given
        shown = _shorten(self.given) if isinstance(self.given, str) else _brief(self.given)
        advice = f": {_shorten(remedy)}" if remedy else ""
        super().__init__(f"{_shorten(name)} must be {_shorten(allowed)}; got {shown}{advice}")


class SingularError(LorapowerError, ArithmeticError):
    """No splitting of the update among the layers is as accurate as was asked for.

    ``layer``, counted from 1, has the worst system, of ``condition_number``; above
    ``singular_from`` it counts as singular. ``rounding_error`` is the best splitting's, ``rtol``
    what was accepted; ``member`` names the member of a batch.
    """

    def __init__(
        self,
        layer: int,
        condition_number: float,
        rounding_error: float,
        rtol: float,
        singular_from: float,
        member: str,
    ) -> None:
        self.layer, self.condition_number = layer, condition_number
        self.rounding_error, self.rtol = rounding_error, rtol
        self.singular_from, self.member = singular_from, member
        kind, remedy = "ill-conditioned", ": use float64, give more rank, or accept a larger rtol"
        if condition_number > singular_from:
            kind = "singular"
            remedy = (
                ", so that the assumption of non-singularity fails: give more rank to a singular "
                "layer, give this layer rank 0, or perturb the frozen weights"
            )
        super().__init__(
            "the best splitting tried leaves a relative rounding error of "
            f"{rounding_error:.1e}, more than rtol = {rtol:.1e}; the products that the adapter of "
            f"layer {layer}{member} acts through are {kind} (condition number "
            f"{condition_number:.1e}){remedy}"
        )

    def at_layer(self, layer: int) -> SingularError:
        """The same error for a layer counted in a larger network."""
        return SingularError(**{**vars(self), "layer": layer})


class PrecisionError(LorapowerError, ArithmeticError):
    """Biases that make layers linear over a region cost too many digits.

    ``digits_lost`` decimal digits are expected in ``block``, counted from 1, above ``limit``.
    """

    def __init__(
        self, block: int, digits_lost: float, *, limit: float, dtype: object, member: str = ""
    ) -> None:
        self.block, self.digits_lost, self.limit = block, digits_lost, limit
        super().__init__(
            f"the biases that make the layers of block {block}{member} linear over the region "
            f"cost about {digits_lost:.1f} of the decimal digits of {dtype}; at most {limit:.1f} "
            "are accepted: take a smaller region, a wider type, or pass a higher max_digits_lost"
        )


class ResultsError(LorapowerError, OSError):
    """A file of results, ``path``, cannot be used; nothing that it holds is lost."""

    def __init__(self, path: Path, problem: str, *, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{path} {problem}: {remedy}")
