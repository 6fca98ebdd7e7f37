"""Heads narrower than the tokens are adapted exactly [prop-narrow-heads].

The names are those of the proof: a segment ``X Y`` is cut in its middle, where a head has ``d``
units; ``M`` is the target's segment, and ``E = M − X Y``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank, randomness
from ..adapters import Adapters
from ..bounds.narrow_heads import NarrowHeadRanks, narrow_head_ranks
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.gap import Gap
from .linear import LinearAdaptation

# Almost every choice is exact, but some are ill conditioned: of the smallest and eight that are
# drawn, the one that misses least is kept.
_TRIALS = 9


def is_narrow(gap: Gap) -> bool:
    """Say whether heads are narrower than tokens; only segments of four layers have heads."""
    return gap.frozen.depth == 4 and gap.frozen.widths[2] < gap.frozen.widths[1]


def require_ranks(gap: Gap, ranks: Mapping[str, int]) -> None:
    """Refuse ranks of two weights, by name, that are below what heads need [prop-narrow-heads]."""
    r_1, r_2, together = (
        max(each.flatten().tolist(), default=0) for each in narrow_head_ranks(gap)[:3]
    )
    R_1, R_2 = ranks.values()
    if R_1 < r_1 or R_2 < r_2 or R_1 + R_2 < together:
        raise InputError(
            "ranks of {} and {}".format(*ranks),
            allowed=f"at least {r_1} and {r_2}, together at least {together}",
            given=f"{R_1} and {R_2}",
            remedy="heads narrower than the tokens are adapted exactly or not at all",
        )


@torch.no_grad()
def adapt_narrow_heads(gap: Gap, R_1: int, R_2: int) -> LinearAdaptation:
    """Adapt the middle two of four layers; rounding errors show where ranks are too low.

    ``R_1`` is the rank of the factor that acts first. Source: [prop-narrow-heads].
    """
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    batch, needed = gap.batch_shape, narrow_head_ranks(gap)
    of_Y, of_X = (torch.zeros_like(m).expand(*batch, *m.shape[-2:]).clone() for m in (Y, X))
    conditions = Y.new_ones(batch)
    scale = (lowrank.norm(X_target) * lowrank.norm(Y_target)).expand(batch)
    Y, X, M = (m.expand(*batch, *m.shape[-2:]) for m in (Y, X, X_target @ Y_target))
    for place in product(*map(range, batch)):
        counts = NarrowHeadRanks(*(count[place] for count in needed))
        head = _Head(Y[place], X[place], M[place], counts, R_1, R_2)
        of_Y[place], of_X[place], conditions[place] = _adapt_head(head, scale[place])
    before, _, _, after = gap.frozen.weights
    # The least changes: where the sides hide directions, these stay as they are.
    of_inner, of_outer = lowrank.solve(before.mT, of_Y.mT).mT, lowrank.solve(after, of_X)
    updates = (
        LowRank(before[..., :0], before.mT[..., :0]),
        # Where a system is singular nothing is finite; what stays undone is measured below.
        lowrank.truncated_svd(of_inner.nan_to_num(0, 0, 0), R_1),
        lowrank.truncated_svd(of_outer.nan_to_num(0, 0, 0), R_2),
        LowRank(after[..., :0], after.mT[..., :0]),
    )
    adapters = Adapters(updates)
    missed = adapters.merge(gap.frozen).product() - gap.target.product()
    one = torch.ones_like(missed[..., 0, 0])
    systems = [torch.maximum(lowrank.condition_number(m), conditions) for m in (before, after)]
    return LinearAdaptation(
        adapters,
        spectral_error=0 * one,
        frobenius_error=0 * one,
        rounding_error=lowrank.norm(missed),
        condition_numbers=torch.stack([one, *systems, one], dim=-1),
        success=torch.ones_like(one, dtype=torch.bool),
    )


class _Head(NamedTuple):
    """A single head, the ranks that it needs, and those that it gets."""

    Y: Float[Tensor, "d into"]
    X: Float[Tensor, "out d"]
    M: Float[Tensor, "out into"]
    needed: NarrowHeadRanks
    R_1: int
    R_2: int


def _adapt_head(head: _Head, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Change ``Y`` and ``X`` so that their product is ``M``.

    What rounds in ``M`` is as large as ``scale``. Return ``ΔY``, ``ΔX``, and the condition number
    of the system for ``ΔX``.
    """
    Y, X, M = head.Y, head.X, head.M
    E, eps = M - X @ Y, torch.finfo(Y.dtype).eps
    generator = randomness.generator(0, "completions of lower rank")

    def normal(*shape: int) -> Tensor:
        return randomness.normal(generator, *shape).to(Y)

    # There is such a space ℰ; X is injective on e_1, and 0 on e_2.
    e_1 = _space(head, E, normal)
    e_2 = e_1[:, :0]
    # Rounding of a product with X is below this.
    noise = 16 * len(X) * eps
    if head.needed.rank_X < len(Y) and e_1.shape[1]:
        _, S, Vh = torch.linalg.svd(X @ e_1)
        injective = int((S > noise * lowrank.norm(X)).sum())
        e_1, e_2 = (e_1 @ Vh.mT).tensor_split([injective], dim=1)
    # A generic w with wᵀ X e_1 = I, a generic z, and c = e_2.
    least_w = torch.linalg.pinv((X @ e_1).mT)
    frobenius = torch.linalg.matrix_norm
    spread = (float(frobenius(Y)) or 1.0) / float(frobenius(M)) if head.needed.rank_M else 0.0
    best, least = (torch.zeros_like(Y), torch.zeros_like(X), torch.inf), torch.inf
    for trial in range(_TRIALS):
        drawn = normal(*least_w.shape) / len(X) ** 0.5
        w = least_w
        if trial:
            w = w + spread * (drawn - X @ e_1 @ (least_w.mT @ drawn))
        zM = spread * normal(e_2.shape[1], len(M)) @ M / len(M) ** 0.5
        # Such a space is enough: Ŷ = Y + e_1 wᵀE + e_2 (zᵀM − cᵀY) has the rows of M …
        of_Y = e_1 @ (w.mT @ E) + e_2 @ (zM - e_2.mT @ Y)
        values = torch.linalg.svdvals(Y + of_Y)
        limit = noise * float(lowrank.norm(Y) + lowrank.norm(e_1 @ w.mT) * scale)
        # … and X̂ = X + (M − X Ŷ) Ŷ⁺ gives X̂ Ŷ = M.
        of_X = (E - X @ of_Y) @ torch.linalg.pinv(Y + of_Y, atol=limit, rtol=0)
        of_X = lowrank.truncated_svd(of_X, min(head.R_2, *X.shape)).matrix()
        missed = float(lowrank.norm((X + of_X) @ (Y + of_Y) - M))
        if missed < least:
            kept = values[values > limit]
            condition = float(kept[0] / kept[-1]) if len(kept) else 1.0
            best, least = (of_Y, of_X, condition), missed
    return best


def _space(head: _Head, E: Tensor, normal: Callable[..., Tensor]) -> Float[Tensor, "d t"]:
    """Find orthonormal columns that span the proof's ``ℰ``, in which ``Y`` changes.

    Vectors of ``𝒜 = Y ker M``, or outside the range of ``Y``, may change without loss of a row of
    ``M``; ``r_1`` of these are needed. A change in ``𝒰 = {u: X u ∈ ran E}`` lowers the rank of
    what is missing; ``s_0 = r_3 − R_2`` of these are needed.
    """
    Y, X, M = head.Y, head.X, head.M
    r_1, r_2, _, k, r_3, rank_Y, rank_X, p, q = map(int, head.needed)
    d, rows_of_M = len(Y), lowrank.svd(M).V[:, :k]
    A = torch.linalg.svd(Y - (Y @ rows_of_M) @ rows_of_M.mT).U[:, : rank_Y + r_1 - k]
    range_of_E = lowrank.svd(E).U[:, :r_3]
    U = torch.linalg.svd(X - range_of_E @ (range_of_E.mT @ X)).Vh[rank_X + r_2 - r_3 :].mT
    s_0 = max(0, r_3 - head.R_2)
    # Generic vectors of 𝒜 count for both, but for p dimensions that X hides …
    of_A = min(A.shape[1] - p, head.R_1)
    # … and so do generic vectors of 𝒰 outside the range of Y, of which q are missing.
    of_U = max(0, s_0 - of_A)
    outside_Y = min(of_U, max(0, d - rank_Y - q))
    # What is still needed for r_1: the rest of 𝒜, then anything outside the range of Y.
    lacking = max(0, r_1 - of_A - outside_Y)
    rest_of_A = min(lacking, p)
    columns = [
        A @ normal(A.shape[1], of_A) if p else A[:, :of_A],
        U @ normal(U.shape[1], of_U),
        A @ normal(A.shape[1], rest_of_A),
        normal(d, lacking - rest_of_A),
    ]
    return torch.linalg.qr(torch.cat(columns, dim=1))[0][:, : head.R_1]
