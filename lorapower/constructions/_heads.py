"""Two adapted factors of a segment; narrow heads are adapted exactly [prop-narrow-heads]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters import Adapters
from ..errors import InputError, SingularError
from ..lowrank import LowRank
from ..networks.gap import Gap
from ..networks.segmentation import Segments
from ..networks.transformer import Transformer
from . import linear
from .linear import LinearAdaptation

# Almost every choice is exact [prop-narrow-heads], but some are ill conditioned: of the smallest
# and eight that are drawn, the one that misses least is kept.
_TRIALS = 9


def ranks_by_kind(ranks: Any, network: Transformer) -> dict[str, int]:
    """Read the rank of each kind of adapted weight, from one for all or one for each kind."""
    shapes = {kind: network.parameters[kind].shape[-2:] for kind in network.adapted_kinds}
    if isinstance(ranks, Segments):
        largest = ranks.map(lambda _, part: int(part.max()))
        ranks = {kind: R for name, R in largest.items() for kind in Segments.WEIGHTS[name]}
    allowed = f"one integer, or one for each of {', '.join(shapes)}"
    if isinstance(ranks, list | tuple | Tensor):
        raise InputError("ranks", allowed=allowed, given=ranks)
    if not isinstance(ranks, Mapping):
        return dict(zip(shapes, _checks.capped_ranks(ranks, list(shapes.values())), strict=True))
    if set(ranks) != set(shapes):
        raise InputError("ranks", allowed=allowed, given=sorted(map(str, ranks)))
    return {
        kind: _checks.integer(f"rank of {kind}", ranks[kind], 0, min(shape), limit="smaller side")
        for kind, shape in shapes.items()
    }


def is_narrow(gap: Gap) -> bool:
    """Say whether heads are narrower than tokens; only segments of four layers have heads."""
    return gap.frozen.depth == 4 and gap.frozen.widths[2] < gap.frozen.widths[1]


def require_ranks(gap: Gap, ranks: Mapping[str, int]) -> None:
    """Refuse ranks of two weights, by name, below those of `Gap.pair_ranks`."""
    if not is_narrow(gap):
        return
    needed_inner, needed_outer, together = (
        max(each.flatten().tolist(), default=0) for each in gap.pair_ranks[:3]
    )
    inner, outer = ranks.values()
    if inner < needed_inner or outer < needed_outer or inner + outer < together:
        raise InputError(
            "ranks of {} and {}".format(*ranks),
            allowed=f"at least {needed_inner} and {needed_outer}, together at least {together}",
            given=f"{inner} and {outer}",
            remedy="heads narrower than the tokens are adapted exactly or not at all",
        )


def adapt_pair(
    gap: Gap,
    ranks: Mapping[str, int],
    words: str,
    *,
    rtol: float | None,
    throw: bool,
) -> LinearAdaptation:
    """Adapt a segment's two factors: the middle ones of four layers, or both of two."""
    inner, outer = ranks.values()
    if is_narrow(gap):
        solution = adapt_narrow(gap, inner, outer)
    else:
        each = (inner, outer) if gap.frozen.depth == 2 else (0, inner, outer, 0)
        solution = linear.adapt_gap(gap, each, throw=False)
    numbers = torch.finfo(gap.frozen.dtype)
    rtol = numbers.eps**0.5 if rtol is None else _checks.tolerance("rtol", rtol)
    relative = solution.rounding_error / gap.rounding_scale.clamp(min=numbers.tiny)
    success = relative.isfinite() & (relative <= rtol)
    if throw and not success.all():
        place = tuple((~success).nonzero()[0].tolist())
        conditions, failed = solution.condition_numbers[place], ~success
        if gap.frozen.depth == 4:
            block, head = place[-2:]
            words += f" of block {block + 1}, head {head + 1}"
            failed = failed[..., block, head]
        raise SingularError(
            int(conditions.argmax()) + 1,
            float(conditions.max()),
            float(relative[place]),
            rtol,
            1 / (max(gap.frozen.widths) * numbers.eps),
            f" of the {words}{_checks.failed_members(failed)}",
        )
    return replace(solution, success=success)


@torch.no_grad()
def adapt_narrow(gap: Gap, inner_rank: int, outer_rank: int) -> LinearAdaptation:
    """Adapt the middle two of four layers; rounding errors show where ranks are too low."""
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    batch, needed = gap.batch_shape, gap.pair_ranks
    of_Y, of_X = (torch.zeros_like(m).expand(*batch, *m.shape[-2:]).clone() for m in (Y, X))
    conditions = Y.new_ones(batch)
    scale = (lowrank.norm(X_target) * lowrank.norm(Y_target)).expand(batch)
    Y, X, M = (m.expand(*batch, *m.shape[-2:]) for m in (Y, X, X_target @ Y_target))
    for place in product(*map(range, batch)):
        counts = type(needed)(*(count[place] for count in needed))
        head = _Head(Y[place], X[place], M[place], counts, inner_rank, outer_rank)
        of_Y[place], of_X[place], conditions[place] = _exchange(head, scale[place])
    before, _, _, after = gap.frozen.weights
    # The least changes: where the sides hide directions, these stay as they are.
    of_inner, of_outer = lowrank.solve(before.mT, of_Y.mT).mT, lowrank.solve(after, of_X)
    updates = (
        LowRank(before[..., :0], before.mT[..., :0]),
        # Where a system is singular nothing is finite; what stays undone is measured below.
        lowrank.truncated_svd(of_inner.nan_to_num(0, 0, 0), inner_rank),
        lowrank.truncated_svd(of_outer.nan_to_num(0, 0, 0), outer_rank),
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
    """A single head: the frozen ``X Y``, the target's ``M``, `Gap.pair_ranks`, and those given."""

    Y: Float[Tensor, "size into"]
    X: Float[Tensor, "out size"]
    M: Float[Tensor, "out into"]
    needed: Any
    inner_rank: int
    outer_rank: int


def _exchange(head: _Head, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Change ``Y`` and ``X`` so that their product is ``M`` [prop-narrow-heads].

    ``Ŷ = Y + e_1 wᵀE + e_2 (zᵀM − e_2ᵀY)`` has the rows of ``M``, and ``M − X Ŷ`` no more rank than
    ``X`` may change by. Here ``e_1, e_2`` span the proof's space, ``X`` is injective on ``e_1`` and
    0 on ``e_2``, ``wᵀX e_1 = I``, and ``w`` and ``z`` are otherwise generic. What rounds in ``M``
    is as large as ``scale``. Return both changes, and the condition number of the second's system.
    """
    Y, X, M, needed = head.Y, head.X, head.M, head.needed
    E, eps = M - X @ Y, torch.finfo(Y.dtype).eps
    generator = randomness.generator(0, "completions of lower rank")

    def normal(*shape: int) -> Tensor:
        return randomness.normal(generator, *shape).to(Y)

    e_1 = _space(head, E, normal)
    e_2 = e_1[:, :0]
    # Rounding of a product with X is below this.
    noise = 16 * len(X) * eps
    if needed.columns < len(Y) and e_1.shape[1]:
        _, S, Vh = torch.linalg.svd(X @ e_1)
        injective = int((S > noise * lowrank.norm(X)).sum())
        e_1, e_2 = (e_1 @ Vh.mT).tensor_split([injective], dim=1)
    least_w = torch.linalg.pinv((X @ e_1).mT)
    frobenius = torch.linalg.matrix_norm
    spread = (float(frobenius(Y)) or 1.0) / float(frobenius(M)) if needed.target else 0.0
    best, least = (torch.zeros_like(Y), torch.zeros_like(X), torch.inf), torch.inf
    for trial in range(_TRIALS):
        drawn = normal(*least_w.shape) / len(X) ** 0.5
        w = least_w
        if trial:
            w = w + spread * (drawn - X @ e_1 @ (least_w.mT @ drawn))
        rows = spread * normal(e_2.shape[1], len(M)) @ M / len(M) ** 0.5
        of_Y = e_1 @ (w.mT @ E) + e_2 @ (rows - e_2.mT @ Y)
        values = torch.linalg.svdvals(Y + of_Y)
        limit = noise * float(lowrank.norm(Y) + lowrank.norm(e_1 @ w.mT) * scale)
        of_X = (E - X @ of_Y) @ torch.linalg.pinv(Y + of_Y, atol=limit, rtol=0)
        of_X = lowrank.truncated_svd(of_X, min(head.outer_rank, *X.shape)).matrix()
        missed = float(lowrank.norm((X + of_X) @ (Y + of_Y) - M))
        if missed < least:
            kept = values[values > limit]
            condition = float(kept[0] / kept[-1]) if len(kept) else 1.0
            best, least = (of_Y, of_X, condition), missed
    return best


def _space(head: _Head, E: Tensor, normal: Callable[..., Tensor]) -> Float[Tensor, "size columns"]:
    """Find orthonormal columns that the change of ``Y`` may have: the proof's space.

    Vectors of ``A = Y ker M``, or outside the range of ``Y``, may change without loss of a row of
    ``M``; ``r_1`` of these are needed. A change in ``U = {u: X u ∈ ran E}`` lowers the rank of what
    is missing; ``s_0 = r_3 − R_2`` of these are needed. Generic vectors of ``A`` are both, but for
    ``p`` dimensions that ``X`` hides, and so are generic vectors of ``U``, but for ``q``.
    """
    Y, X, M = head.Y, head.X, head.M
    r_1, r_2, _, rank_M, r_3, rank_Y, rank_X, p, q = map(int, head.needed)
    size, rows_of_M = len(Y), lowrank.svd(M).V[:, :rank_M]
    A = torch.linalg.svd(Y - (Y @ rows_of_M) @ rows_of_M.mT).U[:, : rank_Y + r_1 - rank_M]
    range_of_E = lowrank.svd(E).U[:, :r_3]
    U = torch.linalg.svd(X - range_of_E @ (range_of_E.mT @ X)).Vh[rank_X + r_2 - r_3 :].mT
    s_0 = max(0, r_3 - head.outer_rank)
    of_A = min(A.shape[1] - p, head.inner_rank)
    of_U = max(0, s_0 - of_A)
    outside_Y = min(of_U, max(0, size - rank_Y - q))
    # What is still needed for the rows of M: the rest of A, then anything outside the range of Y.
    lacking = max(0, r_1 - of_A - outside_Y)
    rest_of_A = min(lacking, p)
    columns = [
        A @ normal(A.shape[1], of_A) if p else A[:, :of_A],
        U @ normal(U.shape[1], of_U),
        A @ normal(A.shape[1], rest_of_A),
        normal(size, lacking - rest_of_A),
    ]
    return torch.linalg.qr(torch.cat(columns, dim=1))[0][:, : head.inner_rank]
