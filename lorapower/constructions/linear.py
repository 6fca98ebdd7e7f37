"""Optimal adaptation of a deep linear network [thm-optimal-adaptation]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters import Adapters
from ..errors import SingularError
from ..lowrank import LowRank
from ..networks import Gap, LinearNetwork, product
from .adaptation import Adaptation


@dataclass(frozen=True, eq=False, repr=False)
class LinearAdaptation(Adaptation):
    """Adapters of a deep linear network, with the evidence for them.

    Attributes
    ----------
    spectral_error : predicted ``‖∏(W_l + ΔW_l) − W̄‖_2 = σ_{r+1}(E)``, ``r = Σ_l R_l``; ``[...]``.
    frobenius_error : predicted ``‖∏(W_l + ΔW_l) − W̄‖_F``; ``[...]``.
    rounding_error : measured ``‖∏(W_l + ΔW_l) − (∏W_l + LR_r(E))‖_2``, which exact arithmetic would
        make 0, the larger of the products multiplied from either end; ``[...]``.
    condition_numbers : of the worse of the two linear systems solved for each layer, 1 where none
        was needed; ``[..., L]``.
    plain : whether the splitting of the proof was kept, or else an alternative; ``[...]``.

    It is a success where the rounding error is acceptable; where a product overflows the adapters
    are 0 and the errors NaN. The prediction holds for every input: a linear map has no region.
    """

    spectral_error: Float[Tensor, "*batch"]
    frobenius_error: Float[Tensor, "*batch"]
    rounding_error: Float[Tensor, "*batch"]
    condition_numbers: Float[Tensor, "*batch layers"]
    plain: Bool[Tensor, "*batch"]


def adapt(
    frozen: LinearNetwork | Any,
    target: LinearNetwork | Any,
    ranks: _checks.Ranks,
    *,
    plain_only: bool = False,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> LinearAdaptation:
    """Adapters that bring ``∏(W_l + ΔW_l)`` as close to ``W̄`` as their ranks allow.

    The singular triplets of ``E = W̄ − ∏ W_l`` are cut into slices ``U_l S_l V_lᵀ`` of ``R_l``, and
    ``A_l = (∏_{j>l} W_j)^{-1} U_l S_l``, ``B_lᵀ = V_lᵀ (∏_{j<l} (W_j + ΔW_j))^{-1}``. Systems
    are solved, no inverse is formed. Where rounding errors then exceed a few units of the last
    place, other splittings of the same best approximation are tried (triplets rotated so that each
    layer takes what the others pass on most easily, or at random; the layers visited in another
    order; spare rank spent on the smallest singular values of the frozen layers), and the one of
    least rounding error is kept, for each member of the batch by itself.

    Parameters
    ----------
    frozen, target : networks, or what `LinearNetwork.of` makes one from, such as a matrix for the
        target; same inputs, outputs and type; batch shapes broadcast. Hidden layers of the
        frozen network may have any width not below its inputs and outputs.
    ranks : one for all layers, of which none takes more than its weight's smaller side; or one per
        layer, each from 0 to that side.
    plain_only : use the splitting of the proof, whatever its rounding error.
    rtol : largest acceptable ``rounding_error``, relative to ``‖W̄‖_2`` (or to the predicted error,
        if that is larger, or to ``‖E‖_2`` for a target of zeros); by default ``eps^{1/2}``, half of
        the digits. ``inf`` accepts whatever comes.
    throw : raise an error where a member of the batch is not adapted acceptably, or else go on and
        say so in ``success``.
    seed : of the random rotations.

    Raises
    ------
    InputError : ranks out of range, networks that do not fit each other, a hidden width too small.
    SingularError : nothing tried meets ``rtol``: a singular layer, or too few digits; names the
        layer, its condition number and the members of the batch that fail.

    Source: [thm-optimal-adaptation]; for the splittings [prop-splittings].
    """
    gap = Gap(frozen, target)
    return close(gap, ranks, plain_only=plain_only, rtol=rtol, throw=throw, seed=seed)


@torch.no_grad()
def close(
    gap: Gap,
    ranks: _checks.Ranks,
    *,
    plain_only: bool = False,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> LinearAdaptation:
    """What `adapt` does, of a gap whose decomposition may be at hand."""
    _checks.kind(Gap, gap=gap)
    plain_only, throw = _checks.flag("plain_only", plain_only), _checks.flag("throw", throw)
    seed = _checks.seed(seed)
    frozen = gap.frozen
    ranks = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    rtol = _checks.tolerance("rtol", torch.finfo(frozen.dtype).eps ** 0.5 if rtol is None else rtol)
    finite = gap.finite
    if not throw and not finite.all():
        gap = gap.zeroed(~finite)
    per_layer = gap.ranks(ranks)

    batch, total = gap.batch_shape, sum(per_layer)
    spectral, frobenius = gap.error(total), gap.error(total, "fro")
    last_place = max(frozen.widths[0], frozen.widths[-1]) * torch.finfo(frozen.dtype).eps
    # Of the target, or of the error where that is predicted to be larger or the target is zero.
    size = gap.target.norm
    scale = torch.maximum(torch.where(size > 0, size, gap.error(0)), spectral)
    scale = scale.expand(batch).flatten()

    gap = gap.flat()
    best_map = gap.reached(total)
    best = _split(gap, best_map, per_layer, _Plan(range(frozen.depth)))
    plain = torch.ones_like(scale, dtype=torch.bool)
    for plan in () if plain_only else _alternatives(gap, per_layer, seed):
        poor = best.rounding > 16 * last_place * scale
        if not poor.any():
            break
        trial = _split(gap.members(poor), best_map[poor], per_layer, plan)
        improved = trial.rounding < best.rounding[poor]
        mine = poor.nonzero()[improved, 0]
        best.put(mine, trial, improved)
        plain[mine] = False

    relative = best.rounding / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    success = (relative <= rtol).reshape(batch) & finite
    if throw and not success.all():
        member = int(relative.argmax())
        layer = int(best.conditions[member].argmax())
        raise SingularError(
            layer + 1,
            float(best.conditions[member, layer]),
            float(relative[member]),
            rtol,
            1 / last_place,
            _checks.failed_members(~success, member),
        )

    def measured(flat: Tensor) -> Tensor:
        values = flat.reshape((*batch, *flat.shape[1:]))
        return torch.where(finite.reshape((*batch, *[1] * (flat.ndim - 1))), values, torch.nan)

    return LinearAdaptation(
        Adapters(
            tuple(
                LowRank(*(factor.reshape((*batch, *factor.shape[1:])) for factor in pair))
                for pair in best.factors
            )
        ),
        spectral_error=measured(spectral.flatten()),
        frobenius_error=measured(frobenius.flatten()),
        rounding_error=measured(best.rounding),
        condition_numbers=measured(best.conditions),
        plain=plain.reshape(batch),
        success=success,
    )


class _Plan(NamedTuple):
    """How the best approximation is split: which layer chooses when, and what it takes.

    Of the remaining error ``U S Vᵀ`` a layer takes the leading triplets ("leading"), the directions
    of ``U`` or of ``V`` that reach it at the least cost ("left", "right"), or any ("random").
    ``lift`` first spends rank beyond the width on the frozen layers' smallest singular values.
    """

    order: Sequence[int]
    take: Literal["leading", "left", "right", "random"] = "leading"
    lift: bool = False
    seed: int = 0
    rotation: int = 0


def _alternatives(gap: Gap, ranks: Sequence[int], seed: int) -> Iterator[_Plan]:
    depth = len(ranks)
    forward, backward = range(depth), range(depth)[::-1]
    spare = sum(ranks) > gap.spectrum.shape[-1]
    for lift in (True, False) if spare else (False,):
        yield _Plan(forward, "left", lift)
        yield _Plan(backward, "right", lift)
    # Costs tell nothing apart in a special network, such as one of identities.
    for rotation in range(3):
        yield _Plan(forward, "random", spare, seed, rotation)
    # A singular layer has to be adapted before it stands in another layer's system.
    for l in forward[1:]:
        yield _Plan([l, *forward[:l], *forward[l + 1 :]], "left")


@dataclass
class _Splitting:
    """Factors for every layer, condition numbers ``[batch, L]``, rounding errors ``[batch]``."""

    factors: list[tuple[Tensor, Tensor]]
    conditions: Tensor
    rounding: Tensor

    def put(self, mine: Tensor, other: _Splitting, theirs: Tensor) -> None:
        for (A, B), (other_A, other_B) in zip(self.factors, other.factors, strict=True):
            A[mine], B[mine] = other_A[theirs], other_B[theirs]
        self.conditions[mine] = other.conditions[theirs]
        self.rounding[mine] = other.rounding[theirs]


def _split(gap: Gap, best_map: Tensor, ranks: Sequence[int], plan: _Plan) -> _Splitting:
    """Visit the layers in the plan's order; each takes its share of the error that remains.

    Adapting layer ``l`` changes the product by ``(∏_{j>l}) A_l B_lᵀ (∏_{j<l})``, whatever the other
    layers' present weights are, so the order is free. The remaining error is computed anew for
    each layer, so that later layers make up for the rounding of earlier ones.
    """
    weights, noise = gap.frozen.weights, gap.noise[:, None]
    generator = randomness.generator(plan.seed, "rotation", plan.rotation)
    factors = [
        (w.new_zeros(*w.shape[:-1], R), w.new_zeros(len(w), w.shape[-1], R))
        for w, R in zip(weights, ranks, strict=True)
    ]
    current, shares = list(weights), list(ranks)
    if plan.lift:
        width = min(best_map.shape[-2:])
        ends = [round(width * part / sum(ranks)) for part in accumulate(ranks, initial=0)]
        shares = [end - start for start, end in pairwise(ends)]
        for l, ((A, B), R, share) in enumerate(zip(factors, ranks, shares, strict=True)):
            A[..., share:], B[..., share:] = _lift(weights[l], R - share)
            current[l] = weights[l] + A @ B.mT
    conditions = best_map.new_ones(len(best_map), len(weights))

    visits = [l for l in plan.order if shares[l]]
    passed_on: Tensor | None = None
    for visit, l in enumerate(visits):
        left, right = _systems(current, l)
        if visit == 0 and not plan.lift:
            remaining, triplets = best_map, gap.svd
        else:
            # What a plan that overflowed leaves is not finite.
            remaining = (best_map - product(current)).nan_to_num(0, 0, 0)
            triplets = None
        if l == visits[-1] and passed_on is not None and passed_on.shape[-1] == shares[l]:
            outer, inner = _whole(remaining, passed_on, plan.take == "right")
        else:
            U, S, V = triplets or lowrank.svd(remaining)
            s = min(sum(shares[j] for j in visits[visit:]), int((S > noise).any(0).sum()))
            k = min(shares[l], s)
            if k == 0:
                continue
            U, S, V = U[..., :s], S[:, :s, None], V[..., :s]
            if plan.take == "right":
                P = _directions(plan.take, right, V, generator)
                outer, inner, passed_on = U @ (S * P[..., :k]), V @ P[..., :k], V @ P[..., k:]
            else:
                P = _directions(plan.take, left, U, generator)
                outer, inner, passed_on = U @ P[..., :k], V @ (S * P[..., :k]), U @ P[..., k:]
        k = outer.shape[-1]
        A, B = _solved(left, outer), _solved(right, inner)
        # Pieces of zeros (of a target that is reached already) need no system, singular or not.
        sizes = [torch.linalg.vector_norm(part, dim=-2) for part in (outer, inner)]
        needed = sizes[0] * sizes[1] > noise
        # An unsolvable one gives nothing; what is left undone is measured at the end.
        solvable = (A.isfinite().all((-2, -1)) & B.isfinite().all((-2, -1)))[:, None]
        taken = (needed & solvable)[:, None]
        A, B = torch.where(taken, A, 0), torch.where(taken, B, 0)
        factors[l][0][..., :k], factors[l][1][..., :k] = A, B
        current[l] = current[l] + A @ B.mT
        worse = [best_map.new_ones(len(best_map))]
        for system, layers in ((left, range(l + 1, len(weights))), (right, range(l))):
            if len(layers) == 1 and current[layers[0]] is weights[layers[0]]:
                worse.append(lowrank.condition(gap.frozen.spectra[layers[0]]))
            elif system is not None:
                worse.append(lowrank.condition_number(system))
        conditions[:, l] = torch.where(needed.any(-1), torch.stack(worse).amax(0), 1)

    merged = [w + A @ B.mT for w, (A, B) in zip(weights, factors, strict=True)]
    rounding = torch.stack([_distance(map_, best_map) for map_ in _both_ways(merged)]).amax(0)
    return _Splitting(factors, conditions, rounding)


def _whole(remaining: Tensor, basis: Tensor, of_rows: bool) -> tuple[Tensor, Tensor]:
    """Factors of all that remains, whose range is known: the last layer takes it as it is.

    ``basis`` spans the columns of ``remaining``, or its rows, up to the rounding of what the layers
    before took; one multiplication by it finds the other side as well as a decomposition would.
    """
    matrix = remaining.mT if of_rows else remaining
    one = torch.linalg.qr(matrix.mT @ basis)[0]
    other = matrix @ one
    return (one, other) if of_rows else (other, one)


def _both_ways(weights: list[Tensor]) -> list[Tensor]:
    """The product from the first layer on, as the forward pass does it, and from the last.

    The construction makes up for the very rounding errors of the first. The second has others, as
    a forward pass on other inputs has, so that the larger error of the two is the honest one. Of
    one or two layers there is only one product.
    """
    found = [product(weights)]
    return found if len(weights) < 3 else [*found, product([w.mT for w in reversed(weights)]).mT]


def _distance(matrix: Tensor, other: Tensor) -> Tensor:
    """Spectral norm of the difference, infinite where one is not finite."""
    difference = matrix - other
    finite = difference.isfinite().all((-2, -1))
    norm = lowrank.norm(difference.nan_to_num(0, 0, 0))
    return torch.where(finite, norm, torch.inf)


def _directions(
    take: str, system: Tensor | None, basis: Tensor, generator: torch.Generator
) -> Tensor:
    """Orthogonal ``[batch, s, s]``: combinations of triplets, first those that a layer takes."""
    size = basis.shape[-1]
    if take == "leading":
        return torch.eye(size, dtype=basis.dtype, device=basis.device).expand(len(basis), -1, -1)
    if take == "random":
        normal = randomness.normal(generator, size, size, dtype=basis.dtype, device=basis.device)
        return torch.linalg.qr(normal)[0].expand(len(basis), size, size)
    cost = _solved(system, basis).nan_to_num()
    return lowrank.svd(cost).V.flip(-1)


def _lift(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the update that raises the ``rank`` smallest singular values to the largest."""
    U, S, V = lowrank.svd(weight)
    tail = slice(S.shape[-1] - rank, None)
    return U[..., tail] * (S[:, None, :1] - S[:, None, tail]), V[..., tail]


def _systems(weights: list[Tensor], l: int) -> tuple[Tensor | None, Tensor | None]:
    """``∏_{j>l} W_j`` and ``(∏_{j<l} W_j)ᵀ``, none where there are no such layers.

    Each is multiplied outwards in: the second as the forward pass does it, so that its rounding is
    the forward pass's own, the first in the mirrored order. The other association loses several
    digits in deep networks.
    """
    outer, inner = [w.mT for w in reversed(weights[l + 1 :])], weights[:l]
    left, right = (
        product(part).nan_to_num(0, 0, 0).mT if part else None for part in (outer, inner)
    )
    return left, right


def _solved(system: Tensor | None, wanted: Tensor) -> Tensor:
    return wanted if system is None else lowrank.solve(system, wanted)
