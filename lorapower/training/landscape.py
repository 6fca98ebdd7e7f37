"""The critical points of one adapted layer, all of them: minima and strict saddles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..lowrank import LowRank


class Critical(NamedTuple):
    """A critical point of ``½ ‖(E − A Bᵀ) C^{1/2}‖²_F``.

    Attributes
    ----------
    kept : tuple of int
        Which singular triplets of ``E C^{1/2}`` make it up, from 0.
    point : LowRank
        ``A`` and ``B``.
    loss : float
        ``½ Σ σ_d²`` over those that are not kept.
    direction : LowRank or None
        At a saddle changes of ``A`` and ``B`` along which the loss falls; none at a minimum.
    curvature : float
        The factor of ``t²`` when going ``t`` times that direction; 0 at a minimum.
    """

    kept: tuple[int, ...]
    point: LowRank
    loss: float
    direction: LowRank | None
    curvature: float


@torch.no_grad()
def critical_points(
    error: Float[Tensor, "out in"],
    rank: int,
    *,
    covariance: Float[Tensor, "in in"] | None = None,
) -> Iterator[Critical]:
    """The critical points of one layer's loss over adapters of a rank, one of each kind.

    With distinct singular values of ``E C^{1/2}`` there is a kind for each set of at most ``rank``
    of those that are not 0. Points of one kind share product and loss; one of each kind is
    returned. Where singular values are equal there are others, with the same losses.

    Raises `InputError` for a rank out of range and a covariance that is not positive definite.

    Source: [thm-landscape].

    Parameters
    ----------
    error : Tensor
        ``E``, what the product of the factors is to be.
    rank : int
        Of the factors.
    covariance : Tensor, optional
        ``C``, positive definite; the identity by default.
    """
    E = _checks.real_tensor("error", error, min_dims=2)
    if E.ndim != 2:
        raise InputError("error", allowed="a single matrix", given=f"shape {tuple(E.shape)}")
    rank = _checks.integer("rank", rank, 0, min(E.shape), limit="the smaller side")
    root = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
    if covariance is not None:
        C = _checks.real_tensor("covariance", covariance, min_dims=2).to(E)
        if C.shape != root.shape or not torch.allclose(C, C.mT):
            allowed = f"a symmetric matrix of {E.shape[1]} rows"
            raise InputError("covariance", allowed=allowed, given=f"shape {tuple(C.shape)}")
        values, vectors = torch.linalg.eigh(C)
        if values.min() <= 0:
            allowed = "positive definite"
            raise InputError("covariance", allowed=allowed, given=f"eigenvalue {values.min():.3g}")
        root = (vectors * values.sqrt()) @ vectors.mT
    U, S, V = lowrank.svd(E @ root)
    count = int(lowrank.rank(E @ root))
    back = torch.linalg.inv(root)
    for size in range(min(rank, count) + 1):
        for kept in combinations(range(count), size):
            yield _critical(U, S, V, kept, rank, count, back)


def _no_less(S: Tensor, own: Sequence[int], missing: int) -> bool:
    """Whether what is missing is no larger than anything that is kept, but for rounding."""
    eps = torch.finfo(S.dtype).eps
    return not own or bool(S[missing] <= S[own[-1]] + 8 * len(S) * eps * S[0])


def _critical(
    U: Tensor, S: Tensor, V: Tensor, kept: tuple[int, ...], rank: int, count: int, back: Tensor
) -> Critical:
    own = [*kept]
    rest = [d for d in range(count) if d not in kept]
    roots = S[own].sqrt()
    A, B = U.new_zeros(len(U), rank), V.new_zeros(len(V), rank)
    A[:, : len(own)], B[:, : len(own)] = U[:, own] * roots, V[:, own] * roots
    loss = float(S[rest].square().sum()) / 2
    point = LowRank(A, back @ B)
    # The largest that is missing, and the smallest that is kept in its place.
    missing = rest[0] if rest else None
    to_A, to_B = torch.zeros_like(A), torch.zeros_like(B)
    # Of equal values it does not matter which are kept.
    least = missing is None or (len(own) == rank and _no_less(S, own, missing))
    if missing is None or least:
        return Critical(kept, point, loss, None, 0.0)
    if len(own) < rank:
        # A column that is free: it costs nothing to first order to let it grow in both factors.
        to_A[:, len(own)], to_B[:, len(own)] = U[:, missing], V[:, missing]
        curvature = -float(S[missing])
    else:
        last = len(own) - 1
        to_A[:, last], to_B[:, last] = U[:, missing] / roots[-1], V[:, missing] / roots[-1]
        curvature = 1 - float(S[missing] / S[own[-1]])
    return Critical(kept, point, loss, LowRank(to_A, back @ to_B), curvature)
