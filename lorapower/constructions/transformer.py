"""Transformers adapted segment by segment [thm-transformer], [thm-residual]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank
from ..adapters import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.alignment import align, savable
from ..networks.gap import Gap
from ..networks.segmentation import Segments, is_regular, segments
from ..networks.transformer import Settings, Transformer
from . import _heads
from .linear import Adaptation, LinearAdaptation


@dataclass(frozen=True, eq=False, repr=False)
class TransformerAdaptation(Adaptation):
    """Adapters and vectors of a transformer, with the evidence for them.

    Adapters are in the order of `Transformer.weights`, of rank 0 for weights that stay. ``success``
    says whether every segment is adapted acceptably: it concerns rounding, narrow heads and query
    biases, not other ranks that are too low.

    Attributes
    ----------
    solutions : Segments
        A `linear.LinearAdaptation` for each segment with two adapted weights: of four layers,
        ``[..., L, H]``; ``output`` of two, ``[...]``. There may be none.
    shift_condition_numbers : Tensor
        If plain, of the systems for ``b̂_2``: the target's ``W_2`` of all blocks but the last, and
        ``Ŵ_out``; ``[..., L]``. Otherwise ``[..., 0]``.
    """

    solutions: Segments[LinearAdaptation]
    shift_condition_numbers: Float[Tensor, "*batch _"]

    @property
    def condition_number(self) -> Float[Tensor, "*batch"]:
        """The largest of the linear systems solved, times those of the shifts between blocks.

        Errors of outputs, relative to the terms summed, seldom much exceed ``eps`` times this.
        """
        shifts = self.shift_condition_numbers
        if not self.solutions:
            return shifts.new_ones(shifts.shape[:-1])
        worst = self.solutions.map(lambda _, solution: solution.condition_numbers.amax(-1))
        largest = worst.largest()
        if not shifts.shape[-1]:
            return largest
        between, last = shifts.tensor_split([-1], dim=-1)
        return torch.maximum(largest, last[..., 0]) * between.prod(-1)


@torch.no_grad()
@_checks.flushing()
def adapt_transformer(
    frozen: Transformer,
    target: Transformer,
    ranks: int | Mapping[str, int] | Segments[Tensor],
    *,
    rtol: float | None = None,
    throw: bool = True,
) -> TransformerAdaptation:
    """Make a transformer imitate another, segment by segment, by adapters and vectors.

    Segments (`networks.segments`) are deep linear networks. Two adapted neighbours come as near to
    the target's as their ranks allow by `adapt_linear`, or exactly in narrow heads. A weight with a
    segment of its own gets ``LR_R(E) B⁺`` if it reads tokens, ``Sᵀ LR_R(E)`` if it writes them. If
    plain, biases are ``b̂_2 = W_2 c`` with ``W̄_2 c = b̄_2`` in all blocks but the last; otherwise
    gains and shifts become the target's (`Transformer.with_norms` writes it with the frozen ones,
    but for those of a final norm), and biases complete what segments leave. Where ranks are full
    but for one on as many feed-forward weights as scales of units can save, blocks that differ by
    full rank on one of these have the target's units in another order and of other sizes, so that
    every vertex of [thm-needed] is exact; updates can then be much larger than differences.

    Raises `SingularError` where a segment is not reached within ``rtol``, and `InputError` for
    ranks out of range, for transformers that do not fit, for a singular ``W_1`` or ``W_2`` if
    plain, for heads narrower than the tokens with less rank than they need
    (`bounds.transformer_ranks`), and for a target whose scores no query bias completes. Source:
    [thm-transformer], [thm-residual], [thm-needed]; for narrow heads [prop-narrow-heads].

    Parameters
    ----------
    frozen, target : Transformer
        Of equal settings, sizes and type; batch shapes broadcast.
    ranks : int, mapping or Segments
        One for all, cut to each weight's smaller side; one for each kind of weight,
        `Transformer.adapted_kinds`; or `bounds.transformer_ranks`, the largest of each kind.
    rtol : float, optional
        Largest rounding error of a segment, relative to the product of its factors' norms plus the
        target's; by default half of the digits, ``inf`` accepts any.
    throw
        See `adapt_linear`.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    cut = segments(frozen, target, throw=throw)
    each = _heads.ranks_by_kind(ranks, frozen)
    if saved := _saved(cut, each, frozen.settings):
        target = align(target, cut, saved)
        cut = segments(frozen, target)
    solutions, by_kind = {}, {}
    for name, gap in cut.items():
        given = {kind: each[kind] for kind in Segments.WEIGHTS[name]}
        if len(given) == 2:
            if throw:
                _heads.require_ranks(gap, given)
            words = f"{name.replace('_', '–')} segment"
            solution = _heads.adapt_pair(gap, given, words, rtol=rtol, throw=throw)
            found, solutions[name] = solution.adapters.updates, solution
            if len(found) == 4:
                found = found[1:3]
            if name == "query_key":
                # The segment has W_K transposed.
                found = (found[0], LowRank(found[1].right, found[1].left))
        else:
            (rank,) = given.values()
            found = (_of_one(name, gap, rank),)
        dims = Segments.DIMENSIONS[name]
        for kind, update in zip(given, found, strict=True):
            # One by one, over blocks and heads.
            A, B = (
                factor.unsqueeze(-3 - dims).flatten(-3 - dims, -3).unbind(-3)
                for factor in (update.left, update.right)
            )
            by_kind[kind] = map(LowRank, A, B)
    updates = [
        next(by_kind[kind]) if adapts else LowRank(w[..., :0], w.mT[..., :0])
        for kind, w, adapts in zip(
            frozen.kind_of_weight, frozen.weights, frozen.adapted, strict=True
        )
    ]
    sums = [w + update.matrix() for w, update in zip(frozen.weights, updates, strict=True)]
    adapted = frozen.with_parameters(sums, checked=False)
    success = is_regular(frozen, target)
    conditions = frozen.weights[0].new_zeros(*success.shape, 0)
    if frozen.is_plain:
        vectors, conditions = _plain_vectors(adapted, target, cut, solutions["value_output"])
    else:
        vectors = adapted.vectors_like(target, paired="query_key" in cut)
        if "query_key" in cut:
            vectors["b_Q"], solutions["query_key"] = _query_bias(
                adapted, target, cut.query_key, solutions["query_key"], rtol, throw
            )
    reached = frozen.one_by_one(frozen.bias_kinds, vectors)
    changes = tuple(new - old for new, old in zip(reached, frozen.biases, strict=True))
    for name, solution in solutions.items():
        success &= ~Segments({name: ~solution.success}).largest()
    return TransformerAdaptation(
        Adapters(tuple(updates), changes), success, Segments(solutions), conditions
    )


def _saved(cut: Segments[Gap], ranks: Mapping[str, int], settings: Settings) -> set[str]:
    """Name the feed-forward weights whose ranks lack one, where scales of units can save these."""
    kinds, count = savable(settings)
    saved = set()
    for name in ("inner", "up", "outer"):
        if name in cut:
            (kind,), (inputs, *_, outputs) = Segments.WEIGHTS[name], cut[name].frozen.widths
            units, full = (inputs, outputs) if kind == "W_2" else (outputs, inputs)
            if ranks[kind] < full - 1 or units < full or (ranks[kind] < full and kind not in kinds):
                return set()
            saved |= {kind} if ranks[kind] < full else set()
    return saved if len(saved) <= count else set()


def _of_one(name: str, gap: Gap, rank: int) -> LowRank:
    """Make the update of a weight that has a segment of its own."""
    best, (before, after) = gap.best(rank), gap.frozen.weights
    if name in ("sent", "outer"):
        return LowRank(after.mT @ best.left, best.right)
    return LowRank(best.left, torch.linalg.pinv(before).mT @ best.right)


def _plain_vectors(
    adapted: Transformer,
    target: Transformer,
    cut: Segments[Gap],
    values: LinearAdaptation,
) -> tuple[dict[str, Tensor], Float[Tensor, "*batch _"]]:
    """Find biases of a plain transformer, and the condition numbers of their systems."""
    # Where a system is singular its member fails, and its solution is not finite.
    shift = target.missing_shift.nan_to_num(0, 0, 0)
    shift = shift.expand(*adapted.batch_shape, *shift.shape[-2:])
    wanted = target.W_out @ target.b_2[..., -1, :, None]
    last = lowrank.solve(adapted.W_out, wanted)[..., 0].nan_to_num(0, 0, 0)
    between = lowrank.times(adapted.W_2[..., :-1, :, :], shift)
    # Columns of a softmax sum to 1: what inexact segments make of the shift is constant.
    reached = values.adapters.merge(cut.value_output.frozen).product()
    missed = (cut.value_output.target.product() - reached).sum(-3)[..., 1:, :, :]
    b_1 = target.b_1 + pad(lowrank.times(missed, shift), (0, 0, 1, 0))
    conditions = lowrank.condition_number(target.W_2)[..., :-1].expand(shift.shape[:-1])
    of_out = lowrank.condition_number(adapted.W_out)[..., None]
    vectors = {"b_1": b_1, "b_2": torch.cat([between, last[..., None, :]], -2)}
    return vectors, torch.cat([conditions, of_out], -1)


def _query_bias(
    adapted: Transformer,
    target: Transformer,
    gap: Gap,
    solution: LinearAdaptation,
    rtol: float | None,
    throw: bool,
) -> tuple[Tensor, LinearAdaptation]:
    """Find ``b̂_Q``, and add by how much it misses the target's scores to the rounding errors."""
    s = target.shifts[0].unsqueeze(-2)
    # What all keys are multiplied by, whatever the token.
    keys = gap.frozen.weights[3] @ adapted.W_K.mT
    wanted = lowrank.times(
        gap.target.weights[3] @ target.W_K.mT, lowrank.times(target.W_Q, s) + target.b_Q
    )
    queries = lowrank.times(torch.linalg.pinv(keys), wanted)
    missed = torch.linalg.vector_norm(lowrank.times(keys, queries) - wanted, dim=-1)
    size = gap.rounding_scale + torch.linalg.vector_norm(wanted, dim=-1)
    limit = torch.finfo(missed.dtype).eps ** 0.5 if rtol is None else rtol
    # Below the threshold the biases make up for the nearest that is reached.
    bad = (solution.spectral_error <= gap.noise) & (missed > limit * size)
    if throw and bad.any():
        block, head = bad.reshape(-1, *bad.shape[-2:]).nonzero()[0].tolist()[-2:]
        raise InputError(
            f"target's query–key product of block {block + 1}, head {head + 1}",
            allowed="non-singular on what norms let through",
            given=f"one whose scores no query bias completes, by {float(missed.max()):.1e}",
            remedy="perturb the target's W_Q and W_K",
        )
    rounding = solution.rounding_error + missed
    completed = replace(solution, rounding_error=rounding, success=solution.success & ~bad)
    return queries - lowrank.times(adapted.W_Q, s), completed
