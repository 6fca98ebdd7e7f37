"""Outputs of ReLU networks that are dead, and what they cost [prop-dead-outputs]."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks


def dead(outputs: Float[Tensor, "*batch out samples"]) -> Bool[Tensor, "*batch out"]:
    """Which outputs are 0 at all samples, so that no error at these brings them back."""
    return (_checks.tensor("outputs", outputs, min_dims=2) == 0).all(-1)


def share(
    difference: Float[Tensor, "*#batch out samples"], chosen: Bool[Tensor, "*#batch out"]
) -> Float[Tensor, "*batch"]:
    """The part of a squared error ``Σ ‖f(x) − f̄(x)‖²`` that is in the chosen outputs.

    Not a number where there is no error.
    """
    errors = _checks.tensor("difference", difference, min_dims=2).square().sum(-1)
    return (errors * chosen).sum(-1) / errors.sum(-1)
