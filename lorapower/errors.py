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
    """No splitting that was tried adapts a linear network with the accuracy asked for.

    Attributes
    ----------
    layer : counted from 1, the one with the worst-conditioned system.
    condition_number : of that system.
    rounding_error : relative, of the best splitting.
    """

    def __init__(
        self, layer: int, condition_number: float, rounding_error: float, rtol: float, member: str
    ) -> None:
        self.layer, self.condition_number = layer, condition_number
        self.rounding_error = rounding_error
        super().__init__(
            f"the products that the adapter of layer {layer}{member} acts through are singular or "
            f"nearly so (condition number {condition_number:.1e}). The best splitting tried leaves "
            f"a relative error of {rounding_error:.1e}, more than rtol = {rtol:.1e}: the "
            "assumption of non-singularity fails (chapter 1). Give more rank to a singular "
            "layer, give this layer rank 0, or perturb the frozen weights"
        )
