"""The package's own errors: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import copyreg
import reprlib
from pathlib import Path
from typing import Any

# Characters that a message spends on one of its parts, and on one value in it, at most.
LONGEST = 300
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 60


def brief(value: object) -> str:
    """``repr(value)`` as a message can show it: on one line, long ones in part."""
    try:
        return shortened(_SHOWN.repr(value))
    except ValueError:  # Python writes out no integer of thousands of digits
        return f"a value of class {type(value).__name__}"


def shortened(text: str) -> str:
    """``text`` on one line and without its middle, where it is longer than a message shows."""
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
    """An argument is not usable; raised before any work starts.

    The message is one line of bounded length, whatever was passed.

    Attributes
    ----------
    name : str
        The argument, as the caller knows it.
    allowed : str
        What would have been accepted, in words.
    given
        What was passed: a value, or a description of it.
    remedy : str
        What to do about it, or an empty string where ``allowed`` says it.
    """

    def __init__(self, name: str, *, allowed: str, given: object, remedy: str = "") -> None:
        self.name, self.allowed, self.given, self.remedy = name, allowed, given, remedy
        shown = shortened(given) if isinstance(given, str) else brief(given)
        advice = f": {shortened(remedy)}" if remedy else ""
        super().__init__(f"{shortened(name)} must be {shortened(allowed)}; got {shown}{advice}")


class SingularError(LorapowerError, ArithmeticError):
    """No splitting that was tried adapts a linear network with the accuracy asked for.

    Attributes
    ----------
    layer : int
        Counted from 1, the one with the worst-conditioned system.
    condition_number : float
        Of that system.
    rounding_error : float
        Relative, of the best splitting.
    rtol : float
        What was accepted.
    singular_from : float
        The condition number from which on a product counts as singular.
    member : str
        Words that say which member of a batch, or an empty string for a single network.
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
        where = f"the products that the adapter of layer {layer}{member} acts through"
        if condition_number > singular_from:
            cause = (
                f"{where} are singular (condition number {condition_number:.1e}), so that the "
                "assumption of non-singularity fails: give more rank to a singular "
                "layer, give this layer rank 0, or perturb the frozen weights"
            )
        else:
            cause = (
                f"{where} are ill-conditioned (condition number {condition_number:.1e}): use "
                "float64, give more rank, or accept it with a larger rtol"
            )
        super().__init__(
            "the best splitting tried leaves a relative rounding error of "
            f"{rounding_error:.1e}, more than rtol = {rtol:.1e}; {cause}"
        )

    def at_layer(self, layer: int) -> SingularError:
        """The same error, of a layer that is counted in a larger network."""
        return SingularError(
            layer,
            self.condition_number,
            self.rounding_error,
            self.rtol,
            self.singular_from,
            self.member,
        )


class PrecisionError(LorapowerError, ArithmeticError):
    """The biases that make layers linear over a region swallow too many digits.

    Attributes
    ----------
    block : int
        The block of layers, counted from 1.
    digits_lost, limit : float
        Expected loss of decimal digits, and what was accepted.
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
    """A file of results cannot be used as it is; nothing that it holds is lost.

    Attributes
    ----------
    path : Path
        The file.
    problem : str
        What is the matter with it.
    remedy : str
        What to do about it.
    """

    def __init__(self, path: Path, problem: str, *, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{path} {problem}: {remedy}")
