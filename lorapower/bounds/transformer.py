"""Ranks, thresholds and errors of adapted transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..errors import InputError
from ..networks._segments import Segments, pair_ranks, require_alike
from ..networks.gap import Gap
from ..networks.transformer import Norm, Transformer
from ..regression import reduced_rank
from ._propagation import Maps, follow_plain, follow_stream

# Least dimension of normalized tokens for the statements on ReLUs.
_LEAST = 3


def transformer_ranks(frozen: Transformer, target: Transformer) -> Segments[Tensor]:
    """The least rank on adapted weights for exact segments [thm-transformer], [thm-residual].

    With ``E`` the difference of the segments it is ``⌈rank(E)/2⌉`` for two weights, both equally,
    more only for heads narrower than the tokens [prop-narrow-heads] (others count as non-singular);
    and ``rank E`` for one, such as ``inner`` and ``outer``: for the difference that other kinds of
    heads make see `Segments`. ``[..., L, H]`` for heads, each by itself (for all in one matrix see
    `packed_rank`), ``[..., L]`` for blocks, as `constructions.transformer.adapt` takes them.
    Raises what `Transformer.segments` raises.
    """
    _checks.kind(Transformer, frozen=frozen)

    def least(name: str, gap: Gap) -> Tensor:
        if len(Segments.WEIGHTS[name]) == 1:
            return gap.rank
        if gap.frozen.depth == 2:
            return gap.threshold
        pair = pair_ranks(gap)
        return torch.stack([pair.inner, pair.outer, -(-pair.together // 2)]).amax(0)

    return frozen.segments(target).map(least)


def transformer_threshold(frozen: Transformer, target: Transformer) -> Int[Tensor, "*batch"]:
    """The rank that is enough for all segments, the largest of `transformer_ranks`.

    If plain, ``⌈r/2⌉`` with ``r`` the largest rank of a difference, unless heads are narrow.
    """
    return transformer_ranks(frozen, target).largest()


def transformer_errors(frozen: Transformer, target: Transformer, rank: int) -> Segments[Tensor]:
    """``ε = σ_{r+1}(E)`` of each segment when all adapted weights have at most this rank.

    ``r`` sums the segment's ranks, each cut to its weight's smaller side. For heads narrower than
    the tokens ``ε`` is 0, or infinite if the rank is too low. Raises what
    `Transformer.segments` raises, and `InputError` for a rank outside 0 to the width. Source:
    [thm-transformer], [thm-residual], [prop-narrow-heads].
    """

    def left(_: str, part: tuple[Gap, int, Tensor]) -> Tensor:
        gap, total, lost = part
        return torch.where(lost, torch.inf, gap.error(total))

    return _reached(frozen, target, rank).map(left)


def _reached(
    frozen: Transformer, target: Transformer, rank: int
) -> Segments[tuple[Gap, int, Bool[Tensor, "*batch"]]]:
    """Each segment's gap, its total rank, and whether narrow heads have less than they need."""
    _checks.kind(Transformer, frozen=frozen)
    cut = frozen.segments(target)
    rank = _checks.integer("rank", rank, 0, frozen.width, limit="the width")

    def of(name: str, gap: Gap) -> tuple[Gap, int, Tensor]:
        never = torch.zeros(gap.batch_shape, dtype=torch.bool, device=frozen.device)
        if len(Segments.WEIGHTS[name]) == 1:
            return gap, rank, never
        if gap.frozen.depth == 2:
            return gap, sum(gap.ranks([rank, rank])), never
        _, width, size, *_ = gap.frozen.widths
        if size >= width:
            return gap, sum(gap.ranks([0, rank, rank, 0])), never
        own, pair = min(rank, size), pair_ranks(gap)
        lost = torch.maximum(pair.inner, pair.outer) > own
        return gap, width, lost | (pair.together > 2 * own)

    return cut.map(of)


def transformer_error(
    frozen: Transformer,
    target: Transformer,
    rank: int,
    x: Float[Tensor, "*#batch width n"],
) -> Float[Tensor, "*batch"]:
    """A bound of the largest error ``‖f(x)_j − f̄(x)_j‖_2`` of a token, for each sequence ``x``.

    ``f`` has the best adapters of this rank on all weights that `constructions.transformer.adapt`
    adapts, so its segments lack ``E − LR_r(E)``. The bound calculates with these matrices and with
    the tokens of the target, and passes from block to block only how far each token may be off. So
    with one block it is the error itself. What comes in moves the patterns within intervals; what
    leaves a norm has turned by at most ``t = δ / (‖z̃‖² + D ε)^{1/2}``, the sine of an angle. Heads
    too narrow for the rank make it infinite. For any network with the vectors of the construction,
    take it as ``frozen`` and rank 0. Rounding is left out.

    It takes a run of the target, and ``N²`` distances for each head. Raises what
    `Transformer.segments` raises, and `InputError` for a narrower target and a rank outside 0 to
    the width. Source: [prop-transformer-error], [prop-residual-error].
    """
    reached = _reached(frozen, target, rank)
    if target.width < frozen.width:
        raise InputError(
            "target's width",
            allowed=f"{frozen.width}, as in the frozen network",
            given=target.width,
            remedy="networks.rewriting.enlarge writes it so",
        )
    z = target.as_inputs(x)
    maps = reached.map(lambda _, part: Maps(part[0].target.product(), part[0].undone(part[1])))
    off = (follow_plain if target.is_plain else follow_stream)(target, maps, z)
    lost = reached.map(lambda _, part: part[2]).largest()
    return torch.where(lost, torch.inf, off.length.amax(-1))


def inner_rank(
    width: int,
    hidden: int,
    *,
    activation: Literal["relu", "gelu", "silu"] = "relu",
    norm: Norm = "layer",
    gains: bool = True,
    weight: Literal["W_1", "W_3"] = "W_1",
) -> int:
    """A rank that each ``W_1`` needs for exactness, for almost all frozen weights [thm-inner-rank].

    The least ``r`` with ``(F − r)(m − r) ≤ F`` for ReLUs, ``≤ 0`` for others, or ``≤ F + D − 1``
    and ``≤ D`` if gains are tuned; ``m = D − 1`` under a LayerNorm, ``D`` under an RMSNorm, with
    width ``D`` and ``F`` hidden units. With enough hidden units it is ``m − 1`` for ReLUs and ``m``
    for others, and is attained (`networks.rewriting.align`). In gated layers ``W_1`` is the gate,
    and ``W_3`` needs what ``W_1`` needs with ReLUs, whatever the activation [thm-gated-rank]. Both
    networks have equal depth and equally many hidden units, or the deeper frozen one makes each
    target unit in one block, and ``F`` is the target's [thm-depth]; no two normals in a target's
    block are parallel. Nothing is proved of ``"gelu_tanh"``.

    Raises `InputError` where normalized tokens have fewer than three dimensions.
    """
    width, hidden = _checks.integer("width", width, 1), _checks.integer("hidden", hidden, 1)
    _checks.choice("activation", activation, ("relu", "gelu", "silu"))
    _checks.choice("norm", norm, get_args(Norm))
    gains = _checks.flag("gains", gains)
    _checks.choice("weight", weight, ("W_1", "W_3"))
    m = width - (norm == "layer")
    _require_sphere(m, width)
    rescaled = activation == "relu" or weight == "W_3"
    free = hidden + gains * (width - 1) if rescaled else gains * width
    return next(r for r in range(m + 1) if (hidden - r) * (m - r) <= free or r >= hidden)


def packed_rank(
    width: int,
    heads: int,
    head_size: int,
    *,
    part: Literal["scores", "values"] = "scores",
    groups: int | None = None,
    rotary: bool = False,
    norm: Norm = "rms",
) -> int:
    """A rank that two packed weights of attention need, both equally [thm-packed].

    ``W_Q`` and ``W_K`` (``"scores"``), or ``W_V`` and ``W_O`` (``"values"``), of all heads in one
    matrix, as PEFT adapts them: the least ``R`` with ``(p − R)(m − R) + (p' − R)(m' − R) ≤ γ``,
    where a factor below 0 counts as 0, and ``2 R ≥ min(2 d, m)``. ``W_Q`` and ``W_O`` have ``H d``
    rows or columns, ``W_K`` and ``W_V`` ``d`` for each group; the other side is the dimension of
    normalized tokens, or the width for ``W_O``; ``γ`` is ``d²`` for each group, and ``d`` for
    scores with rotary positions. It holds for almost all frozen weights; a rank above a weight's
    side means that all of it changes.
    """
    width, heads = _checks.integer("width", width, 1), _checks.integer("heads", heads, 1)
    d = _checks.integer("head_size", head_size, 1)
    groups = heads if groups is None else _checks.integer("groups", groups, 1, heads)
    if heads % groups:
        raise InputError("heads", allowed=f"a multiple of {groups}, the groups", given=heads)
    _checks.choice("part", part, ("scores", "values"))
    _checks.choice("norm", norm, get_args(Norm))
    m, scores = width - (norm == "layer"), part == "scores"
    free = groups * (d if _checks.flag("rotary", rotary) and scores else d * d)
    sides = ((heads * d, m if scores else width), (groups * d, m))

    def lacking(R: int) -> int:
        return sum(max(0, rows - R) * max(0, columns - R) for rows, columns in sides)

    alone = -(-min(2 * d, m) // 2)
    return next(R for R in range(alone, width + 1) if lacking(R) <= free)


class AttentionFloor(NamedTuple):
    """What is left where only attention is adapted.

    ``value`` is ``min E‖Y(n) − K n − k‖² / D`` over matrices ``K`` of the given rank and vectors
    ``k``, and ``standard_error`` its spread over tokens, each ``[...]``. The best ``K``, which
    attention has to add, is ``slope``, ``[..., D, D]``, and ``k`` is ``offset``, ``[..., D]``.
    """

    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    slope: Float[Tensor, "*batch width width"]
    offset: Float[Tensor, "*batch width"]


def attention_floor(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> AttentionFloor:
    """The least error of far single tokens with frozen feed-forward layers [prop-floor-attention].

    With ``Y(n) = lim f̄(c n) − f(c n)`` for frozen ``f`` and target ``f̄``, and whatever attention,
    ``b_O`` and ``b_2`` become: as tokens ``c n`` grow, the limit of the mean squared error is at
    least what the best affine map leaves of ``Y``. Adapters of limited rank, at frozen first gains,
    change its slope by a matrix of their total rank [thm-attention-rank]. This bounds the largest
    error over sizes of tokens, not the mean at one size. It is exact for the mean over these
    directions; for others of their kind it is too low, by about one part in
    ``samples / (r (D + m − r) / D + 1)`` at rank ``r``.

    The networks have equal width, norm and activation, any depth and no final norm. Raises
    `InputError` for networks and ranks that do not fit, too few tokens, and constant ones.

    Parameters
    ----------
    tokens : Tensor
        Directions as columns, more than ``m + 1``, which span the space of normalized tokens.
    ranks : int or sequence of int, optional
        The total rank of all ``W_V`` and ``W_O``, or the rank of each of ``frozen.weights``, as by
        `Transformer.ranks`. By default any rank.
    """
    n = directions(frozen, target, tokens)
    m, rank = target.dimension, _total_rank(frozen, ranks)
    inner, samples = target.basis().mT @ n, n.shape[-1]
    if samples <= m + 1:
        raise InputError("tokens", allowed=f"more than {m + 1}", given=samples)
    if lowrank.rank(inner - inner.mean(-1, keepdim=True)) < m:
        allowed = "of directions that span all that norms let through"
        raise InputError("tokens", allowed=allowed, given="some that do not")
    single = _sequences(n.mT[..., None], frozen, target)
    gap = (_added(target, single) - _added(frozen, single))[..., 0].movedim(0, -1)
    fit = reduced_rank(gap, inner, min(rank, m))
    left = (gap - fit.update.matrix() @ inner - fit.intercept[..., None]).square().mean(-2)
    return AttentionFloor(
        left.mean(-1),
        left.std(-1) / samples**0.5,
        fit.update.matrix() @ target.basis().mT,
        fit.intercept,
    )


def _total_rank(network: Transformer, ranks: int | Sequence[int] | None) -> int:
    """The rank that adapters of all ``W_V`` and ``W_O`` have together; none given means any."""
    if ranks is None or (not isinstance(ranks, Sequence) and np.ndim(ranks) == 0):
        return _checks.integer("ranks", network.width if ranks is None else ranks, 0)
    each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in network.weights])
    names = zip(network.weight_names, each, strict=True)
    return sum(rank for name, rank in names if name.startswith(("W_V", "W_O")))


class FeedForwardFloor(NamedTuple):
    """What is left where only feed-forward layers are adapted, with its standard error."""

    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]


def feed_forward_floor(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    length: int,
    *,
    seed: int = 0,
) -> FeedForwardFloor:
    """The least mean error of far sequences with frozen attention [prop-floor-feed-forward].

    Whatever feed-forward layers and second norms become, of any size: as all tokens of sequences
    grow, the limit of the mean squared error is at least ``E tr Cov(Δ_j | n_j) / D``. Here ``Δ_j``
    is what the target's attention adds to token ``j`` minus what the frozen one adds. The estimate
    is unbiased for sequences whose tokens are drawn independently from ``tokens``: half the mean
    squared difference of ``Δ`` for one token in two sequences, at random places.

    The networks have equal width, norm and activation, any depth and no final norm. Raises
    `InputError` for networks that do not fit, fewer than two tokens, and constant ones.

    Parameters
    ----------
    tokens : Tensor
        Directions as columns; each is put into two sequences.
    length : int
        The number of tokens of a sequence; with one the floor is 0.
    """
    n = directions(frozen, target, tokens)
    samples = _checks.integer("number of tokens", n.shape[-1], 2)
    length = _checks.integer("length", length, 1)
    draw = randomness.generator(seed, "contexts")
    own = torch.arange(samples, device=n.device)[:, None]
    sides = []
    for _ in range(2):
        chosen = torch.randint(samples, (samples, length), generator=draw).to(n.device)
        place = torch.randint(length, (samples, 1), generator=draw).to(n.device)
        x = _sequences(n.mT[chosen.scatter(1, place, own)].mT, frozen, target)
        gap = _added(target, x, attention_only=True) - _added(frozen, x, attention_only=True)
        index = place.reshape(samples, *[1] * (gap.ndim - 1)).expand(*gap.shape[:-1], 1)
        sides.append(gap.gather(-1, index)[..., 0])
    each = (sides[0] - sides[1]).square().mean(-1) / 2
    return FeedForwardFloor(each.mean(0), each.std(0) / samples**0.5)


def directions(
    frozen: Transformer, target: Transformer, tokens: Float[Tensor, "width samples"]
) -> Float[Tensor, "width samples"]:
    """Tokens on the sphere ``‖n‖² = D``; raises `InputError` where the networks' spheres differ."""
    _checks.kind(Transformer, frozen=frozen, target=target)
    for name, network in (("frozen", frozen), ("target", target)):
        if network.norm is None or not network.residual:
            words = "with residual connections and norms"
            raise InputError(name, allowed=words, given=network)
        if network.final_norm:
            raise InputError(
                name,
                allowed="without a final norm",
                given="one",
                remedy="with it outputs for far tokens differ less and less; "
                "from_decoder can leave it out",
            )
    require_alike(target, frozen, ("norm", "activation"), ("width",))
    _require_sphere(target.dimension, target.width)
    v = target.as_inputs(tokens, "tokens")
    if v.ndim != 2:
        raise InputError("tokens", allowed="of shape [width, samples]", given=tuple(v.shape))
    rounding = 16 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if target.norm == "layer":
        v = v - v.mean(-2, keepdim=True)
    size = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if not (size > rounding).all():
        raise InputError("tokens", allowed="of different coordinates", given="one without variance")
    return v / size * target.width**0.5


def _sequences(x: Tensor, *networks: Transformer) -> Tensor:
    """Sequences ``[samples, width, N]`` with a dimension for each of the networks' batch."""
    batch = torch.broadcast_shapes(*(network.batch_shape for network in networks))
    return x.reshape(len(x), *[1] * len(batch), *x.shape[1:])


def _added(network: Transformer, n: Tensor, *, attention_only: bool = False) -> Tensor:
    """What blocks, or their attention, add to far tokens of these directions."""
    # Far out, norms see directions alone.
    limit, added = replace(network, eps=0.0), torch.zeros_like(n)
    for l in range(network.depth):
        patterns = limit.patterns(limit.scores(l, limit.reads(n, "1", l)))
        added = added + (limit.attend(l, n, patterns) - n)
        if not attention_only:
            added = added + (limit.feed_forward(l, n, limit.hidden(l, n)) - n)
    return added


def _require_sphere(m: int, width: int) -> None:
    if m < _LEAST:
        raise InputError(
            "width",
            allowed=f"such that normalized tokens span at least {_LEAST} dimensions",
            given=f"{width}, with {m}",
            remedy="on a circle or two points kinks of different units meet",
        )
