"""Rank threshold and least error of a deep linear network (chapter 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import lowrank
from ..errors import InputError
from ..networks import LinearNetwork


def error_matrix(frozen: LinearNetwork, target: LinearNetwork) -> Float[Tensor, "*batch out in"]:
    """``E = W̄ − ∏_l W_l``: what adapters of a linear network have to make up for (chapter 1).

    Raises `InputError` when input or output sizes, types or batch shapes of the two do not match.
    """
    ends = [(network.widths[0], network.widths[-1]) for network in (frozen, target)]
    if ends[0] != ends[1]:
        raise InputError(
            "target",
            given="{} inputs and {} outputs".format(*ends[1]),
            allowed="of {} inputs and {} outputs, like the frozen network".format(*ends[0]),
        )
    if frozen.dtype != target.dtype:
        raise InputError(
            "target",
            allowed=f"{frozen.dtype}, like the frozen network",
            given=target.dtype,
            remedy="convert one with .to(dtype)",
        )
    try:
        torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    except RuntimeError as error:
        raise InputError(
            "target",
            given=tuple(target.batch_shape),
            allowed=f"of a batch shape that broadcasts with {tuple(frozen.batch_shape)}",
        ) from error
    return target.product() - frozen.product()


def rounding_scale(frozen: LinearNetwork, target: LinearNetwork) -> Float[Tensor, "*batch"]:
    """``‖W̄‖_2 + ∏_l ‖W_l‖_2``: what in ``E`` is below ``D · eps`` times this is rounding."""
    sizes = [
        torch.stack([lowrank.spectrum(weight)[..., 0] for weight in network.weights]).prod(0)
        for network in (frozen, target)
    ]
    return sizes[0] + sizes[1]


def error_rank(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``rank E``, counting only singular values above the rounding of ``E`` itself."""
    E = error_matrix(frozen, target)
    return lowrank.rank(E, scale=rounding_scale(frozen, target))


def linear_threshold(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``⌈rank(E) / L⌉``: the least equal rank at which a linear network is adapted exactly.

    Source: corollary "exactness threshold", chapter 1.
    """
    return -(-error_rank(frozen, target) // frozen.depth)


def linear_error(
    frozen: LinearNetwork, target: LinearNetwork, total_rank: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Least spectral and Frobenius error of any adapters of total rank ``r = Σ_l R_l``.

    ``σ_{r+1}(E)`` and ``(Σ_{d>r} σ_d(E)²)^{1/2}``. Source: theorem "optimal adaptation of a deep
    linear network", chapter 1; the lower bound needs no assumption.
    """
    return lowrank.tail_norms(lowrank.spectrum(error_matrix(frozen, target)), total_rank)
