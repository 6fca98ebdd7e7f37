"""Rank threshold and least error of a deep linear network (chapter 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks import LinearNetwork, product


def error_matrix(frozen: LinearNetwork, target: LinearNetwork) -> Float[Tensor, "*batch out in"]:
    """``E = W̄ − ∏_l W_l``: what adapters of a linear network have to make up for (chapter 1).

    Raises `InputError` when input or output sizes, types or batch shapes of the two do not match.
    """
    frozen, target = LinearNetwork.of(frozen, "frozen"), LinearNetwork.of(target, "target")
    ends = [(network.widths[0], network.widths[-1]) for network in (frozen, target)]
    if ends[0] != ends[1]:
        raise InputError(
            "target",
            given="{} inputs and {} outputs".format(*ends[1]),
            allowed="of {} inputs and {} outputs, like the frozen network".format(*ends[0]),
        )
    _checks.like_frozen(target.dtype, frozen.dtype)
    _checks.common_shape("frozen and target", [frozen.batch_shape, target.batch_shape])
    E = target.product() - frozen.product()
    if not E.isfinite().all():
        raise InputError(
            "frozen and target",
            allowed="of finite products",
            given="a product that overflows",
            remedy="scale the weights down",
        )
    return E


def rounding_scale(frozen: LinearNetwork, target: LinearNetwork) -> Float[Tensor, "*batch"]:
    """What in ``E`` is below ``D · eps`` times this may be rounding.

    Two bounds on the rounding of a product, and the smaller one counts: entry by entry,
    ``‖∏_l |W_l|‖_2``, and layer by layer, ``max_l ‖∏_{j>l} W_j‖ ‖W_l‖ ‖∏_{j<l} W_j‖``. To that of
    the frozen network comes that of the target.
    """
    frozen, target = LinearNetwork.of(frozen, "frozen"), LinearNetwork.of(target, "target")
    return _product_scale(frozen) + _product_scale(target)


def _product_scale(network: LinearNetwork) -> Tensor:
    def norm(matrix: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(matrix, ord=2)

    inner = [torch.eye(network.widths[0], dtype=network.dtype)]
    outer = [torch.eye(network.widths[-1], dtype=network.dtype)]
    for low, high in zip(network.weights[:-1], reversed(network.weights[1:]), strict=True):
        inner.append(low @ inner[-1])
        outer.append(outer[-1] @ high)
    layers = zip(outer[::-1], network.weights, inner, strict=True)
    layerwise = torch.stack([norm(a) * norm(w) * norm(b) for a, w, b in layers]).amax(0)
    entrywise = product([weight.abs() for weight in network.weights]).nan_to_num()
    return torch.minimum(layerwise, norm(entrywise))


def error_rank(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``rank E``, counting only singular values above the rounding of ``E`` itself.

    In a network so deep or so large that all of ``E`` may be rounding (`rounding_scale`), it is 0:
    in that arithmetic nothing can be told.
    """
    frozen, target = LinearNetwork.of(frozen, "frozen"), LinearNetwork.of(target, "target")
    E = error_matrix(frozen, target)
    return lowrank.rank(E, scale=rounding_scale(frozen, target))


def linear_threshold(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``⌈rank(E) / L⌉``: the least equal rank at which a linear network is adapted exactly.

    Source: corollary "exactness threshold", chapter 1.
    """
    return -(-error_rank(frozen, target) // LinearNetwork.of(frozen).depth)


def linear_error(
    frozen: LinearNetwork, target: LinearNetwork, total_rank: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Least spectral and Frobenius error of any adapters of total rank ``r = Σ_l R_l``.

    ``σ_{r+1}(E)`` and ``(Σ_{d>r} σ_d(E)²)^{1/2}``. Source: theorem "optimal adaptation of a deep
    linear network", chapter 1; the lower bound needs no assumption.
    """
    return lowrank.tail_norms(lowrank.spectrum(error_matrix(frozen, target)), total_rank)
