"""Two adapted factors of a segment; narrow heads are adapted exactly [prop-narrow-heads]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters.core import Adapters
from ..errors import InputError, SingularError
from ..lowrank import LowRank
from ..networks._segments import PairRanks, Segments, pair_ranks
from ..networks.gap import Gap
from ..networks.transformer import Transformer
from . import linear
from .linear import LinearAdaptation


def ranks_by_name(ranks: Any, network: Transformer) -> dict[str, int]:
    """The rank of each kind of adapted weight, from one for all or one for each name."""
    shapes = {kind: getattr(network, kind).shape[-2:] for kind in network.adapted_kinds}
    if isinstance(ranks, Segments):
        largest = ranks.map(lambda _, part: int(part.max()))
        ranks = {kind: R for name, R in largest.items() for kind in Segments.WEIGHTS[name]}
    if isinstance(ranks, list | tuple | Tensor):
        raise InputError(
            "ranks", allowed=f"one integer, or one for each of {', '.join(shapes)}", given=ranks
        )
    if not isinstance(ranks, Mapping):
        return dict(zip(shapes, _checks.capped_ranks(ranks, list(shapes.values())), strict=True))
    if set(ranks) != set(shapes):
        raise InputError(
            "ranks",
            allowed=f"one integer, or one for each of {', '.join(shapes)}",
            given=sorted(map(str, ranks)),
        )
    return {
        name: _checks.integer(f"rank of {name}", ranks[name], 0, min(shape), limit="smaller side")
        for name, shape in shapes.items()
    }


def is_narrow(gap: Gap) -> bool:
    """Whether heads are narrower than the tokens; only segments of four layers have heads."""
    return gap.frozen.depth == 4 and gap.frozen.widths[2] < gap.frozen.widths[1]


def require_ranks(gap: Gap, ranks: Mapping[str, int]) -> None:
    """Refuse ranks of two weights, by name, below those of `pair_ranks`."""
    if not is_narrow(gap):
        return
    needed_inner, needed_outer, together = (
        max(each.flatten().tolist(), default=0) for each in pair_ranks(gap)[:3]
    )
    inner, outer = ranks.values()
    if inner < needed_inner or outer < needed_outer or inner + outer < together:
        raise InputError(
            "ranks of {} and {}".format(*ranks),
            allowed=f"at least {needed_inner} and {needed_outer}, together at least {together}",
            given=f"{inner} and {outer}",
            remedy="heads narrower than the tokens are adapted exactly or not at all; "
            "constructions.fitted.adapt fits less rank to inputs",
        )


def adapt(
    gap: Gap,
    ranks: Mapping[str, int],
    words: str,
    *,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> LinearAdaptation:
    """Adapters of a segment's two factors: the middle ones of four layers, or both of two."""
    inner, outer = ranks.values()
    if is_narrow(gap):
        solution = adapt_narrow(gap, inner, outer, seed=seed)
    else:
        each = (inner, outer) if gap.frozen.depth == 2 else (0, inner, outer, 0)
        solution = linear.close(gap, each, throw=False, seed=seed)
    return _judge(solution, gap, f"{words} segment", rtol, throw)


def _judge(
    solution: LinearAdaptation, gap: Gap, words: str, rtol: float | None, throw: bool
) -> LinearAdaptation:
    """The solution with the verdict on its rounding error, or that verdict as an error."""
    eps = torch.finfo(gap.frozen.dtype).eps
    rtol = eps**0.5 if rtol is None else _checks.tolerance("rtol", rtol)
    scale = gap.rounding_scale
    relative = solution.rounding_error / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    success = relative.isfinite() & (relative <= rtol)
    if throw and not success.all():
        place = tuple((~success).nonzero()[0].tolist())
        layer = int(solution.condition_numbers[place].argmax())
        failed = ~success
        if gap.frozen.depth == 4:
            block, head = place[-2:]
            words, failed = (
                f"{words} of block {block + 1}, head {head + 1}",
                failed[..., block, head],
            )
        raise SingularError(
            layer + 1,
            float(solution.condition_numbers[place][layer]),
            float(relative[place]),
            rtol,
            1 / (max(gap.frozen.widths) * eps),
            f" of the {words}{_checks.failed_members(failed)}",
        )
    return replace(solution, success=success)


@torch.no_grad()
def adapt_narrow(gap: Gap, inner_rank: int, outer_rank: int, *, seed: int = 0) -> LinearAdaptation:
    """Adapters of the middle two of four layers; rounding errors show where ranks are too low."""
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    batch, needed = gap.batch_shape, pair_ranks(gap)
    of_Y, of_X = (torch.zeros_like(m).expand(*batch, *m.shape[-2:]).clone() for m in (Y, X))
    conditions = Y.new_ones(batch)
    M, scale = X_target @ Y_target, lowrank.norm(X_target) * lowrank.norm(Y_target)
    members = [m.expand(*batch, *m.shape[-2:]) for m in (Y, X, M)]
    scale = scale.expand(batch)
    for place in product(*map(range, batch)):
        of_Y[place], of_X[place], conditions[place] = _exchange(
            [m[place] for m in members],
            PairRanks(*(count[place] for count in needed)),
            (inner_rank, outer_rank),
            float(scale[place]),
            seed,
        )
    before, _, _, after = gap.frozen.weights
    # The least changes: where the sides hide directions, these stay as they are.
    of_inner, of_outer = lowrank.solve(before.mT, of_Y.mT).mT, lowrank.solve(after, of_X)
    updates = (
        _none(before),
        # Where a system is singular nothing is finite; what stays undone is measured below.
        lowrank.truncated_svd(of_inner.nan_to_num(0, 0, 0), inner_rank),
        lowrank.truncated_svd(of_outer.nan_to_num(0, 0, 0), outer_rank),
        _none(after),
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
        plain=torch.zeros_like(one, dtype=torch.bool),
        success=torch.ones_like(one, dtype=torch.bool),
    )


def _exchange(
    sides: Sequence[Tensor],
    needed: PairRanks,
    ranks: tuple[int, int],
    scale: float,
    seed: int,
) -> tuple[Float[Tensor, "size into"], Float[Tensor, "out size"], float]:
    """Changes of ``Y`` and ``X`` that make their product ``M``, and a condition number.

    ``Ŷ = Y + e fᵀ`` has the rows of ``M``, and ``M − X Ŷ`` no more rank than ``X`` may change by.
    """
    Y, X, M = sides
    E, size = M - X @ Y, len(Y)
    generator = randomness.generator(seed, "completions of lower rank")

    def normal(*shape: int) -> Tensor:
        return randomness.normal(generator, *shape, device=Y.device).to(Y.dtype)

    e = _choose_columns(sides, E, needed, ranks, normal)
    # X sends the columns of `seen` to different directions, and hides the others.
    seen, unseen = e, e[:, :0]
    if needed.columns < size and e.shape[1]:
        _, S, Vh = torch.linalg.svd(X @ e)
        eps = torch.finfo(Y.dtype).eps
        count = int((S > 16 * len(X) * eps * lowrank.norm(X)).sum())
        seen, unseen = (e @ Vh.mT).tensor_split([count], dim=1)
    base = torch.linalg.pinv((X @ seen).mT)
    spread = (_frobenius(Y) or 1.0) / _frobenius(M) if needed.target else 0.0
    noise = 16 * len(X) * torch.finfo(Y.dtype).eps
    best, least = (torch.zeros_like(Y), torch.zeros_like(X), torch.inf), torch.inf
    for trial in range(9):
        drawn = normal(*base.shape) / len(X) ** 0.5
        w = base + (trial > 0) * spread * (drawn - X @ seen @ (base.mT @ drawn))
        rows = spread * normal(unseen.shape[1], len(M)) @ M / len(M) ** 0.5
        of_Y = seen @ (w.mT @ E) + unseen @ (rows - unseen.mT @ Y)
        values = torch.linalg.svdvals(Y + of_Y)
        limit = noise * (float(lowrank.norm(Y)) + float(lowrank.norm(seen @ w.mT)) * scale)
        of_X = (E - X @ of_Y) @ torch.linalg.pinv(Y + of_Y, atol=limit, rtol=0)
        of_X = lowrank.truncated_svd(of_X, min(ranks[1], *X.shape)).matrix()
        left = float(lowrank.norm((X + of_X) @ (Y + of_Y) - M))
        if left < least:
            kept = values[values > limit]
            condition = float(kept[0] / kept[-1]) if len(kept) else 1.0
            best, least = (of_Y, of_X, condition), left
    return best


def _choose_columns(
    sides: Sequence[Tensor],
    E: Tensor,
    needed: PairRanks,
    ranks: tuple[int, int],
    normal: Callable[..., Tensor],
) -> Float[Tensor, "size columns"]:
    """Orthonormal columns that the change of ``Y`` has: ``e`` in the proof."""
    Y, X, M = sides
    inner, outer, _, target, difference, rank_Y, rank_X, hidden, hidden_outer = map(int, needed)
    size, rows_of_M = len(Y), lowrank.svd(M).V[:, :target]
    # Y ker M: columns that may change without loss of a row of M.
    free = torch.linalg.svd(Y - (Y @ rows_of_M) @ rows_of_M.mT).U[:, : rank_Y + inner - target]
    range_of_E = lowrank.svd(E).U[:, :difference]
    # What X sends into the range of E: a change there lowers the rank of what is missing.
    useful = torch.linalg.svd(X - range_of_E @ (range_of_E.mT @ X)).Vh
    useful = useful[rank_X + outer - difference :].mT
    lowering = max(0, difference - ranks[1])
    both = min(free.shape[1] - hidden, ranks[0])
    more = max(0, lowering - both)
    # Useful columns outside the range of Y lose no row either.
    keeping = max(0, inner - both - min(more, max(0, size - rank_Y - hidden_outer)))
    again = min(keeping, hidden)
    columns = torch.cat(
        [
            free @ normal(free.shape[1], both) if hidden else free[:, :both],
            useful @ normal(useful.shape[1], more),
            free @ normal(free.shape[1], again),
            normal(size, keeping - again),
        ],
        dim=1,
    )
    return torch.linalg.qr(columns)[0][:, : ranks[0]]


def _frobenius(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _none(weight: Tensor) -> LowRank:
    """The update of a layer without an adapter."""
    return LowRank(weight[..., :0], weight.mT[..., :0])
