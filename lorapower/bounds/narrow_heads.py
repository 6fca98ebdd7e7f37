"""Ranks that two adapted factors of a narrow head need [prop-narrow-heads]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .. import lowrank
from ..networks.gap import Gap


class PairRanks(NamedTuple):
    """What two adapted factors ``X Y`` need for a target ``M``, and the ranks that decide it."""

    #: Of the factor that acts first, of the other, and of both together.
    inner: Int[Tensor, "*batch"]
    outer: Int[Tensor, "*batch"]
    together: Int[Tensor, "*batch"]
    #: ``rank M``, ``rank(M − X Y)``, ``rank Y`` and ``rank X``.
    target: Int[Tensor, "*batch"]
    difference: Int[Tensor, "*batch"]
    rows: Int[Tensor, "*batch"]
    columns: Int[Tensor, "*batch"]
    #: Dimensions of ``Y ker M`` in ``ker X``, and of ``Xᵀ ker Mᵀ`` in ``ker Yᵀ``.
    hidden: Int[Tensor, "*batch"]
    hidden_outer: Int[Tensor, "*batch"]


def pair_ranks(gap: Gap) -> PairRanks:
    """Find the ranks that the middle two of four layers need [prop-narrow-heads]."""
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    Q_Y, R_Y = torch.linalg.qr(Y_target.mT)
    Q_X, R_X = torch.linalg.qr(X_target)
    # M = Q_X core Q_Yᵀ.
    core, scale = R_X @ R_Y.mT, lowrank.norm(R_X) * lowrank.norm(R_Y)
    size, none = Y.shape[-2], torch.zeros_like(gap.rank)
    target, difference = lowrank.rank(core, scale=scale), gap.rank
    rows, columns = lowrank.rank(Y), lowrank.rank(X)
    if size >= max(Y.shape[-1], X.shape[-2]):
        inner = outer = hidden = hidden_outer = none
        together = difference
    else:
        U, S, V = lowrank.svd(core)
        counted = torch.arange(S.shape[-1]).to(S.device) < target[..., None]
        # The product rounds, which rotates its range.
        rounding = (scale / torch.where(counted, S, torch.inf).amin(-1)).clamp(min=1)

        def joint_rank(factor: Tensor, basis: Tensor, frozen: Tensor) -> Int[Tensor, "*batch"]:
            """Find ``rank [M frozen]``; if ``rank M = d``, the factor has its columns."""
            exact = _rank_of_both(_of_norm_one(factor), frozen)
            counted_basis = basis * counted[..., None, :]
            return torch.where(
                target == size, exact, _rank_of_both(counted_basis, frozen, rounding)
            )

        Y, X = _of_norm_one(Y), _of_norm_one(X)
        of_rows, of_columns = (Y_target.mT, Q_Y @ V), (X_target, Q_X @ U)
        rows_with_Y, columns_with_X = joint_rank(*of_rows, Y.mT), joint_rank(*of_columns, X)
        rows_seen, columns_seen = joint_rank(*of_rows, (X @ Y).mT), joint_rank(*of_columns, X @ Y)
        inner = (rows_with_Y - rows).clamp(min=0)
        outer = (columns_with_X - columns).clamp(min=0)
        hidden = torch.where(columns == size, 0, (rows_with_Y - rows_seen).clamp(min=0))
        hidden_outer = torch.where(rows == size, 0, (columns_with_X - columns_seen).clamp(min=0))
        together = difference + (hidden + hidden_outer + target - size).clamp(min=0)
    counts = inner, outer, together, target, difference, rows, columns, hidden, hidden_outer
    return PairRanks(*(count.expand_as(none) for count in counts))


def _of_norm_one(matrix: Tensor) -> Tensor:
    return (matrix / lowrank.norm(matrix)[..., None, None]).nan_to_num()


def _rank_of_both(
    left: Tensor, right: Tensor, rounding: Tensor | float = 1.0
) -> Int[Tensor, "*batch"]:
    """Find the rank of two matrices side by side, with a factor for larger rounding."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    both = torch.cat([m.expand(*batch, *m.shape[-2:]) for m in (left, right)], dim=-1)
    return lowrank.rank(both, scale=rounding * lowrank.norm(both))
