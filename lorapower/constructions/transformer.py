"""Transformers adapted segment by segment [thm-transformer], [thm-residual]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank
from ..adapters import Adapters
from ..errors import InputError, SingularError
from ..lowrank import LowRank
from ..networks.attention import GAINS, SHIFTS
from ..networks.decoder import Decoder
from ..networks.gap import Gap
from ..networks.segmentation import (
    ADAPTED,
    DIMENSIONS,
    AnyTransformer,
    Segments,
    inverted,
    segments,
)
from ..networks.transformer import Transformer
from . import narrow_heads, unit_symmetry
from .linear import Adaptation, LinearAdaptation, adapt_gap

A = TypeVar("A", Transformer, Decoder)


@dataclass(frozen=True, eq=False, repr=False)
class TransformerAdaptation(Adaptation):
    """Hold adapters and vectors of a transformer, and the evidence for them.

    Adapters are in the order of the network's ``weights``, of rank 0 for those that stay.
    ``success`` concerns rounding, narrow heads and query biases, not other ranks that are too low.

    Attributes
    ----------
    solutions : Segments
        A `LinearAdaptation` for each segment with two adapted weights: of four layers,
        ``[..., L, H]``; ``output`` of two, ``[...]``. A decoder may have none.
    condition_number : Tensor
        The largest of the linear systems solved, in a `Transformer` times those of the shifts
        between blocks; ``[...]``. Errors of outputs, relative to the terms summed, seldom much
        exceed ``eps`` times this.
    """

    solutions: Segments[LinearAdaptation]
    condition_number: Float[Tensor, "*batch"]


@torch.no_grad()
@_checks.flushing()
def adapt_transformer(
    frozen: A,
    target: A,
    ranks: int | Mapping[str, int] | Segments[Tensor],
    *,
    throw: bool = True,
) -> TransformerAdaptation:
    """Make a transformer imitate another, segment by segment, by adapters and vectors.

    Segments (`networks.segments`) are deep linear networks. Two adapted neighbours come as near to
    the target's as their ranks allow by `adapt_linear`, or exactly in narrow heads. A weight with a
    segment of its own gets ``LR_R(E) B⁺`` if it reads tokens, ``Sᵀ LR_R(E)`` if it writes them. In
    a `Transformer` biases are ``b̂_2 = W_2 c`` with ``W̄_2 c = b̄_2`` in all blocks but the last; in
    a `Decoder` gains and shifts become the target's (`Decoder.with_norms` writes it with the frozen
    ones, but for those of a final norm), and biases complete what segments leave. Where ranks of
    feed-forward weights lack one that scales of units can save, the target's units are aligned
    first, so that every vertex of [thm-needed] is exact; updates can then be much larger than
    differences.

    Raises what `networks.segments` raises; `SingularError` where a segment is reached with less
    than half of the digits, relative to the product of its factors' norms plus the target's; and
    `InputError` for ranks out of range, for heads narrower than the tokens with less rank than they
    need (`bounds.transformer_ranks`), and for a target whose scores no query bias completes.
    Source: [thm-transformer], [thm-residual], [thm-needed]; for narrow heads [prop-narrow-heads].

    Parameters
    ----------
    ranks : int, mapping or segments
        One for all, cut to each weight's smaller side; one for each kind of weight, the network's
        ``adapted_kinds``; or `bounds.transformer_ranks`, the largest of each kind.
    frozen, target, throw
        See `networks.segments` and `adapt_linear`.

    Examples
    --------
    Half of the width is enough between two of the paper's transformers.

    >>> import torch
    >>> from lorapower.constructions import adapt_transformer
    >>> from lorapower.networks import Transformer
    >>> frozen, target = (Transformer.random(2, 8, 2, scale=0.3, seed=s) for s in (0, 1))
    >>> adapted = adapt_transformer(frozen, target, ranks=4).adapters.merge(frozen)
    >>> tokens = torch.randn(8, 5, dtype=torch.float64)
    >>> adapted(tokens).allclose(target(tokens))
    True
    """
    gaps = segments(frozen, target, throw=throw)
    by_kind = _ranks_by_kind(ranks, frozen)
    if isinstance(frozen, Decoder) and isinstance(target, Decoder):
        target, gaps = unit_symmetry.save_ranks(frozen, target, gaps, by_kind)
    solutions, of_kind = _adapt_segments(gaps, by_kind, throw)
    updates = [
        next(of_kind[kind]) if adapts else LowRank(w[..., :0], w.mT[..., :0])
        for kind, w, adapts in zip(
            frozen.kind_of_weight, frozen.weights, frozen.adapted, strict=True
        )
    ]
    sums = [w + update.matrix() for w, update in zip(frozen.weights, updates, strict=True)]
    adapted = frozen.with_parameters(sums, checked=False)
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    conditions = {name: found.condition_numbers.amax(-1) for name, found in solutions.items()}
    worst = Segments(conditions).largest() if solutions else frozen.weights[0].new_ones(batch)
    if isinstance(adapted, Transformer) and isinstance(target, Transformer):
        vectors, last, between = _plain_vectors(adapted, target, gaps, solutions["value_output"])
        worst = torch.maximum(worst, last) * between
    else:
        vectors = _vectors(adapted, target, paired="query_key" in gaps)
        if "query_key" in gaps:
            vectors["b_Q"], solutions["query_key"] = _query_bias(
                adapted, target, gaps["query_key"], solutions["query_key"], throw
            )
    reached = frozen.one_by_one(frozen.bias_kinds, vectors)
    changes = tuple(new - old for new, old in zip(reached, frozen.biases, strict=True))
    success = torch.ones(batch, dtype=torch.bool, device=frozen.device)
    for relative in inverted(frozen, target).values():
        success = success & (relative <= 1).all(-1)
    if solutions:
        failed = Segments({name: ~found.success for name, found in solutions.items()})
        success = success & ~failed.largest()
    return TransformerAdaptation(Adapters(tuple(updates), changes), success, solutions, worst)


def _adapt_segments(
    gaps: Segments[Gap], ranks: Mapping[str, int], throw: bool
) -> tuple[Segments[LinearAdaptation], dict[str, Iterator[LowRank]]]:
    """Adapt each segment; return solutions of two weights, and the updates of each kind."""
    solutions = Segments[LinearAdaptation]()
    of_kind: dict[str, Iterator[LowRank]] = {}
    for name, gap in gaps.items():
        own = {kind: ranks[kind] for kind in ADAPTED[name]}
        if len(own) == 1:
            updates: tuple[LowRank, ...] = (_adapt_single(name, gap, *own.values()),)
        else:
            solutions[name] = _adapt_pair(name, gap, own, throw)
            updates = solutions[name].adapters.updates
            updates = updates[1:3] if len(updates) == 4 else updates
        if name == "query_key":
            # The segment has W_K transposed.
            updates = updates[0], updates[1].mT
        dims = DIMENSIONS[name]
        for kind, update in zip(own, updates, strict=True):
            # One by one, over blocks and heads.
            A, B = (
                factor.unsqueeze(-3 - dims).flatten(-3 - dims, -3).unbind(-3)
                for factor in (update.left, update.right)
            )
            of_kind[kind] = map(LowRank, A, B)
    return solutions, of_kind


def _ranks_by_kind(ranks: Any, network: AnyTransformer) -> dict[str, int]:
    """Read the rank of each kind of adapted weight, from one for all or one for each kind."""
    shapes = {kind: network.parameters[kind].shape[-2:] for kind in network.adapted_kinds}
    if isinstance(ranks, Segments):
        largest = {name: int(part.max()) for name, part in ranks.items()}
        ranks = {kind: R for name, R in largest.items() for kind in ADAPTED[name]}
    if not isinstance(ranks, Mapping | list | tuple | Tensor):
        return dict(zip(shapes, _checks.capped_ranks(ranks, list(shapes.values())), strict=True))
    if not isinstance(ranks, Mapping) or set(ranks) != set(shapes):
        allowed = f"one integer, or one for each of {', '.join(shapes)}"
        raise InputError("ranks", allowed=allowed, given=ranks)
    return {
        kind: _checks.integer(f"rank of {kind}", ranks[kind], 0, min(shape), limit="smaller side")
        for kind, shape in shapes.items()
    }


def _adapt_pair(name: str, gap: Gap, ranks: Mapping[str, int], throw: bool) -> LinearAdaptation:
    """Adapt a segment's two factors: the middle ones of four layers, or both of two."""
    inner, outer = ranks.values()
    if narrow_heads.is_narrow(gap):
        if throw:
            narrow_heads.require_ranks(gap, ranks)
        solution = narrow_heads.adapt_narrow_heads(gap, inner, outer)
    else:
        each = (inner, outer) if gap.frozen.depth == 2 else (0, inner, outer, 0)
        solution = adapt_gap(gap, each, throw=False)
    numbers = torch.finfo(gap.frozen.dtype)
    relative = solution.rounding_error / gap.rounding_scale.clamp(min=numbers.tiny)
    success = relative <= numbers.eps**0.5
    if throw and not success.all():
        place = tuple((~success).nonzero()[0].tolist())
        conditions, failed = solution.condition_numbers[place], ~success
        words = f"{name.replace('_', '–')} segment"
        if gap.frozen.depth == 4:
            block, head = place[-2:]
            words += f" of block {block + 1}, head {head + 1}"
            failed = failed[..., block, head]
        raise SingularError(
            int(conditions.argmax()) + 1,
            float(conditions.max()),
            float(relative[place]),
            1 / (max(gap.frozen.widths) * numbers.eps),
            f" of the {words}{_checks.failed_members(failed)}",
        )
    return replace(solution, success=success)


def _adapt_single(name: str, gap: Gap, rank: int) -> LowRank:
    """Make the update of a weight that has a segment of its own."""
    best, (before, after) = gap.best(rank), gap.frozen.weights
    if name in ("sent", "outer"):
        return LowRank(after.mT @ best.left, best.right)
    return LowRank(best.left, torch.linalg.pinv(before).mT @ best.right)


def _plain_vectors(
    adapted: Transformer,
    target: Transformer,
    gaps: Segments[Gap],
    values: LinearAdaptation,
) -> tuple[dict[str, Tensor], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Find biases of a plain transformer, and condition numbers of the systems for ``b̂_2``.

    These are that of the last block, and the product of those of the others.
    """
    # Where a system is singular its member fails, and its solution is not finite.
    shift = target.missing_shift.nan_to_num(0, 0, 0)
    shift = shift.expand(*adapted.batch_shape, *shift.shape[-2:])
    wanted = target.W_out @ target.b_2[..., -1, :, None]
    last = lowrank.solve(adapted.W_out, wanted)[..., 0].nan_to_num(0, 0, 0)
    between = lowrank.times(adapted.W_2[..., :-1, :, :], shift)
    # Columns of a softmax sum to 1: what inexact segments make of the shift is constant.
    gap = gaps["value_output"]
    reached = values.adapters.merge(gap.frozen).product()
    missed = (gap.target.product() - reached).sum(-3)[..., 1:, :, :]
    b_1 = target.b_1 + pad(lowrank.times(missed, shift), (0, 0, 1, 0))
    conditions = lowrank.condition_number(target.W_2)[..., :-1].expand(shift.shape[:-1])
    vectors = {"b_1": b_1, "b_2": torch.cat([between, last[..., None, :]], -2)}
    return vectors, lowrank.condition_number(adapted.W_out), conditions.prod(-1)


def _vectors(adapted: Decoder, target: Decoder, *, paired: bool) -> dict[str, Tensor]:
    """Find the vectors that complete adapted weights to the target.

    Where queries and keys are ``paired`` in one segment, the bias of queries is left out.
    """
    s_1, s_2 = target.shifts
    vectors = {}
    for kind in target.bias_kinds:
        if kind in (*GAINS, *SHIFTS, "b_2"):
            vectors[kind] = target.parameters[kind]
        elif kind in (("b_1", "b_3") if paired else ("b_1", "b_3", "b_Q", "b_K")):
            weight = kind.replace("b", "W")
            s = s_2 if kind in ("b_1", "b_3") else s_1.unsqueeze(-2)
            wanted = target.parameters[kind] + lowrank.times(target.parameters[weight], s)
            vectors[kind] = wanted - lowrank.times(adapted.parameters[weight], s)
    s = s_1.unsqueeze(-2)
    wanted, reached = (
        lowrank.times(network.W_O, network.each_head(lowrank.times(network.W_V, s), -2))
        for network in (target, adapted)
    )
    vectors["b_O"] = target.b_O + (wanted - reached).sum(-2)
    return vectors


def _query_bias(
    adapted: Decoder,
    target: Decoder,
    gap: Gap,
    solution: LinearAdaptation,
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
    limit = torch.finfo(missed.dtype).eps ** 0.5
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
