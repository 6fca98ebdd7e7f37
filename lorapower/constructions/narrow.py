"""Exact adaptation of two factors through a narrow middle [prop-narrow-heads].

Where ``d`` units stand between two factors of larger matrices, ``X̂ Ŷ = X̄ Ȳ`` leaves no choice but
``X̂ = X̄ G^{-1}``, ``Ŷ = G Ȳ`` with a non-singular ``G``. It is chosen so that ``X̂ − X`` and
``Ŷ − Y`` have the least ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters.core import Adapters
from ..bounds.transformer import pair_ranks
from ..errors import InputError, brief
from ..lowrank import LowRank
from ..networks.gap import Gap
from .linear import LinearAdaptation


def require_ranks(gap: Gap, ranks: Mapping[str, int]) -> None:
    """Raise `InputError` where ``ranks`` of the two middle layers, by name, are not enough.

    That is, below those of `bounds.pair_ranks` for a member of the batch.
    """
    if not isinstance(ranks, Mapping) or len(ranks) != 2:
        raise InputError("ranks", allowed="those of two layers by their names", given=brief(ranks))
    _checks.kind(Gap, gap=gap)
    needed_inner, needed_outer, together = (
        max(each.flatten().tolist(), default=0) for each in pair_ranks(gap)
    )
    inner, outer = (_checks.integer(f"rank of {name}", rank, 0) for name, rank in ranks.items())
    if inner < needed_inner or outer < needed_outer or inner + outer < together:
        raise InputError(
            "ranks of {} and {}".format(*ranks),
            allowed=f"at least {needed_inner} and {needed_outer}, together at least {together}",
            given=f"{inner} and {outer}",
            remedy="heads narrower than the tokens are adapted exactly or not at all; "
            "constructions.fitted.adapt fits less rank to inputs",
        )


@torch.no_grad()
def adapt(gap: Gap, inner_rank: int, outer_rank: int, *, seed: int = 0) -> LinearAdaptation:
    """Adapters of the two middle layers of four with which the segment equals its target.

    Parameters
    ----------
    gap : Gap
        Of a segment whose middle layers map to ``d`` units and from them, ``d`` not above their
        other sides.
    inner_rank, outer_rank : int
        Of the adapter of the factor that acts first, and of the other; enough in the sense of
        `require_ranks`, or what is measured as rounding error is more than that.
    seed : int
        Of the random completions of ``G`` that are tried.
    """
    _checks.kind(Gap, gap=gap)
    if gap.frozen.depth != 4:
        raise InputError("gap", allowed="of four frozen layers", given=gap)
    inner_rank = _checks.integer("inner_rank", inner_rank, 0)
    outer_rank = _checks.integer("outer_rank", outer_rank, 0)
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    size = Y.shape[-2]
    kept = (max(0, size - inner_rank), max(0, size - outer_rank))
    flat = (m.flatten(0, -3) for m in (Y, X, Y_target, X_target))
    G = Y.new_empty(*Y.shape[:-2], size, size)
    for member, *sides in zip(G.view(-1, size, size), *flat, strict=True):
        *_, of_Y, of_X = sides
        member.copy_(_gauge(sides, kept, seed) if of_Y.any() and of_X.any() else torch.eye(size))

    before, _, _, after = gap.frozen.weights
    # The least changes: where the sides hide directions, these stay as they are.
    of_inner = lowrank.solve(before.mT, (G @ Y_target - Y).mT).mT
    of_outer = lowrank.solve(after, lowrank.solve(G.mT, X_target.mT).mT - X)
    silent = (gap.target.product() == 0).all((-2, -1))[..., None, None]
    of_inner, of_outer = (
        torch.where(silent, least, change)
        for least, change in zip(
            _silenced(gap, inner_rank, outer_rank), (of_inner, of_outer), strict=True
        )
    )
    updates = (
        _none(before),
        # Where a system is singular nothing is finite; what stays undone is measured below.
        lowrank.truncated_svd(of_inner.nan_to_num(0, 0, 0), inner_rank),
        lowrank.truncated_svd(of_outer.nan_to_num(0, 0, 0), outer_rank),
        _none(after),
    )
    adapters = Adapters(updates)
    made, wanted = adapters.merge(gap.frozen).product(), gap.target.product()
    one, of_G = torch.ones_like(made[..., 0, 0]), lowrank.condition_number(G)
    systems = [torch.maximum(lowrank.condition_number(side), of_G) for side in (before, after)]
    return LinearAdaptation(
        adapters,
        spectral_error=0 * one,
        frobenius_error=0 * one,
        rounding_error=lowrank.norm(made - wanted),
        condition_numbers=torch.stack([one, *systems, one], dim=-1),
        plain=torch.full_like(one, kept == (0, 0), dtype=torch.bool),
        success=torch.ones_like(one, dtype=torch.bool),
    )


def _silenced(gap: Gap, inner_rank: int, outer_rank: int) -> tuple[Tensor, Tensor]:
    """Changes that make the product 0: some units stop to receive, the others to send."""
    _, inner, outer, _ = gap.frozen.weights
    unit = torch.arange(inner.shape[-2], device=inner.device)
    deaf = unit < inner_rank
    mute = ~deaf & (unit < inner_rank + outer_rank)
    return -inner * deaf[:, None], -outer * mute


def _none(weight: Tensor) -> LowRank:
    """The update of a layer without an adapter."""
    return LowRank(weight[..., :0], weight.mT[..., :0])


def _gauge(sides: Sequence[Tensor], kept: tuple[int, int], seed: int) -> Float[Tensor, "size size"]:
    """``G`` with which ``kept`` dimensions of ``Y`` and of ``X`` stay as they are.

    ``X̄ G^{-1} − X`` vanishes on ``G a`` where ``X̄ a + X b = 0`` and ``G a = −b``; ``G Ȳ − Y``
    vanishes from the left on ``d`` where ``cᵀ Ȳ + dᵀ Y = 0`` and ``Gᵀ d = −c``. Both can be asked
    of one ``G`` for pairs ``(a, b)`` and ``(c, d)`` with ``cᵀ a = dᵀ b``. What is left open of it
    is the best conditioned of the identity and a few random matrices.
    """
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
