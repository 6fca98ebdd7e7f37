"""Ranks, thresholds and errors of adapted transformers."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.gap import Gap
from ..networks.segmentation import Segments, segments
from ..networks.transformer import Norm, Transformer

Unit = Literal["W_1", "W_3", "W_2"]


def transformer_ranks(frozen: Transformer, target: Transformer) -> Segments[Tensor]:
    """Find the least ranks that make segments exact [thm-transformer], [thm-residual].

    Where a segment differs by ``E``: ``⌈rank(E)/2⌉`` for two weights, more for heads narrower than
    the tokens [prop-narrow-heads], and ``rank E`` for one. ``[..., L, H]`` for heads, each by
    itself, and ``[..., L]`` for blocks; `Segments.largest` is enough for all. Raises what
    `networks.segments` raises.
    """

    def least(name: str, gap: Gap) -> Tensor:
        if len(Segments.WEIGHTS[name]) == 1:
            return gap.rank
        if gap.frozen.depth == 2:
            return gap.threshold
        pair = gap.pair_ranks
        return torch.stack([pair.inner, pair.outer, -(-pair.together // 2)]).amax(0)

    return segments(frozen, target).map(least)


def transformer_error(
    frozen: Transformer, target: Transformer, rank: int, x: Float[Tensor, "*#batch width n"]
) -> Float[Tensor, "*batch"]:
    """Compute the largest error ``max_j ‖f(x)_j − f̄(x)_j‖_2`` of a token, for each sequence ``x``.

    ``f`` has the segments that adapters of this rank make, ``M̂ = M − (E − LR_r(E))``; it is run
    without any adapter [ass-heads]. The error is infinite where nothing is known: where narrow
    heads get less rank than they need, or a frozen product that has to change is singular
    [ass-regular]. Raises what `networks.segments` raises, and `InputError` for a rank outside 0 to
    the width. Source: [prop-transformer-error], [prop-residual-error].
    """
    rank = _checks.integer("rank", rank, 0, frozen.width, limit="the width")
    cut = segments(frozen, target)
    reached = cut.map(lambda name, gap: _reached(name, gap, rank))
    network = _assemble(target, cut.map(lambda name, gap: gap.reached(reached[name][0])))
    unknown = reached.map(lambda _, part: part[1]).largest()
    largest = torch.linalg.vector_norm(network(x) - target(x), dim=-2).amax(-1)
    return torch.where(unknown, torch.inf, largest)


def _assemble(target: Transformer, products: Segments[Tensor]) -> Transformer:
    """Make a transformer with these products of its segments, and all else the target's."""
    if target.is_plain:
        return _assemble_plain(target, products)
    first, second = (torch.linalg.pinv(B) for B in target.readings)
    ignores_means = target.settings.final_norm and target.settings.norm == "layer"
    back = target.basis() if ignores_means else torch.eye(target.width).to(first)
    weights = {"W_1": products.inner @ second, "W_2": back @ products.outer}
    if target.settings.gated:
        weights["W_3"] = products.up @ second
    if paired := "query_key" in products:
        weights["W_Q"] = products.query_key @ first
        weights["W_K"] = first.expand(*products.query_key.shape[:-2], -1, -1)
    else:
        weights |= {"W_Q": products.query @ first, "W_K": products.key @ first}
    if "value_output" in products:
        weights["W_V"] = first.expand(*products.value_output.shape[:-2], -1, -1)
        weights["W_O"] = back @ products.value_output
    else:
        weights |= {"W_V": products.value @ first, "W_O": back @ products.sent}
    network = Transformer(weights, target.settings)
    vectors = network.vectors_like(target, paired=paired)
    if paired:
        s = target.shifts[0].unsqueeze(-2)
        keys = (target.W_K @ target.readings[0]).mT
        wanted = lowrank.times(keys, lowrank.times(target.W_Q, s) + target.b_Q)
        vectors["b_Q"] = wanted - lowrank.times(network.W_Q, s)
    return network.replace(**vectors)


def _assemble_plain(target: Transformer, products: Segments[Tensor]) -> Transformer:
    shift, outputs = target.missing_shift, target.W_out.shape[-2]
    identity = torch.eye(target.width).to(shift)
    of_heads = identity.expand(products.query_key.shape)
    of_blocks = of_heads[..., 0, :, :]
    end = pad(products.output, (0, 0, 0, target.width - outputs))
    constant = pad(lowrank.times(target.W_out, target.b_2[..., -1, :]), (0, target.width - outputs))
    # The first bias has what the target's heads make of the shift and this network's do not.
    sent = target.b_2[..., :-1, None, :]
    for W in (target.W_V, target.W_O):
        sent = lowrank.times(W[..., 1:, :, :, :], sent)
    wanted = lowrank.times(target.W_1[..., 1:, :, :], sent.sum(-2))
    missing = wanted - lowrank.times(products.value_output.sum(-3)[..., 1:, :, :], shift)
    return Transformer(
        {
            "W_Q": products.query_key,
            "W_K": of_heads,
            "W_V": of_heads,
            "W_O": products.value_output,
            "W_1": of_blocks,
            "b_1": target.b_1 + pad(missing, (0, 0, 1, 0)),
            "W_2": torch.cat([of_blocks[..., 1:, :, :], end[..., None, :, :]], -3),
            "b_2": torch.cat([shift, constant[..., None, :]], -2),
            "W_out": identity[:outputs],
        },
        target.settings,
    )


def _reached(name: str, gap: Gap, rank: int) -> tuple[int, Bool[Tensor, "*batch"]]:
    """Sum a segment's ranks; say whether its product may be out of reach."""
    never = torch.zeros_like(gap.rank, dtype=torch.bool)
    if len(Segments.WEIGHTS[name]) == 1:
        return rank, never
    inputs, width, size = gap.frozen.widths[:3]
    if gap.frozen.depth == 2 or size >= width:
        limit = 1 / (max(inputs, width) * torch.finfo(gap.frozen.dtype).eps)
        singular = lowrank.condition_number(gap.frozen.product()) > limit
        total = [rank, rank] if gap.frozen.depth == 2 else [0, rank, rank, 0]
        return sum(gap.ranks(total)), singular & (gap.rank > 0)
    own, pair = min(rank, size), gap.pair_ranks
    too_low = torch.maximum(pair.inner, pair.outer) > own
    return width, too_low | (pair.together > 2 * own)


def necessary_ranks(target: Transformer, *, packed: bool = False) -> dict[str, int]:
    """Count the ranks below which no adapters make a whole network equal to the target [cor-whole].

    Returns a rank for each kind of weight, by which two weights of attention count equally, for
    almost all frozen networks; [cor-whole] has the conditions on the target, which a tuned one does
    not meet. `transformer_ranks` says what is enough. Raises `InputError` for networks other than
    pre-norm ones without a final norm, for ``"gelu_tanh"``, for packed heads that are larger than
    what they read, and for normalized tokens of fewer than three dimensions.

    Parameters
    ----------
    packed : bool
        Whether one adapter serves all heads of a weight, as PEFT has it; by default each head has
        its own.
    """
    _checks.kind(Transformer, target=target)
    settings, sizes = target.settings, target.sizes
    if settings.norm is None or not settings.residual or settings.final_norm:
        words = "with residual connections and norms, but no final norm"
        raise InputError("target", allowed=words, given=target)
    H, groups = (target.heads, target.groups) if packed else (1, 1)
    about: Any = {"groups": groups, "norm": settings.norm}
    about |= {"rotary": settings.rotary is not None}
    d, size = sizes["query size"], sizes["value size"]
    scores = packed_rank(target.width, H, d, **about)
    # Of packed heads that are larger than what they read nothing is proved.
    seen = size if packed else min(size, target.dimension)
    values = packed_rank(target.width, H, seen, part="values", **about)
    ranks = {
        "W_Q": min(scores, H * d),
        "W_K": min(scores, groups * d),
        "W_V": min(values, groups * size),
        "W_O": min(values, H * size),
    }
    layer: Any = {"activation": settings.activation, "norm": settings.norm}
    layer |= {"gated": settings.gated}
    units: tuple[Unit, ...] = ("W_1", "W_3", "W_2") if settings.gated else ("W_1", "W_2")
    return ranks | {w: unit_rank(target.width, sizes["hidden"], weight=w, **layer) for w in units}


def unit_rank(
    width: int,
    hidden: int,
    *,
    weight: Unit = "W_1",
    activation: Literal["relu", "gelu", "silu"] = "relu",
    norm: Norm = "layer",
    gated: bool = False,
) -> int:
    """Count a rank that each feed-forward weight needs, for almost all frozen ones [cor-whole].

    With ``F`` hidden units, width ``D``, and ``m = D − 1`` under a LayerNorm or ``D`` under an
    RMSNorm, it is the least ``r`` with ``(F − r)(m − r) ≤ F``, or ``≤ 0`` for ``W_1`` without ReLUs
    [thm-inner-rank]; ``W_1`` is the gate of gated layers, and ``W_3`` counts as with ReLUs
    [thm-gated-rank]. ``W_2`` has ``D`` for ``m``, and ``≤ 0`` in ungated layers without ReLUs.
    Gains are frozen. Raises `InputError` where normalized tokens have fewer than three dimensions,
    and for ``"gelu_tanh"``, of which nothing is proved.
    """
    width, hidden = _checks.integer("width", width, 1), _checks.integer("hidden", hidden, 1)
    _checks.choice("activation", activation, ("relu", "gelu", "silu"))
    _checks.choice("norm", norm, get_args(Norm))
    _checks.choice("weight", weight, ("W_1", "W_3", "W_2") if gated else ("W_1", "W_2"))
    m = width - 1 if norm == "layer" else width
    # On a circle or two points kinks of different units meet.
    _checks.integer("dimension of normalized tokens", m, 3)
    rescaled = activation == "relu" or (gated and weight != "W_1")
    free = hidden if rescaled else 0
    side = width if weight == "W_2" else m
    return next(r for r in range(side + 1) if (hidden - r) * (side - r) <= free)


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
    """Count a rank that two packed weights of attention need, both equally [thm-packed].

    ``W_Q`` and ``W_K`` (``"scores"``), or ``W_V`` and ``W_O`` (``"values"``), of all heads in one
    matrix: the least ``R`` with ``(p − R)(q − R) + (p' − R)(q' − R) ≤ γ``, where a factor below 0
    counts as 0, and ``2 R ≥ min(2 d, m)``. The sides ``p`` are ``H d`` of ``W_Q`` and ``W_O`` and
    ``d`` for each group of ``W_K`` and ``W_V``; ``q`` is the width for ``W_O``, otherwise the
    dimension ``m`` of normalized tokens; ``γ`` is ``d²`` for each group, ``d`` for rotary scores.
    Raises `InputError` for numbers out of range, and for values of heads larger than ``m``.
    """
    width, heads = _checks.integer("width", width, 1), _checks.integer("heads", heads, 1)
    d = _checks.integer("head_size", head_size, 1)
    groups = heads if groups is None else _checks.integer("groups", groups, 1, heads)
    if heads % groups:
        raise InputError("heads", allowed=f"a multiple of {groups}, the groups", given=heads)
    _checks.choice("part", part, ("scores", "values"))
    _checks.choice("norm", norm, get_args(Norm))
    m = width - 1 if norm == "layer" else width
    if part == "values" and d > m:
        # The rows of W_V are dependent on what is read, and W_O is not determined.
        raise InputError("head_size", allowed=f"at most {m} for values, what is read", given=d)
    free = groups * (d if rotary and part == "scores" else d * d)
    sides = ((heads * d, m if part == "scores" else width), (groups * d, m))

    def missing(R: int) -> int:
        return sum(max(0, rows - R) * max(0, columns - R) for rows, columns in sides)

    alone = -(-min(2 * d, m) // 2)
    return next(R for R in range(alone, width + 1) if missing(R) <= free)
