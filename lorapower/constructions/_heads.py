"""Two adapted factors of a segment; narrow heads are adapted exactly [prop-narrow-heads].

With ``d`` units between the factors and a target of rank ``d``, ``X̂ Ŷ = X̄ Ȳ`` means
``X̂ = X̄ G^{-1}``, ``Ŷ = G Ȳ``; ``G`` is chosen to make the ranks of ``X̂ − X`` and ``Ŷ − Y`` least
(``_choose_gauge``). A target of lower rank leaves more choices (``_exchange``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ..networks._segments import Segments, pair_ranks
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
    needed_inner, needed_outer, together, _ = (
        max(each.flatten().tolist(), default=0) for each in pair_ranks(gap)
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
    size = Y.shape[-2]
    kept = (max(0, size - inner_rank), max(0, size - outer_rank))
    G = torch.eye(size, dtype=Y.dtype, device=Y.device).repeat(*gap.batch_shape, 1, 1)
    full = pair_ranks(gap).target == size
    exchanged = [
        torch.zeros_like(m).expand(*gap.batch_shape, *m.shape[-2:]).clone() for m in (Y, X)
    ]
    members = [m.expand(*gap.batch_shape, *m.shape[-2:]) for m in (Y, X, Y_target, X_target)]
    for place in product(*map(range, gap.batch_shape)):
        sides = [m[place] for m in members]
        if full[place]:
            G[place] = _choose_gauge(sides, kept, seed)
        else:
            changes = _exchange(sides, (inner_rank, outer_rank), seed)
            for stack, change in zip(exchanged, changes, strict=True):
                stack[place] = change

    before, _, _, after = gap.frozen.weights
    of_Y = torch.where(full[..., None, None], G @ Y_target - Y, exchanged[0])
    of_X = lowrank.solve(G.mT, X_target.mT).mT - X
    of_X = torch.where(full[..., None, None], of_X, exchanged[1])
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
    one, of_G = torch.ones_like(missed[..., 0, 0]), lowrank.condition_number(G)
    systems = [torch.maximum(lowrank.condition_number(side), of_G) for side in (before, after)]
    return LinearAdaptation(
        adapters,
        spectral_error=0 * one,
        frobenius_error=0 * one,
        rounding_error=lowrank.norm(missed),
        condition_numbers=torch.stack([one, *systems, one], dim=-1),
        plain=torch.full_like(one, kept == (0, 0), dtype=torch.bool),
        success=torch.ones_like(one, dtype=torch.bool),
    )


def _exchange(
    sides: Sequence[Tensor], ranks: tuple[int, int], seed: int
) -> tuple[Float[Tensor, "size into"], Float[Tensor, "out size"]]:
    """Changes of ``Y`` and ``X`` that make their product a target of any rank [rem-lower-rank]."""
    Y, X, Y_target, X_target = sides
    M = X_target @ Y_target
    E = M - X @ Y
    scale = float(
        lowrank.norm(X_target) * lowrank.norm(Y_target) + lowrank.norm(X) * lowrank.norm(Y)
    )
    outside = M - X @ (torch.linalg.pinv(X) @ M)
    first = _range(Y @ _kernel(M, scale), float(lowrank.norm(Y)))
    all_of_e = torch.linalg.pinv(X) @ E @ _kernel(outside, scale)
    other = all_of_e - first @ (first.mT @ all_of_e)
    e = torch.cat([first, _range(other, scale * float(lowrank.norm(torch.linalg.pinv(X))))], 1)
    # No more than the difference leaves.
    e = e[:, : ranks[0]]
    generator = randomness.generator(seed, "completions of lower rank")
    best, least = (torch.zeros_like(Y), torch.zeros_like(X)), torch.inf
    trials = [X @ e]
    for _ in range(8):
        normal = randomness.normal(generator, len(X), e.shape[1], device=Y.device)
        trials.append(normal.to(Y.dtype))
    noise = 16 * len(X) * torch.finfo(Y.dtype).eps
    for w in trials:
        w = w @ torch.linalg.pinv((X @ e).mT @ w)
        of_Y = e @ (w.mT @ E)
        size = lowrank.norm(Y) + lowrank.norm(e @ w.mT) * lowrank.norm(E)
        of_X = (E - X @ of_Y) @ torch.linalg.pinv(Y + of_Y, atol=noise * size, rtol=0)
        of_X = lowrank.truncated_svd(of_X, min(ranks[1], *X.shape)).matrix()
        left = float(lowrank.norm((X + of_X) @ (Y + of_Y) - M))
        if left < least:
            best, least = (of_Y, of_X), left
    return best


def _kernel(matrix: Tensor, scale: float) -> Tensor:
    """Orthonormal columns that a matrix of this scale maps to 0."""
    rank = int(lowrank.rank(matrix, scale=scale))
    return torch.linalg.svd(matrix).Vh[rank:].mT


def _range(matrix: Tensor, scale: float) -> Tensor:
    """An orthonormal basis of the range of a matrix of this scale."""
    return lowrank.svd(matrix).U[:, : int(lowrank.rank(matrix, scale=scale))]


def _none(weight: Tensor) -> LowRank:
    """The update of a layer without an adapter."""
    return LowRank(weight[..., :0], weight.mT[..., :0])


def _choose_gauge(
    sides: Sequence[Tensor], kept: tuple[int, int], seed: int
) -> Float[Tensor, "size size"]:
    """``G`` with which ``kept`` dimensions of ``Y`` and of ``X`` stay [prop-narrow-heads]."""
    Y, X, Y_target, X_target = sides
    size = len(Y)
    outer, inner = _relations(X_target, X), _relations(Y_target.mT, Y.mT)
    form = inner[:size].mT @ outer[:size] - inner[size:].mT @ outer[size:]
    U, S, Vh = torch.linalg.svd(form)
    # The last of V annihilate most; of U those that meet no part of V that was taken.
    a_b = outer @ Vh.mT[:, len(Vh) - kept[1] :]
    conflict = Y.new_zeros(len(U))
    place = torch.arange(len(S), device=S.device)
    conflict[: len(S)] = torch.where(place >= len(Vh) - kept[1], S, 0)
    c_d = inner @ U[:, conflict.argsort()[: kept[0]]]
    a, b, c, d = a_b[:size], a_b[size:], c_d[:size], c_d[size:]

    d_inverse, a_inverse = torch.linalg.pinv(d), torch.linalg.pinv(a)
    identity = torch.eye(size, dtype=Y.dtype, device=Y.device)
    free_left, free_right = identity - d @ d_inverse, identity - a @ a_inverse
    fixed = -free_left @ b @ a_inverse - d_inverse.mT @ c.mT
    generator = randomness.generator(seed, "completions")
    scale = torch.linalg.matrix_norm(fixed, ord=2).item() or 1.0
    trials = [identity]
    for _ in range(8 if any(kept) else 0):
        normal = randomness.normal(generator, size, size, device=Y.device)
        trials.append(torch.linalg.qr(normal)[0].to(Y.dtype))
    found = torch.stack([fixed + scale * free_left @ trial @ free_right for trial in trials])
    return found[lowrank.condition_number(found).argmin()]


def _relations(left: Tensor, right: Tensor) -> Float[Tensor, "two_sizes k"]:
    """Columns ``(a, b)`` that span the solutions of ``left a + right b = 0``."""
    scales = [torch.linalg.matrix_norm(m, ord=2) for m in (left, right)]
    sides = torch.cat([m / s for m, s in zip((left, right), scales, strict=True)], dim=-1)
    solutions = torch.linalg.svd(sides)[2][int(lowrank.rank(sides)) :].mT
    parts = zip(solutions.tensor_split(2), scales, strict=True)
    return torch.cat([part / scale for part, scale in parts])
