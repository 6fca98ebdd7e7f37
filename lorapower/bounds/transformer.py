"""Ranks, thresholds and errors of adapted transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.alignment import savable
from ..networks.gap import Gap
from ..networks.segmentation import Segments, segments
from ..networks.transformer import Norm, Transformer


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

    ``f`` is plain and has the segments that adapters of this rank make, ``M̂ = M − (E − LR_r(E))``;
    it is run without any adapter. The error is infinite where nothing is known: where narrow heads
    get less rank than they need, or a frozen product that has to change is singular [ass-regular].
    Raises what `networks.segments` raises, and `InputError` for a rank outside 0 to the width and
    for transformers with residual connections or norms. Source: [prop-transformer-error].
    """
    rank = _checks.integer("rank", rank, 0, frozen.width, limit="the width")
    cut = segments(frozen, target)
    if not target.is_plain:
        allowed = "plain, without residual connections and norms"
        raise InputError("target", allowed=allowed, given=target)
    reached = cut.map(lambda name, gap: _reached(name, gap, rank))
    network = _assemble(target, cut.map(lambda name, gap: gap.reached(reached[name][0])))
    unknown = reached.map(lambda _, part: part[1]).largest()
    largest = torch.linalg.vector_norm(network(x) - target(x), dim=-2).amax(-1)
    return torch.where(unknown, torch.inf, largest)


def _assemble(target: Transformer, products: Segments[Tensor]) -> Transformer:
    """Make a transformer with these products of its segments, and all else the target's."""
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
    inputs, width, size = gap.frozen.widths[:3]
    if gap.frozen.depth == 2 or size >= width:
        limit = 1 / (max(inputs, width) * torch.finfo(gap.frozen.dtype).eps)
        singular = lowrank.condition_number(gap.frozen.product()) > limit
        total = [rank, rank] if gap.frozen.depth == 2 else [0, rank, rank, 0]
        return sum(gap.ranks(total)), singular & (gap.rank > 0)
    own, pair = min(rank, size), gap.pair_ranks
    too_low = torch.maximum(pair.inner, pair.outer) > own
    return width, too_low | (pair.together > 2 * own)


class _Region(NamedTuple):
    """The ranks of [thm-needed] for one shape."""

    #: Of the two weights of a product their names, the rank of both, and the least of the second.
    pairs: tuple[tuple[str, str, int, int], ...]
    #: The full rank of each feed-forward weight.
    full: dict[str, int]
    #: The weights on which a rank can be saved, and on how many at once.
    savable: tuple[list[str], int]


def _region(network: Transformer) -> _Region:
    """Find the region of a shape; refuse shapes of which nothing is proved."""
    _checks.kind(Transformer, network=network)
    settings, sizes = network.settings, network.sizes
    if settings.norm is None or not settings.residual:
        raise InputError("network", allowed="with residual connections and norms", given=network)
    _checks.choice("activation", settings.activation, ("relu", "gelu", "silu"))
    # On a circle or two points kinks of different units meet.
    m = _checks.integer("dimension of normalized tokens", network.dimension, 3)
    # A final LayerNorm hides one direction of what is written.
    written = m if settings.final_norm else network.width
    d, value = sizes["query size"], sizes["value size"]
    pairs = (
        ("W_Q", "W_K", min(2 * d, m), 0),
        ("W_V", "W_O", min(2 * value, m), min(value, max(0, written - value))),
    )
    full = {"W_1": m} | ({"W_3": m} if settings.gated else {}) | {"W_2": written}
    kinds, count = savable(settings)
    least = max(written, 1 + sum(full[kind] - 1 for kind in kinds))
    _checks.integer("number of hidden units", sizes["hidden"], least)
    return _Region(pairs, full, (kinds, count))


def ranks_suffice(network: Transformer, ranks: Mapping[str, int]) -> bool:
    """Say whether adapters of these ranks make almost all pairs of networks equal [thm-needed].

    Both networks have the shape of ``network``, whose numbers do not matter; one adapter serves one
    head, gains and shifts are frozen, biases are tuned. With ``S`` the width, or ``m`` under a
    final LayerNorm, and ``F`` hidden units the ranks are enough if and only if

    - ``R_Q + R_K ≥ min(2 d, m)``, where no rank counts for more than the head size ``d``;
    - ``R_V + R_O ≥ min(2 d, m)`` in the same way, and ``R_O ≥ min(d, max(0, S − d))``;
    - ``W_1`` and ``W_3`` have rank ``m`` and ``W_2`` rank ``S``, but for one rank less on one of
      ``W_1`` and ``W_2`` with ReLUs, on one of ``W_3`` and ``W_2`` with gated GELUs or SiLUs, and
      on any two of the three with gated ReLUs.

    With ReLUs this holds for targets all of whose hyperplanes meet the sphere of normalized tokens.
    `constructions.transformer.adapt` makes such networks equal. Raises `InputError` for networks
    without residual connections or norms, with rotary positions, grouped heads, ``"gelu_tanh"``,
    fewer than three dimensions of normalized tokens, or fewer units than the theorem asks
    (``m + S − 1``; ``2 m + S − 2`` with gated ReLUs, ``S`` with GELUs or SiLUs without gates); and
    for ranks of other weights, or below 0.
    """
    region = _region(network)
    if network.settings.rotary is not None or network.groups < network.heads:
        allowed = "without rotary positions and grouped heads"
        raise InputError("network", allowed=allowed, given=network)
    if set(ranks) != set(network.weight_kinds):
        allowed = f"one rank for each of {', '.join(network.weight_kinds)}"
        raise InputError("ranks", allowed=allowed, given=sorted(map(str, ranks)))
    given = {kind: _checks.integer(f"rank of {kind}", ranks[kind], 0) for kind in ranks}
    for first, second, both, least in region.pairs:
        R, other = (min(given[k], *network.parameters[k].shape[-2:]) for k in (first, second))
        if other < least or R + other < both:
            return False
    lacking = {kind: full - given[kind] for kind, full in region.full.items() if given[kind] < full}
    kinds, count = region.savable
    return len(lacking) <= count and all(k in kinds and rank == 1 for k, rank in lacking.items())


def necessary_ranks(network: Transformer, *, packed: bool = False) -> dict[str, int]:
    """Find ranks none of which can be lowered alone, for almost all networks of a shape.

    Without rotary positions and grouped heads they are also enough [thm-needed]: of two weights of
    a product both have half of the rank, as far as possible, and feed-forward layers save ranks on
    ``W_1`` and ``W_3`` first. Otherwise attention has the counts of `packed_rank`, below which
    equal ranks of two weights are too low [thm-packed]. A tuned target may need much less:
    `transformer_ranks`. Raises `InputError` as `ranks_suffice` does, for packed heads that are
    larger than what they read, and for packed heads under a final LayerNorm.

    Parameters
    ----------
    packed : bool
        Whether one adapter serves all heads of a weight, as PEFT has it; by default each head has
        its own.
    """
    region, settings = _region(network), network.settings
    ranks: dict[str, int] = {}
    if packed and settings.final_norm and settings.norm == "layer":
        raise InputError("network", allowed="without a final LayerNorm if packed", given=network)
    H, groups = (network.heads, network.groups) if packed else (1, 1)
    parts: tuple[Literal["scores", "values"], ...] = ("scores", "values")
    for part, (first, second, both, least) in zip(parts, region.pairs, strict=True):
        rotary = settings.rotary is not None and part == "scores"
        if packed or rotary:
            d = network.parameters[first].shape[-2]
            about: Any = {"part": part, "groups": groups, "rotary": rotary, "norm": settings.norm}
            R = packed_rank(network.width, H, d, **about)
            counts = (H, groups) if part == "scores" else (groups, H)
            ranks |= {first: min(R, counts[0] * d), second: min(R, counts[1] * d)}
        else:
            other = max(least, both // 2)
            ranks |= {first: both - other, second: other}
    kinds, count = region.savable
    return ranks | {kind: full - (kind in kinds[:count]) for kind, full in region.full.items()}


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
