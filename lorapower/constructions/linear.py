"""Optimal adaptation of a deep linear network [thm-optimal-adaptation]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters import Adapters
from ..errors import SingularError
from ..lowrank import SVD, LowRank
from ..networks.gap import Gap
from ..networks.layers import LinearNetwork, product


@dataclass(frozen=True, eq=False, repr=False)
class Adaptation:
    """Hold what all constructions return: ``adapters``, and whether they succeed, ``[...]``.

    Without ``success`` they miss what is predicted, by rounding or where a singular layer has too
    little rank. `Adapters.merge` applies them.
    """

    adapters: Adapters
    success: Bool[Tensor, "*batch"]

    def __repr__(self) -> str:
        good, members = int(self.success.sum()), self.success.numel()
        return f"{type(self).__name__}({self.adapters}, success of {good} in {members})"


@dataclass(frozen=True, eq=False, repr=False)
class LinearAdaptation(Adaptation):
    """Hold adapters of a deep linear network, and the evidence for them.

    Attributes
    ----------
    spectral_error : Tensor
        Predicted ``‖∏(W_l + ΔW_l) − W̄‖_2 = σ_{r+1}(E)``, ``r = Σ_l R_l``; ``[...]``.
    frobenius_error : Tensor
        The same in the Frobenius norm, ``(Σ_{d>r} σ_d²)^{1/2}``; ``[...]``.
    rounding_error : Tensor
        Measured ``‖∏(W_l + ΔW_l) − (∏W_l + LR_r(E))‖_2``, 0 in exact arithmetic; the larger of the
        products multiplied from either end; ``[...]``.
    condition_numbers : Tensor
        The worse of the two linear systems solved for each layer, 1 for none; ``[..., L]``. A
        singular system may still have a solution, as where the best map is singular.
    """

    spectral_error: Float[Tensor, "*batch"]
    frobenius_error: Float[Tensor, "*batch"]
    rounding_error: Float[Tensor, "*batch"]
    condition_numbers: Float[Tensor, "*batch layers"]


def adapt_linear(
    frozen: LinearNetwork | Any,
    target: LinearNetwork | Any,
    ranks: _checks.Ranks,
    *,
    throw: bool = True,
) -> LinearAdaptation:
    """Bring ``∏(W_l + ΔW_l)`` as close to ``W̄`` as the ranks of the adapters allow.

    The plain splitting hands out the singular triplets of ``E = W̄ − ∏ W_l`` to the layers in turn.
    Where it rounds by more than a few units of the last place, the proof's splitting is tried, then
    the same for the transposed network, and then a split that adapts the layer first that is most
    nearly singular. Each member of the batch keeps its splitting of least rounding error.

    Raises `InputError` for ranks out of range and for what `networks.Gap` refuses, and
    `SingularError` where every splitting rounds by more than half of the digits: ``rounding_error``
    is above ``eps^{1/2}`` of ``‖W̄‖_2`` (of the predicted error, if that is larger, and of ``‖E‖_2``
    if ``W̄ = 0``). Source: [thm-optimal-adaptation], [lem-splitting], [lem-any-change],
    [prop-singular].

    Parameters
    ----------
    frozen, target
        As for `networks.Gap`; no frozen hidden layer is narrower than inputs or outputs.
    ranks
        One for all layers, cut to each weight's smaller side, or one per layer, at most that side.
    throw
        Raise an error where a member is not adapted acceptably; otherwise ``success`` says so.

    Examples
    --------
    Four layers have rank 2 each, together the rank 8 of the difference.

    >>> from lorapower.constructions import adapt_linear
    >>> from lorapower.networks import LinearNetwork
    >>> frozen, target = LinearNetwork.random(4, 8), LinearNetwork.random(1, 8, seed=1)
    >>> found = adapt_linear(frozen, target, ranks=2)
    >>> found.adapters
    Adapters(ranks 2, 2, 2, 2, float64)
    >>> found.adapters.merge(frozen).product().allclose(target.product())
    True
    >>> [round(float(adapt_linear(frozen, target, R).spectral_error), 3) for R in range(3)]
    [1.011, 0.318, 0.0]
    """
    gap = Gap(frozen, target)
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in gap.frozen.weights])
    return adapt_gap(gap, per_layer, throw=throw)


@torch.no_grad()
def adapt_gap(
    gap: Gap, ranks: Sequence[int], *, throw: bool = True, first: int = 0
) -> LinearAdaptation:
    """Adapt the frozen layers of a `Gap`, one rank per layer, as `adapt_linear` does.

    The gap may be a batch of any shape, such as the heads of transformers ``[..., L, H]``. Errors
    count ``first`` layers before those of the gap.
    """
    eps = torch.finfo(gap.frozen.dtype).eps
    ranks = gap.ranks(ranks)
    batch, total = gap.batch_shape, sum(ranks)
    spectral, frobenius = gap.error(total), gap.error(total, "fro")
    last_place = max(gap.frozen.widths[0], gap.frozen.widths[-1]) * eps
    # Of the target, or of the error where that is predicted to be larger or the target is zero.
    size = gap.target.norm
    scale = torch.maximum(torch.where(size > 0, size, gap.error(0)), spectral)

    def flat(values: Tensor, dims: int) -> Tensor:
        rest = values.shape[values.ndim - dims :]
        return values.expand((*batch, *rest)).reshape(-1, *rest)

    scale, noise = flat(scale, 0), flat(gap.noise, 0)[:, None]
    weights = [flat(w, 2) for w in gap.frozen.weights]
    svd = SVD(*(flat(part, dims) for part, dims in zip(gap.svd, (2, 1, 2), strict=True)))
    problem = _Problem(weights, ranks, flat(gap.reached(total), 2), svd, noise)
    best = _split(problem, accepted=4 * last_place * scale)
    relative = best.rounding / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    success = (relative <= eps**0.5).reshape(batch)
    if throw and not success.all():
        member = int(relative.argmax())
        layer = int(best.conditions[member].argmax())
        raise SingularError(
            first + layer + 1,
            float(best.conditions[member, layer]),
            float(relative[member]),
            1 / last_place,
            _checks.failed_members(~success, member),
        )

    updates = [
        LowRank(*(factor.reshape((*batch, *factor.shape[1:])) for factor in pair))
        for pair in best.factors
    ]
    conditions = best.conditions.reshape((*batch, len(ranks)))
    rounding = best.rounding.reshape(batch)
    return LinearAdaptation(
        Adapters(tuple(updates)), success, spectral, frobenius, rounding, conditions
    )


class _Problem(NamedTuple):
    """Split the change from the product of flat ``weights`` to ``best_map`` among the layers.

    ``svd`` decomposes ``E``; singular values up to ``noise`` may be rounding.
    """

    weights: Sequence[Tensor]
    ranks: Sequence[int]
    best_map: Tensor
    svd: SVD
    noise: Tensor

    def members(self, which: Tensor) -> _Problem:
        weights, svd = [w[which] for w in self.weights], SVD(*(part[which] for part in self.svd))
        return _Problem(weights, self.ranks, self.best_map[which], svd, self.noise[which])


@dataclass
class _Solution:
    """Factors for every layer, condition numbers ``[batch, L]``, rounding errors ``[batch]``."""

    factors: list[tuple[Tensor, Tensor]]
    conditions: Tensor
    rounding: Tensor

    def improve(self, tried: Tensor, other: _Solution) -> None:
        """Take over another solution of the members ``tried`` where it rounds less."""
        better = other.rounding < self.rounding[tried]
        members = tried.nonzero()[better, 0]
        for (A, B), (other_A, other_B) in zip(self.factors, other.factors, strict=True):
            A[members], B[members] = other_A[better], other_B[better]
        self.conditions[members] = other.conditions[better]
        self.rounding[members] = other.rounding[better]


def _split(problem: _Problem, accepted: Tensor) -> _Solution:
    """Split the change among the layers in one way after the other, while errors are larger."""
    best = _adapt_in_turn(problem, by_lemma=False)
    ways = [_adapt_in_turn, _split_transposed]
    if sum(problem.ranks) > problem.svd.S.shape[-1]:
        ways.insert(0, _split_lifted)
    for way in ways:
        poor = best.rounding > accepted
        if poor.any():
            best.improve(poor, way(problem.members(poor)))
    if (best.rounding > accepted).any():
        _improve_singular(problem, best, accepted)
    return best


def _improve_singular(problem: _Problem, best: _Solution, accepted: Tensor) -> None:
    """Adapt the most nearly singular layer of each poor member first, which may make it regular.

    A layer with a kernel of ``k`` dimensions needs a rank of ``k`` for that [prop-singular].
    """
    spectra = [lowrank.spectrum(weight) for weight in problem.weights]
    tiny = torch.finfo(best.rounding.dtype).tiny
    worst = torch.stack([S[:, -1] / S[:, 0].clamp(min=tiny) for S in spectra], 1).argmin(1)
    for layer in [l for l, rank in enumerate(problem.ranks) if rank]:
        poor = (best.rounding > accepted) & (worst == layer)
        if poor.any():
            best.improve(poor, _adapt_in_turn(problem.members(poor), first=layer))


def _split_transposed(problem: _Problem) -> _Solution:
    """Split the transposed network's change by the lemma, which starts at the last layer."""
    weights, ranks, best_map, (U, S, V), noise = problem
    turned = [w.mT for w in reversed(weights)]
    found = _adapt_in_turn(_Problem(turned, ranks[::-1], best_map.mT, SVD(V, S, U), noise))
    factors = [(B, A) for A, B in reversed(found.factors)]
    return _Solution(factors, found.conditions.flip(-1), found.rounding)


def _split_lifted(problem: _Problem) -> _Solution:
    """Raise the least singular values of layers by rank to spare, then split by the lemma.

    The product of many layers is nearly singular; the network so changed is less so.
    """
    weights, ranks, best_map, _, noise = problem
    width = min(best_map.shape[-2:])
    ends = [round(width * part / sum(ranks)) for part in accumulate(ranks, initial=0)]
    shares = [end - start for start, end in pairwise(ends)]
    lifts = []
    for weight, rank, own in zip(weights, ranks, shares, strict=True):
        U, S, V = lowrank.svd(weight)
        spare = slice(S.shape[-1] - (rank - own), None)
        lifts.append((U[..., spare] * (S[:, None, :1] - S[:, None, spare]), V[..., spare]))
    lifted = [w + A @ B.mT for w, (A, B) in zip(weights, lifts, strict=True)]
    svd = lowrank.svd(_finite(best_map - product(lifted)))
    split = _adapt_in_turn(_Problem(lifted, shares, best_map, svd, noise))
    factors = [
        (torch.cat([A, A_lift], -1), torch.cat([B, B_lift], -1))
        for (A, B), (A_lift, B_lift) in zip(split.factors, lifts, strict=True)
    ]
    return _Solution(factors, split.conditions, split.rounding)


def _share_by_lemma(
    outer: Tensor, inner: Tensor, rank: int, passed: Tensor, left: SVD | None
) -> tuple[Tensor, Tensor]:
    """Take ``outer X`` and ``inner Y`` with ``Yᵀ X = 1`` and ``Yᵀ`` injective on ``M X``.

    ``X`` has orthonormal columns of large ``‖M X‖`` for the adapters that they need; ``Y`` lies
    half way between the ranges of ``X`` and ``M X``. The product of all layers is ``passed``, that
    of the layers after this one ``left``.
    """
    M = inner.mT @ _solve(lowrank.svd(passed), outer)
    M.diagonal(dim1=-2, dim2=-1).add_(1)
    adapter = _solve(left, outer)
    _, S, V = lowrank.svd(adapter)
    scaled = V * _invert(S, adapter)[:, None]
    X = torch.linalg.qr(scaled @ lowrank.svd(M @ scaled).V)[0][..., :rank]
    Z = lowrank.svd(M @ X).U
    P, cosines, Q = lowrank.svd(X.mT @ Z)
    X, Z = X @ P, Z @ Q
    return outer @ X, inner @ ((X + Z) / (1 + cosines[:, None]))


def _share_at_random(outer: Tensor, inner: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Take ``outer X`` and ``inner Y`` with ``Yᵀ X = 1`` in general position."""
    draw = randomness.generator(0, "shares of a change", *outer.shape)
    X, Y = randomness.normal(draw, 2, outer.shape[-1], rank, dtype=outer.dtype).to(outer.device)
    X = torch.linalg.qr(X).Q
    return outer @ X, inner @ (Y @ torch.linalg.inv(X.mT @ Y))


def _adapt_in_turn(
    problem: _Problem, *, by_lemma: bool = True, first: int | None = None
) -> _Solution:
    """Adapt layer after layer, each to its share ``outer innerᵀ`` of the change that remains.

    By the lemma, columns are handed out after which the later layers can still do theirs
    [lem-splitting]; otherwise the leading ones. A singular layer ``first`` takes them at random.
    """
    weights, ranks, best_map, svd, noise = problem
    factors = [
        (w.new_zeros(*w.shape[:-1], R), w.new_zeros(len(w), w.shape[-1], R))
        for w, R in zip(weights, ranks, strict=True)
    ]
    adapted = list(weights)
    conditions = best_map.new_ones(len(best_map), len(weights))
    layers = sorted([l for l, rank in enumerate(ranks) if rank], key=lambda l: l != first)
    for place, l in enumerate(layers):
        passed = _finite(product(adapted))
        U, S, V = svd if l == layers[0] else lowrank.svd(_finite(best_map - passed))
        after, before = [w.mT for w in reversed(adapted[l + 1 :])], adapted[:l]
        left, right = (
            lowrank.svd(_finite(product(part)).mT) if part else None for part in (after, before)
        )
        remaining = min(sum(ranks[k] for k in layers[place:]), int((S > noise).any(0).sum()))
        rank = min(ranks[l], remaining)
        if rank == 0:
            continue
        outer, inner = U[..., :remaining], V[..., :remaining] * S[:, None, :remaining]
        if l == first and rank < remaining:
            outer, inner = _share_at_random(outer, inner, rank)
        elif by_lemma and rank < remaining:
            outer, inner = _share_by_lemma(outer, inner, rank, passed, left)
        outer, inner = outer[..., :rank], inner[..., :rank]
        # Pieces of zeros (of a target that is reached already) need no system, singular or not.
        sizes = [torch.linalg.vector_norm(part, dim=-2) for part in (outer, inner)]
        needed = sizes[0] * sizes[1] > noise
        A = torch.where(needed[:, None], _solve(left, outer), 0)
        B = torch.where(needed[:, None], _solve(right, inner), 0)
        factors[l][0][..., :rank], factors[l][1][..., :rank] = A, B
        adapted[l] = adapted[l] + A @ B.mT
        systems = [system.condition_number for system in (left, right) if system]
        if systems:
            conditions[:, l] = torch.where(needed.any(-1), torch.stack(systems).amax(0), 1)
    merged = [w + A @ B.mT for w, (A, B) in zip(weights, factors, strict=True)]
    return _Solution(factors, conditions, _rounding_error(merged, best_map))


def _rounding_error(weights: list[Tensor], best_map: Tensor) -> Tensor:
    """Measure how far the product, from either end, is from the best map; may be infinite."""
    backwards = product([w.mT for w in reversed(weights)]).mT
    errors = []
    for difference in (product(weights) - best_map, backwards - best_map):
        finite = difference.isfinite().all((-2, -1))
        errors.append(torch.where(finite, lowrank.norm(_finite(difference)), torch.inf))
    return torch.maximum(*errors)


def _solve(system: SVD | None, right: Tensor) -> Tensor:
    """Solve for the least ``X``, without directions that are 0 up to rounding [lem-splitting]."""
    if system is None:
        return right
    U, S, V = system
    return _finite(V @ (_invert(S, U, V)[..., None] * (U.mT @ right)))


def _invert(singular_values: Tensor, *sides: Tensor) -> Tensor:
    """Return ``1/σ``, or 0 where ``σ`` is within the rounding of a matrix of these sides."""
    largest = max(side.shape[-2] for side in sides)
    least = largest * torch.finfo(singular_values.dtype).eps * singular_values[..., :1]
    return torch.where(singular_values > least, 1 / singular_values, 0)


def _finite(matrix: Tensor) -> Tensor:
    """Put 0 for what overflowed, which no decomposition takes; its rounding error is infinite."""
    return matrix.nan_to_num(0, 0, 0)
