"""Optimal adaptation of a deep linear network (theorem of the same name, chapter 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, bounds, lowrank, randomness
from ..adapters import Adapters
from ..errors import InputError, SingularError
from ..lowrank import LowRank
from ..networks import LinearNetwork, product


@dataclass(frozen=True, eq=False)
class LinearAdaptation:
    """Adapters of a deep linear network, with the evidence for them.

    Attributes
    ----------
    adapters : ``ΔW_l = A_l B_lᵀ`` of rank at most ``R_l``; `Adapters.merge` applies them.
    spectral_error : predicted ``‖∏(W_l + ΔW_l) − W̄‖_2 = σ_{r+1}(E)``, ``r = Σ_l R_l``; ``[...]``.
    frobenius_error : predicted ``‖∏(W_l + ΔW_l) − W̄‖_F``; ``[...]``.
    rounding_error : measured ``‖∏(W_l + ΔW_l) − (∏W_l + LR_r(E))‖_2``, which exact arithmetic would
        make 0, the larger of the products multiplied from either end; ``[...]``.
    condition_numbers : of the worse of the two linear systems solved for each layer, 1 where none
        was needed; ``[..., L]``.
    plain : whether the splitting of the proof was kept, or else an alternative; ``[...]``.

    The prediction holds for every input: a linear map has no region.
    """

    adapters: Adapters
    spectral_error: Float[Tensor, "*batch"]
    frobenius_error: Float[Tensor, "*batch"]
    rounding_error: Float[Tensor, "*batch"]
    condition_numbers: Float[Tensor, "*batch layers"]
    plain: Bool[Tensor, "*batch"]


@torch.no_grad()
def adapt(
    frozen: LinearNetwork | Any,
    target: LinearNetwork | Any,
    ranks: int | Sequence[int],
    *,
    plain_only: bool = False,
    rtol: float | None = None,
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
    ranks : one for all layers or one per layer, each from 0 to its weight's smaller side.
    plain_only : use the splitting of the proof, whatever its rounding error.
    rtol : largest acceptable ``rounding_error``, relative to ``‖W̄‖_2`` (or to the predicted error,
        if that is larger, or to ``‖E‖_2`` for a target of zeros); by default ``eps^{1/2}``, half of
        the digits. ``inf`` accepts whatever comes.
    seed : of the random rotations.

    Raises
    ------
    InputError : ranks out of range, networks that do not fit each other, a hidden width too small.
    SingularError : nothing tried meets ``rtol``: a singular layer, or too few digits; names the
        layer and its condition number.

    Source: theorem "optimal adaptation of a deep linear network", chapter 1, and the section on
    the robust construction there.
    """
    frozen, target = LinearNetwork.of(frozen, "frozen"), LinearNetwork.of(target, "target")
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    E = bounds.error_matrix(frozen, target)
    _check_widths(frozen, per_layer)
    rtol = _checks.tolerance("rtol", torch.finfo(E.dtype).eps ** 0.5 if rtol is None else rtol)

    batch = E.shape[:-2]
    spectral, frobenius = lowrank.tail_norms(lowrank.spectrum(E), sum(per_layer))
    attainable = min(sum(per_layer), *E.shape[-2:])
    best_map = frozen.product() + lowrank.truncated_svd(E, attainable).matrix()
    last_place = max(E.shape[-2:]) * torch.finfo(E.dtype).eps
    problem = _Problem(
        [w.expand(*batch, *w.shape[-2:]).reshape(-1, *w.shape[-2:]) for w in frozen.weights],
        best_map.reshape(-1, *E.shape[-2:]),
        last_place * bounds.rounding_scale(frozen, target).expand(batch).reshape(-1),
        per_layer,
    )

    # Of the target, or of the error where that is predicted to be larger or the target is zero.
    sizes = [torch.linalg.matrix_norm(M, ord=2) for M in (target.product(), E)]
    scale = torch.maximum(torch.where(sizes[0] > 0, sizes[0], sizes[1]), spectral)
    scale = scale.expand(batch).reshape(-1)
    best = _split(problem, _Plan(range(frozen.depth)))
    plain = torch.ones(len(scale), dtype=torch.bool)
    for plan in () if plain_only else _alternatives(problem, seed):
        poor = best.rounding > 16 * last_place * scale
        if not poor.any():
            break
        trial = _split(problem.members(poor), plan)
        improved = trial.rounding < best.rounding[poor]
        mine = poor.nonzero()[improved, 0]
        best.put(mine, trial, improved)
        plain[mine] = False

    relative = best.rounding / scale.clamp(min=torch.finfo(E.dtype).tiny)
    if (relative > rtol).any():
        member = int(relative.argmax())
        layer = int(best.conditions[member].argmax())
        raise SingularError(
            layer + 1,
            float(best.conditions[member, layer]),
            float(relative[member]),
            rtol,
            1 / last_place,
            f" of batch member {member}" if batch else "",
        )

    def unflatten(flat: Tensor) -> Tensor:
        return flat.reshape((*batch, *flat.shape[1:]))

    return LinearAdaptation(
        Adapters(tuple(LowRank(unflatten(A), unflatten(B)) for A, B in best.factors)),
        spectral_error=spectral,
        frobenius_error=frobenius,
        rounding_error=unflatten(best.rounding),
        condition_numbers=unflatten(best.conditions),
        plain=unflatten(plain),
    )


class _Problem(NamedTuple):
    """``∏(W_l + ΔW_l) = best_map`` with ``rank ΔW_l ≤ R_l``, for a flat batch."""

    weights: list[Tensor]
    best_map: Tensor
    noise: Tensor
    ranks: Sequence[int]

    def members(self, which: Tensor) -> _Problem:
        weights = [w[which] for w in self.weights]
        return self._replace(
            weights=weights, best_map=self.best_map[which], noise=self.noise[which]
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


def _alternatives(problem: _Problem, seed: int) -> Iterator[_Plan]:
    depth = len(problem.weights)
    forward, backward = range(depth), range(depth)[::-1]
    spare = sum(problem.ranks) > min(problem.best_map.shape[-2:])
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


def _split(problem: _Problem, plan: _Plan) -> _Splitting:
    """Visit the layers in the plan's order; each takes its share of the error that remains.

    Adapting layer ``l`` changes the product by ``(∏_{j>l}) A_l B_lᵀ (∏_{j<l})``, whatever the other
    layers' present weights are, so the order is free. The remaining error is computed anew for
    each layer, so that later layers make up for the rounding of earlier ones.
    """
    weights, best_map, noise, ranks = problem
    width = min(best_map.shape[-2:])
    generator = randomness.generator(plan.seed, "rotation", plan.rotation)
    factors = [
        (w.new_zeros(*w.shape[:-1], R), w.new_zeros(len(w), w.shape[-1], R))
        for w, R in zip(weights, ranks, strict=True)
    ]
    shares = list(ranks)
    if plan.lift:
        ends = [round(width * part / sum(ranks)) for part in accumulate(ranks, initial=0)]
        shares = [end - start for start, end in pairwise(ends)]
        for w, (A, B), R, share in zip(weights, factors, ranks, shares, strict=True):
            A[..., share:], B[..., share:] = _lift(w, R - share)
    current = [w + A @ B.mT for w, (A, B) in zip(weights, factors, strict=True)]
    conditions = best_map.new_ones(len(best_map), len(weights))

    for l in plan.order:
        remaining = (best_map - product(current)).nan_to_num(0, 0, 0)  # of a plan that overflowed
        U, S, Vh = torch.linalg.svd(remaining, full_matrices=False)
        unvisited = plan.order[plan.order.index(l) :]
        s = min(sum(shares[j] for j in unvisited), int(torch.gt(S, noise[:, None]).sum(-1).max()))
        k = min(shares[l], s)
        if k == 0:
            continue
        U, S, V = U[..., :s], S[:, :s, None], Vh.mT[..., :s]
        left, right = _systems(current, l)
        if plan.take == "right":
            P = _directions(plan.take, right, V, k, generator)
            A, B = lowrank.solve(left, U @ (S * P)), lowrank.solve(right, V @ P)
        else:
            P = _directions(plan.take, left, U, k, generator)
            A, B = lowrank.solve(left, U @ P), lowrank.solve(right, V @ (S * P))
        # Pieces of zeros (of a target that is reached already) need no system, singular or not.
        needed = torch.linalg.vector_norm(S * P, dim=-2, keepdim=True) > noise[:, None, None]
        # An unsolvable one gives nothing; what is left undone is measured at the end.
        solved = needed & (A.isfinite().all((-2, -1)) & B.isfinite().all((-2, -1)))[:, None, None]
        factors[l][0][..., :k] = torch.where(solved, A, 0)
        factors[l][1][..., :k] = torch.where(solved, B, 0)
        current[l] = current[l] + factors[l][0][..., :k] @ factors[l][1][..., :k].mT
        worse = torch.maximum(lowrank.condition_number(left), lowrank.condition_number(right))
        conditions[:, l] = torch.where(needed.any((-2, -1)), worse, 1)

    merged = [w + A @ B.mT for w, (A, B) in zip(weights, factors, strict=True)]
    rounding = torch.stack([_distance(map_, best_map) for map_ in _both_ways(merged)]).amax(0)
    return _Splitting(factors, conditions, rounding)


def _both_ways(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The product from the first layer on, as the forward pass does it, and from the last.

    The construction makes up for the very rounding errors of the first. The second has others, as
    a forward pass on other inputs has, so that the larger error of the two is the honest one.
    """
    return product(weights), product([w.mT for w in reversed(weights)]).mT


def _distance(matrix: Tensor, other: Tensor) -> Tensor:
    """Spectral norm of the difference, infinite where one is not finite."""
    difference = matrix - other
    finite = difference.isfinite().all((-2, -1))
    norm = torch.linalg.matrix_norm(difference.nan_to_num(0, 0, 0), ord=2)
    return torch.where(finite, norm, torch.inf)


def _directions(
    take: str, system: Tensor, basis: Tensor, k: int, generator: torch.Generator
) -> Tensor:
    """Orthonormal ``[batch, s, k]``: the combinations of the ``s`` triplets that a layer takes."""
    size = basis.shape[-1]
    if take == "leading":
        return torch.eye(size, k, dtype=basis.dtype).expand(len(basis), size, k)
    if take == "random":
        normal = torch.randn(size, size, generator=generator, dtype=basis.dtype)
        return torch.linalg.qr(normal)[0][:, :k].expand(len(basis), size, k)
    cost = lowrank.solve(system, basis).nan_to_num()
    return torch.linalg.svd(cost, full_matrices=False)[2].mT[..., -k:]


def _lift(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the update that raises the ``rank`` smallest singular values to the largest."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    tail = slice(S.shape[-1] - rank, None)
    return U[..., tail] * (S[:, None, :1] - S[:, None, tail]), Vh.mT[..., tail]


def _systems(weights: list[Tensor], l: int) -> tuple[Tensor, Tensor]:
    """``∏_{j>l} W_j`` and ``(∏_{j<l} W_j)ᵀ``, the identity where there are no such layers.

    Each is multiplied outwards in: the second as the forward pass does it, so that its rounding is
    the forward pass's own, the first in the mirrored order. The other association loses several
    digits in deep networks.
    """
    left = product([_identity(weights[-1].mT), *(w.mT for w in reversed(weights[l + 1 :]))]).mT
    right = product([_identity(weights[0]), *weights[:l]]).mT
    return left.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0)


def _identity(weight: Tensor) -> Tensor:
    """The identity on the inputs of ``weight``, one for each member of the batch."""
    return torch.eye(weight.shape[-1], dtype=weight.dtype).expand(len(weight), -1, -1)


def _check_widths(frozen: LinearNetwork, ranks: Sequence[int]) -> None:
    """Layer ``l``'s systems are solvable only if no width hides an input or an output."""
    inputs, *hidden, outputs = frozen.widths
    for l, rank in enumerate(ranks):
        narrow = [w for w in hidden[l:] if w < outputs] + [w for w in hidden[:l] if w < inputs]
        if rank and narrow:
            raise InputError(
                "hidden widths",
                allowed=f"at least {outputs} (the outputs) after layer {l + 1} and at least "
                f"{inputs} (the inputs) before it",
                given=hidden,
                remedy="a narrower layer hides part of the target from the adapters; give rank 0 "
                f"to layer {l + 1}",
            )
