"""The transformer that the best adapters of a rank make [prop-transformer-error]."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from .. import lowrank
from ..networks._segments import Segments
from ..networks._vectors import assemble
from ..networks.gap import Gap
from ..networks.transformer import Transformer
from ._narrow_heads import pair_ranks


def nearest_network(
    target: Transformer, cut: Segments[Gap], rank: int
) -> tuple[Transformer, Bool[Tensor, "*batch"]]:
    """Make it from products alone; say where these may be out of reach."""
    reached = cut.map(lambda name, gap: _reached(name, gap, rank))
    products = cut.map(lambda name, gap: gap.reached(reached[name][0]))
    unknown = reached.map(lambda _, part: part[1]).largest()
    return assemble(target, products), unknown


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
    own, pair = min(rank, size), pair_ranks(gap)
    too_low = torch.maximum(pair.inner, pair.outer) > own
    return width, too_low | (pair.together > 2 * own)
