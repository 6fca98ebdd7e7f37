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
    """

    def __init__(self, layer: int, condition_number: float, *, member: str = "") -> None:
        self.layer, self.condition_number = layer, condition_number
        super().__init__(
            f"the system to be solved for layer {layer}{member} is singular "
            f"(condition number {condition_number:.1e}), in the plain order and in every "
            "alternative tried: the non-singularity assumption of the optimal adaptation of a "
            "deep linear network fails (chapter 1); give more rank to a singular layer, give "
            "this layer rank 0, or perturb the frozen weights"
        )
