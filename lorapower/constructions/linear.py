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
from ..adapters.core import Adapters
from ..errors import SingularError
from ..lowrank import SVD, LowRank
from ..networks.gap import Gap
from ..networks.layers import LinearNetwork, product


@dataclass(frozen=True, eq=False, repr=False)
class Adaptation:
    """What all constructions return: ``adapters``, and whether they are a ``success``, ``[...]``.

    They are ``ΔW_l = A_l B_lᵀ`` of rank at most ``R_l``, and ``Δb_l`` where biases are tuned;
    `Adapters.merge` applies them. Without success they are the best found.
    """

    adapters: Adapters
    success: Bool[Tensor, "*batch"]

    def __repr__(self) -> str:
        good, members = int(self.success.sum()), self.success.numel()
        return f"{type(self).__name__}({self.adapters}, success of {good} in {members})"


@dataclass(frozen=True, eq=False, repr=False)
class LinearAdaptation(Adaptation):
    """Adapters of a deep linear network, with the evidence for them; errors hold for every input.

    ``success`` says whether the rounding error is acceptable. Where a product overflows, adapters
    are 0 and errors NaN.

    Attributes
    ----------
    spectral_error, frobenius_error : Tensor
        Predicted ``‖∏(W_l + ΔW_l) − W̄‖_2 = σ_{r+1}(E)``, ``r = Σ_l R_l``, and ``‖…‖_F``;
        ``[...]``.
    rounding_error : Tensor
        Measured ``‖∏(W_l + ΔW_l) − (∏W_l + LR_r(E))‖_2``, 0 in exact arithmetic; the larger of the
        products multiplied from either end; ``[...]``.
    condition_numbers : Tensor
        The worse of the two linear systems solved for each layer, 1 for none; ``[..., L]``. A
        singular system may still have a solution, as where the best map is singular.
    plain : Tensor
        Whether the plain splitting was kept; ``[...]``.
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

    The plain splitting cuts the singular triplets of ``E = W̄ − ∏ W_l`` into slices
    ``U_l S_l V_lᵀ`` of ``R_l``: ``A_l = (∏_{j>l} W_j)^{-1} U_l S_l``,
    ``B_lᵀ = V_lᵀ (∏_{j<l} (W_j + ΔW_j))^{-1}``. Where partial targets are singular up to a few
    units of the last place, the proof's splitting follows, which succeeds for non-singular layers.
    Others adapt singular layers first, to rotated triplets. Each member of the batch keeps its
    splitting of least rounding error.

    Raises `InputError` for ranks out of range and networks that do not fit each other, and
    `SingularError`, which names layer and members, where nothing tried meets ``rtol``. Source:
    [thm-optimal-adaptation], [lem-splitting], [lem-any-change], [prop-splittings].

    Parameters
    ----------
    frozen, target
        Networks, or what `LinearNetwork.of` takes, such as a matrix for the target, of equal
        inputs, outputs and type; batch shapes broadcast. No frozen hidden layer is narrower than
        these.
    ranks : Ranks
        One for all layers, cut to each weight's smaller side, or one per layer, at most that side.
    plain_only : bool
        Use the plain splitting, whatever its rounding error.
    rtol : float, optional
        Largest ``rounding_error`` over ``‖W̄‖_2`` (or over the predicted error, if that is larger,
        or over ``‖E‖_2`` if ``W̄ = 0``). By default ``eps^{1/2}``, half of the digits; ``inf``
        accepts any.
    throw : bool
        Raise an error where a member is not adapted acceptably; otherwise ``success`` says so.
    seed : int
        For random rotations of triplets.
    """
    gap = Gap(frozen, target)
    plain_only, throw = _checks.flag("plain_only", plain_only), _checks.flag("throw", throw)
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in gap.frozen.weights])
    return close(gap, per_layer, plain_only=plain_only, rtol=rtol, throw=throw, seed=seed)


@torch.no_grad()
def close(
    gap: Gap,
    ranks: Sequence[int],
    *,
    plain_only: bool = False,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> LinearAdaptation:
    """`adapt` for a `Gap`, whose decomposition may be at hand, and one rank per layer."""
    seed, eps = _checks.seed(seed), torch.finfo(gap.frozen.dtype).eps
    rtol = eps**0.5 if rtol is None else _checks.tolerance("rtol", rtol)
    finite = gap.finite
    if not throw and not finite.all():
        gap = gap.zeroed(~finite)
    ranks = gap.ranks(ranks)

    batch, total = gap.batch_shape, sum(ranks)
    spectral, frobenius = gap.error(total), gap.error(total, "fro")
    last_place = max(gap.frozen.widths[0], gap.frozen.widths[-1]) * eps
    # Of the target, or of the error where that is predicted to be larger or the target is zero.
    size = gap.target.norm
    scale = torch.maximum(torch.where(size > 0, size, gap.error(0)), spectral)
    scale = scale.expand(batch).flatten()

    gap = gap.flat()
    task = _Task(gap.frozen.weights, gap.reached(total), gap.svd, gap.noise[:, None])
    best = _split(task, ranks, _Plan(range(gap.frozen.depth), "leading"))
    plain = torch.ones_like(scale, dtype=torch.bool)
    conditions = torch.stack([lowrank.condition(values) for values in gap.frozen.spectra])
    singular = conditions.amax(0) > 1 / last_place
    for plan in () if plain_only else _alternatives(ranks, gap.spectrum.shape[-1], seed):
        poor = best.rounding > 4 * last_place * scale
        if plan.take == "random":
            poor = poor & singular
        if not poor.any():
            continue
        trial = _split(task.members(poor), ranks, plan)
        improved = trial.rounding < best.rounding[poor]
        members = poor.nonzero()[improved, 0]
        best.put(members, trial, improved)
        plain[members] = False

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

    def in_batch(flat: Tensor) -> Tensor:
        return flat.reshape((*batch, *flat.shape[1:]))

    def measured(flat: Tensor) -> Tensor:
        return torch.where(
            finite.reshape((*batch, *[1] * (flat.ndim - 1))), in_batch(flat), torch.nan
        )

    return LinearAdaptation(
        Adapters(tuple(LowRank(in_batch(A), in_batch(B)) for A, B in best.factors)),
        success=success,
        spectral_error=measured(spectral.flatten()),
        frobenius_error=measured(frobenius.flatten()),
        rounding_error=measured(best.rounding),
        condition_numbers=measured(best.conditions),
        plain=plain.reshape(batch),
    )


class _Plan(NamedTuple):
    """How to split: layers take leading, cheapest [lem-splitting] or random triplets, in order."""

    order: Sequence[int]
    take: Literal["leading", "cheapest", "random"] = "cheapest"
    lift: bool = False
    mirrored: bool = False
    seed: int = 0


def _alternatives(ranks: Sequence[int], width: int, seed: int) -> Iterator[_Plan]:
    layers = range(len(ranks))
    if sum(ranks) > width:
        yield _Plan(layers, lift=True)
    yield _Plan(layers)
    yield _Plan(layers, mirrored=True)
    # A singular layer has to be adapted before it stands in another layer's system.
    for l in layers:
        yield _Plan([l, *layers[:l], *layers[l + 1 :]], "random", seed=seed)


class _Task(NamedTuple):
    """What to split: flat weights, the map to reach, the decomposition and noise of ``E``."""

    weights: Sequence[Tensor]
    best_map: Tensor
    svd: SVD
    noise: Tensor

    def members(self, which: Tensor) -> _Task:
        weights, svd = [w[which] for w in self.weights], SVD(*(part[which] for part in self.svd))
        return _Task(weights, self.best_map[which], svd, self.noise[which])

    def mirrored(self) -> _Task:
        weights, (U, S, V) = [w.mT for w in reversed(self.weights)], self.svd
        return _Task(weights, self.best_map.mT, SVD(V, S, U), self.noise)


@dataclass
class _Splitting:
    """Factors for every layer, condition numbers ``[batch, L]``, rounding errors ``[batch]``."""

    factors: list[tuple[Tensor, Tensor]]
    conditions: Tensor
    rounding: Tensor

    def put(self, members: Tensor, other: _Splitting, improved: Tensor) -> None:
        """Take over another splitting for the members that it improves."""
        for (A, B), (other_A, other_B) in zip(self.factors, other.factors, strict=True):
            A[members], B[members] = other_A[improved], other_B[improved]
        self.conditions[members] = other.conditions[improved]
        self.rounding[members] = other.rounding[improved]

    def mirrored(self) -> _Splitting:
        factors = [(B, A) for A, B in reversed(self.factors)]
        return _Splitting(factors, self.conditions.flip(-1), self.rounding)


def _split(task: _Task, ranks: Sequence[int], plan: _Plan) -> _Splitting:
    """Visit the layers in the plan's order; each takes its share of the error that remains."""
    if plan.mirrored:
        return _split(task.mirrored(), ranks[::-1], plan._replace(mirrored=False)).mirrored()
    weights, best_map, svd, noise = task
    generator = randomness.generator(plan.seed, "rotation")
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
    for visit, l in enumerate(visits):
        # What a layer that overflowed leaves is not finite.
        reached = product(current).nan_to_num(0, 0, 0)
        first = visit == 0 and not plan.lift
        U, S, V = svd if first else lowrank.svd((best_map - reached).nan_to_num(0, 0, 0))
        left, right = _systems(current, l)
        s = min(sum(shares[j] for j in visits[visit:]), int((S > noise).any(0).sum()))
        k = min(shares[l], s)
        if k == 0:
            continue
        outer, inner = U[..., :s], V[..., :s] * S[:, None, :s]
        if plan.take == "leading" or k == s:
            outer, inner = outer[..., :k], inner[..., :k]
        elif plan.take == "random":
            X = torch.linalg.qr(randomness.normal(generator, s, k).to(outer))[0]
            outer, inner = outer @ X, inner @ X
        else:
            passed = inner.mT @ _solve(lowrank.svd(reached), outer)
            passed.diagonal(dim1=-2, dim2=-1).add_(1)
            X = _cheapest(_solve(left, outer), passed)[..., :k]
            X, Y = _complementary(X, passed @ X)
            outer, inner = outer @ X, inner @ Y
        # Pieces of zeros (of a target that is reached already) need no system, singular or not.
        sizes = [torch.linalg.vector_norm(part, dim=-2) for part in (outer, inner)]
        needed = sizes[0] * sizes[1] > noise
        A = torch.where(needed[:, None], _solve(left, outer), 0)
        B = torch.where(needed[:, None], _solve(right, inner), 0)
        factors[l][0][..., :k], factors[l][1][..., :k] = A, B
        current[l] = current[l] + A @ B.mT
        systems = [lowrank.condition(system.S) for system in (left, right) if system]
        if systems:
            worse = torch.stack(systems).amax(0)
            conditions[:, l] = torch.where(needed.any(-1), worse, 1)

    merged = [w + A @ B.mT for w, (A, B) in zip(weights, factors, strict=True)]
    return _Splitting(factors, conditions, _rounding_error(merged, best_map))


def _cheapest(adapter: Tensor, passed: Tensor) -> Tensor:
    """Orthonormal ``X``, first columns of large ``‖M X‖`` [lem-splitting] and small adapters."""
    _, S, V = lowrank.svd(adapter)
    scaled = V * _invert(S, adapter)[:, None]
    return torch.linalg.qr(scaled @ lowrank.svd(passed @ scaled).V)[0]


def _complementary(X: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
    """``X`` rotated, and ``Y`` near it: ``Yᵀ X = 1``, ``Yᵀ`` injective on ``M X``."""
    Z = lowrank.svd(passed).U
    P, cosines, Q = lowrank.svd(X.mT @ Z)
    X, Z = X @ P, Z @ Q
    return X, (X + Z) / (1 + cosines[:, None])


def _rounding_error(weights: list[Tensor], best_map: Tensor) -> Tensor:
    """Spectral distance of the product, from either end, from the best map; or infinite."""
    products = [product(weights)]
    if len(weights) > 2:
        products.append(product([w.mT for w in reversed(weights)]).mT)
    errors = []
    for difference in (reached - best_map for reached in products):
        finite = difference.isfinite().all((-2, -1))
        errors.append(torch.where(finite, lowrank.norm(difference.nan_to_num(0, 0, 0)), torch.inf))
    return torch.stack(errors).amax(0)


def _lift(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the update that raises the ``rank`` smallest singular values to the largest."""
    U, S, V = lowrank.svd(weight)
    tail = slice(S.shape[-1] - rank, None)
    return U[..., tail] * (S[:, None, :1] - S[:, None, tail]), V[..., tail]


def _systems(weights: list[Tensor], l: int) -> tuple[SVD | None, SVD | None]:
    """``∏_{j>l} W_j`` and ``(∏_{j<l} W_j)ᵀ``, multiplied outwards in, or ``None`` for no layers."""
    outer, inner = [w.mT for w in reversed(weights[l + 1 :])], weights[:l]
    left, right = (
        lowrank.svd(product(part).nan_to_num(0, 0, 0).mT) if part else None
        for part in (outer, inner)
    )
    return left, right


def _solve(system: SVD | None, right: Tensor) -> Tensor:
    """The least solution, without directions that are 0 up to rounding, as [lem-splitting] asks."""
    if system is None:
        return right
    U, S, V = system
    return (V @ (_invert(S, U, V)[..., None] * (U.mT @ right))).nan_to_num(0, 0, 0)


def _invert(singular_values: Tensor, *sides: Tensor) -> Tensor:
    """``1/σ``, or 0 where ``σ`` is within the rounding of a matrix of these sides."""
    largest = max(side.shape[-2] for side in sides)
    least = largest * torch.finfo(singular_values.dtype).eps * singular_values[..., :1]
    return torch.where(singular_values > least, 1 / singular_values, 0)
