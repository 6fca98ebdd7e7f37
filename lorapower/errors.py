"""The package's own errors: each says what was given, what is allowed and what to do."""

from __future__ import annotations


class LorapowerError(Exception):
    """Base class of every error that this package raises on purpose."""


class InputError(LorapowerError, ValueError):
    """An argument is not usable; raised before any work starts.

    Attributes
    ----------
    name : the argument, as the caller knows it.
    allowed : what would have been accepted, in words.
    given : what was passed (a value, or a short description of it).
    remedy : what to do about it, or an empty string where ``allowed`` says it.
    """

    def __init__(self, name: str, *, allowed: str, given: object, remedy: str = "") -> None:
        self.name, self.allowed, self.given, self.remedy = name, allowed, given, remedy
        advice = f": {remedy}" if remedy else ""
        super().__init__(f"{name} must be {allowed}; got {given}{advice}")


class SingularError(LorapowerError, ArithmeticError):
    """The non-singularity assumption of a construction fails.

    Attributes
    ----------
    layer : the layer, counted from 1, whose linear system cannot be solved.
    condition_number : of that system, for the best splitting that was tried.
    member : words that say which member of a batch, or an empty string for a single network.
    """

    def __init__(self, layer: int, condition_number: float, *, member: str = "") -> None:
        self.layer, self.condition_number, self.member = layer, condition_number, member
        super().__init__(
            f"the system to be solved for layer {layer}{member} is singular "
            f"(condition number {condition_number:.1e}), in the plain order and in every "
            "alternative tried: the non-singularity assumption of the optimal adaptation of a "
            "deep linear network fails (chapter 1); give more rank to a singular layer, give "
            "this layer rank 0, or perturb the frozen weights"
        )


class PrecisionError(LorapowerError, ArithmeticError):
    """The biases that make layers linear over a region swallow too many digits.

    Attributes
    ----------
    block : the block of layers, counted from 1.
    digits_lost, limit : expected loss of decimal digits, and what was accepted.
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
