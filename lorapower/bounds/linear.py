"""Rank threshold and least error of a deep linear network."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from .. import lowrank
from ..lowrank import Norms
from ..networks.gap import Gap
from ..networks.linear import LinearNetwork


def error_matrix(frozen: LinearNetwork, target: LinearNetwork) -> Float[Tensor, "*batch out in"]:
    """``E = W̄ − ∏_l W_l``: what adapters of a linear network have to make up for.

    Raises `InputError` when input or output sizes, types or batch shapes of the two do not match.
    """
    return Gap(frozen, target).matrix


def error_rank(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``rank E``, counting only singular values above its rounding: that of a `networks.Gap`."""
    return Gap(frozen, target).rank


def linear_threshold(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``⌈rank(E) / L⌉``: the least rank for all layers with which they are adapted exactly.

    Raises `InputError` where a hidden layer is narrower than the inputs or outputs. Source:
    [cor-threshold].
    """
    return Gap(frozen, target).threshold


def linear_error(frozen: LinearNetwork, target: LinearNetwork, total_rank: int) -> Norms:
    """Least spectral and Frobenius error of any adapters of total rank ``r = Σ_l R_l``.

    ``σ_{r+1}(E)`` and ``(Σ_{d>r} σ_d(E)²)^{1/2}``. Source: [thm-optimal-adaptation]; the lower
    bound needs no assumption.
    """
    return lowrank.tail_norms(Gap(frozen, target).spectrum, total_rank)
