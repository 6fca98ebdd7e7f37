"""The ranks that heads narrower than the tokens need [prop-narrow-heads].

A segment of four layers is cut in its middle, the head: ``Y`` is the product of the layers before
the cut, ``X`` that of the layers after it, and the target's segment is ``M``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .. import lowrank
from ..networks.gap import Gap


class NarrowHeadRanks(NamedTuple):
    """What the changes of ``Y`` and ``X`` need, and the ranks that decide it; each ``[...]``.

    ``inner`` is ``r_1`` of the change of ``Y``, ``outer`` is ``r_2`` of that of ``X``, ``together``
    the least of their sum. ``rank_M`` is the proof's ``k``, ``rank_E`` its ``r_3``, the rank of
    ``M − X Y``; ``p`` and ``q`` are the dimensions of ``Y ker M ∩ ker X`` and
    ``Xᵀ ker Mᵀ ∩ ker Yᵀ``.
    """

    inner: Int[Tensor, "*batch"]
    outer: Int[Tensor, "*batch"]
    together: Int[Tensor, "*batch"]
    rank_M: Int[Tensor, "*batch"]
    rank_E: Int[Tensor, "*batch"]
    rank_Y: Int[Tensor, "*batch"]
    rank_X: Int[Tensor, "*batch"]
    p: Int[Tensor, "*batch"]
    q: Int[Tensor, "*batch"]


def narrow_head_ranks(gap: Gap) -> NarrowHeadRanks:
    """Find the ranks that the middle two of four layers need [prop-narrow-heads].

    ``r_1 = rank [M; Y] − rank Y``, ``r_2 = rank [M X] − rank X``, and together
    ``r_3 + max(0, p + q + k − d)`` for heads of size ``d``.
    """
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    Q_Y, R_Y = torch.linalg.qr(Y_target.mT)
    Q_X, R_X = torch.linalg.qr(X_target)
    # M = Q_X core Q_Yᵀ.
    core, scale = R_X @ R_Y.mT, lowrank.norm(R_X) * lowrank.norm(R_Y)
    d, none = Y.shape[-2], torch.zeros_like(gap.rank)
    k, r_3 = lowrank.rank(core, scale=scale), gap.rank
    rank_Y, rank_X = lowrank.rank(Y), lowrank.rank(X)
    if d >= max(Y.shape[-1], X.shape[-2]):
        counts = none, none, r_3, k, r_3, rank_Y, rank_X, none, none
        return NarrowHeadRanks(*(count.expand_as(none) for count in counts))
    U, S, V = lowrank.svd(core)
    counted = torch.arange(S.shape[-1]).to(S.device) < k[..., None]
    # The product rounds, which rotates its range.
    rounding = (scale / torch.where(counted, S, torch.inf).amin(-1)).clamp(min=1)

    def rank_with(columns: Tensor, basis: Tensor, frozen: Tensor) -> Int[Tensor, "*batch"]:
        """Find ``rank [M frozen]``; if ``rank M = d``, the target's own columns span its range."""
        exact = _rank_of_both(_of_norm_one(columns), frozen)
        return torch.where(
            k == d, exact, _rank_of_both(basis * counted[..., None, :], frozen, rounding)
        )

    Y, X = _of_norm_one(Y), _of_norm_one(X)
    rows, columns = (Y_target.mT, Q_Y @ V), (X_target, Q_X @ U)
    rows_with_Y, columns_with_X = rank_with(*rows, Y.mT), rank_with(*columns, X)
    rows_with_XY, columns_with_XY = rank_with(*rows, (X @ Y).mT), rank_with(*columns, X @ Y)
    r_1, r_2 = (rows_with_Y - rank_Y).clamp(min=0), (columns_with_X - rank_X).clamp(min=0)
    p = torch.where(rank_X == d, 0, (rows_with_Y - rows_with_XY).clamp(min=0))
    q = torch.where(rank_Y == d, 0, (columns_with_X - columns_with_XY).clamp(min=0))
    together = r_3 + (p + q + k - d).clamp(min=0)
    counts = r_1, r_2, together, k, r_3, rank_Y, rank_X, p, q
    return NarrowHeadRanks(*(count.expand_as(none) for count in counts))


def _of_norm_one(matrix: Tensor) -> Tensor:
    return (matrix / lowrank.norm(matrix)[..., None, None]).nan_to_num()


def _rank_of_both(
    left: Tensor, right: Tensor, rounding: Tensor | float = 1.0
) -> Int[Tensor, "*batch"]:
    """Find the rank of two matrices side by side, with a factor for larger rounding."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    both = torch.cat([m.expand(*batch, *m.shape[-2:]) for m in (left, right)], dim=-1)
    return lowrank.rank(both, scale=rounding * lowrank.norm(both))
