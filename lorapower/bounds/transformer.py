"""Ranks, thresholds and errors of adapted transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import _checks
from ..errors import InputError
from ..networks.attention import PARTS, Norm, Settings
from ..networks.decoder import Decoder
from ..networks.gap import Gap
from ..networks.segmentation import ADAPTED, AnyTransformer, Segments, segments
from .narrow_heads import narrow_head_ranks


def transformer_ranks(frozen: AnyTransformer, target: AnyTransformer) -> Segments[Tensor]:
    """Find the least ranks that make segments exact [thm-transformer], [thm-residual].

    Where a segment differs by ``E``: ``⌈rank(E)/2⌉`` for two weights, more for heads narrower than
    the tokens [prop-narrow-heads], and ``rank E`` for one. ``[..., L, H]`` for heads, each by
    itself, and ``[..., L]`` for blocks; their ``largest()`` is enough for all. Raises what
    `networks.segments` raises.

    Examples
    --------
    >>> from lorapower.bounds import transformer_ranks
    >>> from lorapower.networks import Transformer
    >>> frozen, target = (Transformer.random(2, 8, 2, seed=s) for s in (0, 1))
    >>> int(transformer_ranks(frozen, target).largest())
    4
    """

    def least(name: str, gap: Gap) -> Tensor:
        if len(ADAPTED[name]) == 1:
            return gap.rank
        if gap.frozen.depth == 2:
            return gap.threshold
        inner, outer, together = narrow_head_ranks(gap)[:3]
        return torch.stack([inner, outer, -(-together // 2)]).amax(0)

    return Segments({name: least(name, gap) for name, gap in segments(frozen, target).items()})


def savable_ranks(settings: Settings) -> tuple[list[str], int]:
    """Name the weights on which scales of units can save a rank, and count how many at once.

    A ReLU unit stays the same if its row of ``W_1`` is multiplied by ``λ > 0`` and its column of
    ``W_2`` by ``1/λ``; a gated unit if its row of ``W_3`` is, by any ``μ ≠ 0``. Source:
    [thm-needed].
    """
    kinds = ["W_1"] * (settings.activation == "relu") + ["W_3"] * settings.gated
    return [*kinds, "W_2"] if kinds else [], len(kinds)


def _full_ranks(network: Decoder) -> dict[str, int]:
    """Find the full rank of feed-forward weights; refuse shapes of which nothing is proved."""
    _checks.kind(Decoder, network=network)
    settings = network.settings
    if settings.norm is None or not settings.residual:
        raise InputError("network", allowed="with residual connections and norms", given=network)
    if settings.activation == "gelu_tanh":
        allowed, given = "of ReLUs, GELUs or SiLUs", "the tanh form of GELU"
        raise InputError("network", allowed=allowed, given=given, remedy="nothing is proved of it")
    # On a circle or two points kinks of different units meet.
    m = _checks.integer("dimension of normalized tokens", network.dimension, 3)
    # A final LayerNorm hides one direction of what is written.
    written = m if settings.final_norm else network.width
    full = {"W_1": m} | ({"W_3": m} if settings.gated else {}) | {"W_2": written}
    kinds, _ = savable_ranks(settings)
    least, units = max(written, 1 + sum(full[kind] - 1 for kind in kinds)), network.sizes["hidden"]
    if units < least:
        raise InputError("network's hidden units", allowed=f"at least {least}", given=units)
    return full


def ranks_suffice(network: Decoder, ranks: Mapping[str, int]) -> bool:
    """Say whether adapters of these ranks make almost all pairs of networks equal [thm-needed].

    Both networks have the shape of ``network``, whose numbers do not matter; one adapter serves one
    head. Gains and shifts are frozen, but for those of a final norm, and biases are tuned. With
    ``S`` the width, or ``m`` under a final LayerNorm, the ranks are enough if and only if

    - ``R_Q + R_K ≥ min(2 d, m)``, where no rank counts for more than the head size ``d``;
    - ``R_V + R_O ≥ min(2 d, m)`` in the same way, and ``R_O ≥ min(d, max(0, S − d))``;
    - ``W_1`` and ``W_3`` have rank ``m`` and ``W_2`` rank ``S``, but for one rank less on one of
      ``W_1`` and ``W_2`` with ReLUs, on one of ``W_3`` and ``W_2`` with gated GELUs or SiLUs, and
      on any two of the three with gated ReLUs.

    With ReLUs this holds for targets all of whose hyperplanes meet the sphere of normalized tokens.
    `constructions.adapt_transformer` makes such networks equal. Raises `InputError` for networks
    without residual connections or norms, with rotary positions, grouped heads, ``"gelu_tanh"``,
    fewer than three dimensions of normalized tokens, or fewer units than the theorem asks
    (``m + S − 1``; ``2 m + S − 2`` with gated ReLUs, ``S`` with GELUs or SiLUs without gates); and
    for ranks of other weights, or below 0.
    """
    full, sizes = _full_ranks(network), network.sizes
    if network.settings.rotary is not None or network.groups < network.heads:
        allowed = "without rotary positions and grouped heads"
        raise InputError("network", allowed=allowed, given=network)
    if not isinstance(ranks, Mapping) or set(ranks) != set(network.weight_kinds):
        allowed = f"one rank for each of {', '.join(network.weight_kinds)}"
        raise InputError("ranks", allowed=allowed, given=ranks)
    given = {kind: _checks.integer(f"rank of {kind}", ranks[kind], 0) for kind in ranks}
    Q, K, V, O = (min(given[k], *network.parameters[k].shape[-2:]) for k in PARTS["attention"])
    m, d = full["W_1"], sizes["value size"]
    if Q + K < min(2 * sizes["query size"], m):
        return False
    if V + O < min(2 * d, m) or min(d, full["W_2"] - d) > O:
        return False
    lacking = {kind: rank - given[kind] for kind, rank in full.items() if given[kind] < rank}
    kinds, count = savable_ranks(network.settings)
    return len(lacking) <= count and all(k in kinds and rank == 1 for k, rank in lacking.items())


def necessary_ranks(network: Decoder) -> dict[str, int]:
    """Find ranks none of which can be lowered alone, for almost all networks of a shape.

    One adapter serves all heads of a weight, as PEFT has it. Weights of attention have the counts
    of `packed_rank` [thm-packed], or their full rank where groups make it smaller; feed-forward
    layers save ranks on ``W_1`` and ``W_3`` first [thm-needed]. A tuned target may need much less:
    `transformer_ranks`. Raises `InputError` for shapes of which nothing is proved, as
    `ranks_suffice` does but for rotary positions and grouped heads; for a final LayerNorm; and as
    `packed_rank` does.

    Examples
    --------
    >>> from lorapower.bounds import necessary_ranks
    >>> from lorapower.networks import Decoder
    >>> gpt2 = {"residual": True, "norm": "layer", "activation": "gelu"}
    >>> necessary_ranks(Decoder.random(1, 12, 3, head_size=4, **gpt2))
    {'W_Q': 7, 'W_K': 7, 'W_V': 7, 'W_O': 7, 'W_1': 11, 'W_2': 12}
    """
    full, settings = _full_ranks(network), network.settings
    if settings.final_norm and settings.norm == "layer":
        raise InputError("network", allowed="without a final LayerNorm", given=network)
    H, groups = network.heads, network.groups
    about: Any = {"groups": groups, "rotary": settings.rotary is not None, "norm": settings.norm}
    d, value = network.sizes["query size"], network.sizes["value size"]
    scores = packed_rank(network.width, H, d, part="scores", **about)
    values = packed_rank(network.width, H, value, part="values", **about)
    attention = {
        "W_Q": min(scores, H * d),
        "W_K": min(scores, groups * d),
        "W_V": min(values, groups * value),
        "W_O": min(values, H * value),
    }
    kinds, count = savable_ranks(settings)
    return attention | {kind: rank - (kind in kinds[:count]) for kind, rank in full.items()}


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
    Raises `InputError` for groups that do not divide the heads, and for values of heads larger than
    ``m``.

    Examples
    --------
    Queries and keys of GPT-2 small:

    >>> from lorapower.bounds import packed_rank
    >>> packed_rank(768, heads=12, head_size=64, norm="layer")
    611
    """
    groups, d = heads if groups is None else groups, head_size
    if heads % groups:
        raise InputError("groups", allowed=f"a divisor of {heads}, the heads", given=groups)
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
