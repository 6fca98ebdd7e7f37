"""Transformers adapted segment by segment [thm-transformer], [thm-residual]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank, randomness
from ..adapters.core import Adapters
from ..bounds.transformer import attention_floor, directions
from ..errors import InputError
from ..lowrank import LowRank
from ..networks._segments import Segments
from ..networks.gap import Gap
from ..networks.transformer import Transformer
from . import _heads
from .linear import Adaptation, LinearAdaptation

_WORDS = {"query_key": "query–key", "value_output": "value–output", "output": "output"}


@dataclass(frozen=True, eq=False, repr=False)
class TransformerAdaptation(Adaptation):
    """Adapters and vectors of a transformer, with the evidence for them.

    Adapters are in the order of `Transformer.weights`, of rank 0 for weights that stay. ``success``
    says whether every segment is adapted acceptably: it concerns rounding, narrow heads and query
    biases, not other ranks that are too low. Errors that are 0 up to rounding mean equal networks.

    Attributes
    ----------
    solutions : Segments
        A `linear.LinearAdaptation` for each segment with two adapted weights: of four layers,
        ``[..., L, H]``; ``output`` of two, ``[...]``. There may be none.
    errors : Segments
        Upper bounds of ``‖M̂ − M̄‖_2``: predicted errors, 0 where the rank suffices, plus measured
        rounding, which is not measured for segments of one weight.
    shift_condition_numbers : Tensor
        If plain, of the systems for ``b̂_2``: the target's ``W_2`` of all blocks but the last, and
        ``Ŵ_out``; ``[..., L]``. Otherwise ``[..., 0]``.
    """

    solutions: Segments[LinearAdaptation]
    errors: Segments[Tensor]
    shift_condition_numbers: Float[Tensor, "*batch _"]

    @property
    def condition_numbers(self) -> Segments[Tensor]:
        """The worst linear system solved for each segment."""
        return self.solutions.map(lambda _, solution: solution.condition_numbers.amax(-1))

    @property
    def condition_number(self) -> Float[Tensor, "*batch"]:
        """The largest condition number, times those of the shifts between blocks.

        Errors of outputs, relative to the terms summed, seldom much exceed ``eps`` times this.
        """
        shifts = self.shift_condition_numbers
        if not self.solutions:
            return shifts.new_ones(shifts.shape[:-1])
        largest = self.condition_numbers.largest()
        if not shifts.shape[-1]:
            return largest
        between, last = shifts.tensor_split([-1], dim=-1)
        return torch.maximum(largest, last[..., 0]) * between.prod(-1)


@torch.no_grad()
@_checks.flushing()
def adapt(
    frozen: Transformer,
    target: Transformer,
    ranks: int | Mapping[str, int] | Segments[Tensor],
    *,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> TransformerAdaptation:
    """Adapters and vectors that make a transformer imitate another, segment by segment.

    Segments between non-linearities are deep linear networks (`Transformer.segments`). Two adapted
    neighbours come as near to the target's as their ranks allow by `linear.close`, or exactly in
    narrow heads: ``W_Q`` and ``W_K``, ``W_V`` and ``W_O``, and ``W_2`` and ``W_out`` at the end of
    a plain transformer. Weights with a segment of their own get ``ΔW_1 = LR_R(E) B⁺`` if they read
    tokens and ``ΔW_2 = Sᵀ LR_R(E)`` if they write; with rotary positions or grouped heads those are
    also ``W_Q`` and ``W_K``, and with grouped heads ``W_V`` and ``W_O`` [def-decoder].

    If plain, ``b̂_2 = W_2 c`` with ``W̄_2 c = b̄_2`` in all blocks but the last, where
    ``Ŵ_out b̂_2 = W̄_out b̄_2``; ``b̂_1 = b̄_1 + Σ_h (M̄ − M̂) c`` with the value–output segments
    ``M`` and the ``c`` before the block. Otherwise gains and shifts become the target's,
    ``b̂_1 = b̄_1 + (W̄_1 − Ŵ_1) s̄_2``, ``b̂_3`` likewise, ``b̂_O = b̄_O + Σ_h (M̄ − M̂) s̄_1``,
    and ``b̂_Q`` makes ``(Ŵ_K B)ᵀ (Ŵ_Q s̄_1 + b̂_Q)`` the target's; with segments of their own
    ``b̂_Q`` and ``b̂_K`` are made as ``b̂_1`` is. Vectors that the target lacks stay 0.

    Raises `SingularError` where a segment is not reached within ``rtol``, and `InputError` for
    ranks out of range, for transformers that do not fit, for a singular ``W_1`` or ``W_2`` if
    plain, for heads narrower than the tokens with less rank than they need
    (`bounds.transformer_ranks`) or wider than a narrower target's, and for a target whose
    ``Bᵀ W_Kᵀ W_Q B`` is so singular that no query bias completes its scores. Source:
    [thm-transformer], [thm-residual]; for narrow heads [prop-narrow-heads].

    Parameters
    ----------
    frozen, target : Transformer
        Of equal settings, sizes and type; batch shapes broadcast. Unless plain, the target may have
        narrower tokens (`Transformer.fill`). For others see `networks.rewriting`.
    ranks : int, mapping or Segments
        One for all, cut to each weight's smaller side; one for each kind of weight,
        `Transformer.adapted_kinds`; or `bounds.transformer_ranks`, the largest of each kind.
    rtol : float, optional
        Largest rounding error of a segment, relative to the product of its factors' norms plus the
        target's; by default half of the digits, ``inf`` accepts any.
    throw, seed
        See `linear.adapt`.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    throw = _checks.flag("throw", throw)
    _require_heads(frozen, target)
    cut = frozen.segments(target, throw=throw)
    finite = _all(cut.map(lambda _, gap: gap.finite))
    if not throw and not finite.all():
        frozen, target = frozen.zeroed(~finite), target.zeroed(~finite)
        cut = frozen.segments(target, throw=False)
    each = _heads.ranks_by_name(ranks, frozen)
    pairs = {name: {kind: each[kind] for kind in Segments.WEIGHTS[name]} for name in cut}
    for name in _WORDS:
        if throw and name in cut:
            _heads.require_ranks(cut[name], pairs[name])
    options: dict[str, Any] = {"rtol": rtol, "throw": throw, "seed": seed}
    solutions = {
        name: _heads.adapt(cut[name], pairs[name], words, **options)
        for name, words in _WORDS.items()
        if name in cut
    }
    by_kind: dict[str, list[LowRank]] = {}
    for name, gap in cut.items():
        updates = _updates(name, gap, pairs[name], solutions.get(name))
        for kind, update in zip(pairs[name], updates, strict=True):
            by_kind[kind] = _split(update, Segments.DIMENSIONS[name])
    updates = [
        by_kind[name.split()[0]].pop(0) if adapts else LowRank(w[..., :0], w.mT[..., :0])
        for name, w, adapts in zip(frozen.weight_names, frozen.weights, frozen.adapted, strict=True)
    ]
    sums = [w + update.matrix() for w, update in zip(frozen.weights, updates, strict=True)]
    adapted = frozen.holding(sums, frozen.biases)
    if frozen.is_plain:
        vectors, conditions = _plain_vectors(adapted, target, cut, solutions["value_output"])
    else:
        vectors, missed, size = _vectors(adapted, target, cut)
        conditions = finite.new_zeros(*finite.shape, 0, dtype=frozen.dtype)
        if "query_key" in cut:
            solutions["query_key"] = _complete(
                solutions["query_key"], cut.query_key, missed, size, rtol, throw
            )
    changes = [
        new - old
        for kind in frozen.bias_kinds
        for new, old in zip(
            frozen.one_by_one(kind, vectors[kind]),
            frozen.one_by_one(kind, frozen.parts[kind]),
            strict=True,
        )
    ]
    success = finite & frozen.is_regular(target)
    if solutions:
        success &= _all(Segments({name: part.success for name, part in solutions.items()}))

    def error(name: str, gap: Gap) -> Tensor:
        if name in solutions:
            return solutions[name].spectral_error + solutions[name].rounding_error
        return gap.error(sum(pairs[name].values()))

    return TransformerAdaptation(
        Adapters(tuple(updates), tuple(changes)),
        success,
        Segments(solutions),
        cut.map(error),
        conditions,
    )


def _all(verdicts: Segments[Tensor]) -> Bool[Tensor, "*batch"]:
    """Whether all of a network's verdicts are positive."""
    return ~verdicts.map(lambda _, good: ~good).largest()


def _updates(
    name: str, gap: Gap, ranks: Mapping[str, int], solution: LinearAdaptation | None
) -> list[LowRank]:
    """The updates of a segment's adapted weights, in their order."""
    if solution is None:
        (best,) = (gap.best(rank) for rank in ranks.values())
        before, after = gap.frozen.weights
        if name in ("sent", "outer"):
            return [LowRank(after.mT @ best.left, best.right)]
        return [LowRank(best.left, torch.linalg.pinv(before).mT @ best.right)]
    if gap.frozen.depth == 2:
        return [*solution.adapters.updates]
    _, first, second, _ = solution.adapters.updates
    if name == "query_key":
        second = LowRank(second.right, second.left)
    return [first, second]


def _split(update: LowRank, dims: int) -> list[LowRank]:
    """Updates of single weights, from one stacked over blocks and heads."""
    if not dims:
        return [update]
    factors = (f.flatten(-2 - dims, -3).unbind(-3) for f in (update.left, update.right))
    return [LowRank(A, B) for A, B in zip(*factors, strict=True)]


def _plain_vectors(
    adapted: Transformer,
    target: Transformer,
    cut: Segments[Gap],
    values: LinearAdaptation,
) -> tuple[dict[str, Tensor], Float[Tensor, "*batch _"]]:
    """Biases of a plain transformer, and the condition numbers of their systems."""
    batch = adapted.batch_shape
    # Where a system is singular its member fails, and its solution is not finite.
    shift = target.missing_shift().nan_to_num(0, 0, 0)
    shift = shift.expand(*batch, *shift.shape[-2:])
    wanted = target.W_out @ target.b_2[..., -1, :, None]
    last = lowrank.solve(adapted.W_out, wanted)[..., 0].nan_to_num(0, 0, 0)
    between = (adapted.W_2[..., :-1, :, :] @ shift[..., None])[..., 0]
    # Columns of a softmax sum to 1: what inexact segments make of the shift is constant.
    reached = values.adapters.merge(cut.value_output.frozen).product()
    missed = (cut.value_output.target.product() - reached).sum(-3)[..., 1:, :, :]
    b_1 = target.b_1.expand(*batch, *target.b_1.shape[-2:]).clone()
    b_1[..., 1:, :] += (missed @ shift[..., None])[..., 0]
    conditions = lowrank.condition_number(target.W_2)[..., :-1].expand(shift.shape[:-1])
    of_out = lowrank.condition_number(adapted.W_out)[..., None]
    vectors = {"b_1": b_1, "b_2": torch.cat([between, last[..., None, :]], -2)}
    return vectors, torch.cat([conditions, of_out], -1)


def _require_heads(frozen: Transformer, target: Transformer) -> None:
    """Refuse heads that are neither narrower than a narrower target nor as wide as the tokens."""
    shared = frozen.groups < frozen.heads
    for side in ("query size", "value size"):
        size = frozen.sizes[side]
        if shared or (side == "query size" and frozen.rotary is not None):
            continue
        if target.dimension < size < frozen.width and target.width < frozen.width:
            raise InputError(
                f"frozen's {side}",
                allowed=f"at most {target.dimension}, as a narrower target reads, or at least "
                f"{frozen.width}",
                given=size,
                remedy="no construction covers heads in between",
            )


def _vectors(
    adapted: Transformer, target: Transformer, cut: Segments[Gap]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Vectors of a transformer that is not plain, and what query biases miss, of which size."""
    extra = adapted.width - target.width

    def widened(vector: Tensor) -> Tensor:
        return pad(vector, (0, extra))

    # Norms divide by the root of the width.
    ratio = (target.width / adapted.width) ** 0.5
    vectors = {
        kind: widened(part) * (ratio if kind[0] == "g" else 1)
        for kind, part in target.parts.items()
        if kind[0] in "gs"
    }
    s_1, s_2 = (target.parts.get(kind, torch.zeros_like(target.b_O)) for kind in ("s_1", "s_2"))

    def applied(W: Tensor, s: Tensor) -> Tensor:
        return (W @ s[..., None])[..., 0]

    of_heads = widened(s_1).unsqueeze(-2)

    def completed(kind: str, s: Tensor, wider: Tensor) -> Tensor:
        weight, other = (getattr(network, kind.replace("b", "W")) for network in (target, adapted))
        return getattr(target, kind) + applied(weight, s) - applied(other, wider)

    for kind in ("b_1", "b_3"):
        if kind in target.kinds:
            vectors[kind] = completed(kind, s_2, widened(s_2))

    def written(vector: Tensor) -> Tensor:
        return adapted.fill(vector[..., None])[..., 0]

    vectors["b_2"] = written(target.b_2)
    target_values, values = (
        applied(network.W_O, network.each_head(applied(network.W_V, s), -2))
        for network, s in ((target, s_1.unsqueeze(-2)), (adapted, of_heads))
    )
    vectors["b_O"] = written(target.b_O) + (written(target_values) - values).sum(-2)
    if "query_key" not in cut:
        for kind in ("b_Q", "b_K"):
            if kind in target.kinds:
                vectors[kind] = completed(kind, s_1.unsqueeze(-2), of_heads)
        none = torch.zeros_like(values[..., 0])
        return vectors, none, none
    # Queries: what all keys are multiplied by, whatever the token.
    keys = cut.query_key.frozen.weights[3] @ adapted.W_K.mT
    scores = applied(
        cut.query_key.target.weights[3] @ target.W_K.mT,
        applied(target.W_Q, s_1.unsqueeze(-2)) + target.b_Q,
    )
    queries = applied(torch.linalg.pinv(keys), scores)
    vectors["b_Q"] = queries - applied(adapted.W_Q, of_heads)
    missed, size = (
        torch.linalg.vector_norm(v, dim=-1) for v in (applied(keys, queries) - scores, scores)
    )
    return vectors, missed, size


def _complete(
    solution: LinearAdaptation,
    gap: Gap,
    missed: Float[Tensor, "*batch blocks heads"],
    size: Float[Tensor, "*batch blocks heads"],
    rtol: float | None,
    throw: bool,
) -> LinearAdaptation:
    """The adaptation with what query biases missed added to its rounding errors."""
    rounding = solution.rounding_error + missed
    limit = torch.finfo(missed.dtype).eps ** 0.5 if rtol is None else rtol
    # Below the threshold the biases make up for the nearest that is reached.
    exact = solution.spectral_error <= gap.noise
    bad = exact & (missed > limit * (gap.rounding_scale + size))
    if throw and bad.any():
        block, head = bad.reshape(-1, *bad.shape[-2:]).nonzero()[0].tolist()[-2:]
        raise InputError(
            f"target's query–key product of block {block + 1}, head {head + 1}",
            allowed="non-singular on what norms let through",
            given=f"one whose scores no query bias completes, by {float(missed.max()):.1e}",
            remedy="perturb the target's W_Q and W_K",
        )
    return replace(solution, rounding_error=rounding, success=solution.success & ~bad)


@torch.no_grad()
def attention_only(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> Adapters:
    """Adapters of attention alone, and ``b_O``, of least error far out on single tokens.

    ``W_V`` and ``W_O`` take the singular triplets of the slope of `bounds.attention_floor` in turn.
    On normalized tokens ``W_O ΔW_V diag(g_1)`` is such a part, and so is ``ΔW_O Ŵ_V diag(g_1)``
    with what ``W_V`` has become. So the error tends to the floor. A total rank, by default any,
    goes to ``W_O`` of the first head of the first block.

    Raises what `bounds.attention_floor` raises, and `InputError` for batches, for heads narrower
    than the tokens, and for weights and gains that hide directions. Source: [prop-floor-attention],
    [thm-attention-rank].
    """
    best = attention_floor(frozen, target, tokens, ranks)
    _checks.single(frozen=frozen, target=target)
    if frozen.sizes["value size"] < frozen.width:
        raise InputError(
            "frozen",
            allowed="with heads as wide as the tokens",
            given=frozen.sizes["value size"],
            remedy="narrower ones cannot add every linear map",
        )
    V, values = frozen.basis(), frozen.W_V.clone()
    groups = values.shape[1]
    outputs = frozen.W_O.unflatten(1, (groups, -1)).sum(2)
    if ranks is None or isinstance(ranks, int | np.integer):
        rank = frozen.dimension if ranks is None else min(ranks, frozen.dimension)
        ranks = [rank * (name == "W_O of block 1, head 1") for name in frozen.weight_names]
    by_name = dict(zip(frozen.weight_names, ranks, strict=True))
    updates = {
        name: LowRank(w[:, :0], w.mT[:, :0])
        for name, w in zip(by_name, frozen.weights, strict=True)
    }
    left, S, right = lowrank.svd(best.slope @ V)
    left, offset = left * S, best.offset.clone()
    for kind in ("W_V", "W_O"):
        heads = [(name, rank) for name, rank in by_name.items() if name.startswith(kind)]
        for i, (name, rank) in enumerate(heads):
            l, h = divmod(i, len(heads) // frozen.depth)
            of_values = values[l, h * groups // frozen.heads]
            read = (frozen.g_1[l][:, None] * V).mT
            (out, left), (into, right) = ((f[:, :rank], f[:, rank:]) for f in (left, right))
            if not out.any():
                continue
            if kind == "W_V":
                into = _solve(read, into, f"gains before {name}")
                updates[name] = LowRank(_solve(outputs[l, h], out, f"partner of {name}"), into)
                of_values += updates[name].matrix()
            else:
                into = _solve(read @ of_values.mT, into, f"partner of {name}, or the gains")
                updates[name], into = LowRank(out, into), of_values.mT @ into
            offset -= out @ (into.mT @ frozen.s_1[l])
    changes = [torch.zeros_like(b) for b in frozen.biases]
    changes[frozen.bias_names.index("b_O of block 1")] = offset
    return Adapters(tuple(updates.values()), tuple(changes))


def _solve(matrix: Tensor, columns: Tensor, name: str) -> Tensor:
    """Least columns that a matrix maps to these; refused if there are none."""
    eps = torch.finfo(matrix.dtype).eps
    solution = torch.linalg.pinv(matrix, rtol=eps ** (2 / 3)) @ columns
    if (matrix @ solution - columns).norm() > eps**0.5 * columns.norm():
        raise InputError(
            f"frozen's {name}",
            allowed="of full rank",
            given="one that hides directions",
            remedy="perturb it",
        )
    return solution


def far_error(
    network: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    size: float,
    length: int = 1,
    *,
    seed: int = 0,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Mean squared error of far tokens ``c n``, ``‖n‖² = D``, and its standard error.

    Single tokens of all directions ``n``, or as many sequences of ``length`` drawn from them.
    Raises `InputError` for networks and tokens that do not fit, for a single token, and for a size
    ``c`` that leaves fewer than three digits of what a network adds to it.
    """
    n = directions(network, target, tokens)
    size, most = _checks.positive("size", size), 1e-3 / torch.finfo(n.dtype).eps
    if size > most:
        raise InputError("size", allowed=f"at most {most:.0e} in {n.dtype}", given=size)
    samples = _checks.integer("number of tokens", n.shape[-1], 2)
    length = _checks.integer("length", length, 1)
    x = size * n.mT[..., None]
    if length > 1:
        draw = randomness.generator(seed, "far sequences")
        x = size * n.mT[torch.randint(samples, (samples, length), generator=draw)].mT
    batch = len(torch.broadcast_shapes(network.batch_shape, target.batch_shape))
    x = x.reshape(len(x), *[1] * batch, *x.shape[-2:])
    each = (network(x) - target(x)).square().mean((-2, -1))
    return each.mean(0), each.std(0) / len(x) ** 0.5
