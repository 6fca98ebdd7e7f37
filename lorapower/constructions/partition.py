"""Optimal partitions of a frozen network's layers, by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Num
from torch import Tensor

from .. import _checks
from ..bounds.layers import Inputs, activation_sizes
from ..errors import InputError
from ..networks.gap import Gap
from ..networks.layers import FNN
from ..networks.partition import Partition, Pieces


@dataclass(frozen=True)
class OptimalPartition:
    """The best partition of each member, block sizes ``[..., L̄]``, and its rank or error."""

    sizes: Int[Tensor, "*batch blocks"]
    value: Num[Tensor, "*batch"]

    def partition(self, *member: int) -> Partition:
        """The partition of one member of the batch, by its indices."""
        return Partition(self.sizes[member].tolist())


def least_rank(frozen: FNN, target: FNN) -> OptimalPartition:
    """Find the partition of the least `bounds.fnn_threshold`, the rank at which it is exact.

    Blocks with a hidden layer too narrow for their target layer are left out. Raises `InputError`
    for a target deeper or wider than the frozen network. Source: [prop-optimal-partition].
    """

    def step(i: int, layers: slice, gap: Gap, before: Tensor) -> Tensor:
        return torch.maximum(before, gap.threshold.to(before.dtype))

    best = _search(frozen, target, step)
    return replace(best, value=best.value.long())


def least_error(frozen: FNN, target: FNN, ranks: _checks.Ranks, inputs: Inputs) -> OptimalPartition:
    """Find the partition of the least `bounds.fnn_error` at given ranks [prop-optimal-partition].

    Raises `InputError` for ranks out of range, and for a target deeper or wider than ``frozen``.
    """
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    sizes = activation_sizes(target, inputs)

    def step(i: int, layers: slice, gap: Gap, before: Tensor) -> Tensor:
        error = gap.error(sum(gap.ranks(per_layer[layers])))
        return (gap.target.norm + error) * before + error * sizes[i]

    return _search(frozen, target, step)


def _search(
    frozen: FNN, target: FNN, step: Callable[[int, slice, Gap, Tensor], Tensor]
) -> OptimalPartition:
    """Least value over partitions; ``step``, which adds a block, is monotone in the value."""
    pieces = Pieces(frozen, target)
    values = {0: torch.zeros((), dtype=frozen.dtype, device=frozen.device)}
    starts: list[dict[int, Tensor]] = []
    for i in range(target.depth):
        reached, chosen = {}, {}
        # Each of the later blocks needs a layer.
        for end in range(i + 1, frozen.depth - target.depth + i + 2):
            runs = [slice(start, end) for start in values if start < end]
            runs = [layers for layers in runs if pieces.fits(i, layers)]
            if runs:
                options = [
                    step(i, layers, pieces.gap(i, layers), values[layers.start]) for layers in runs
                ]
                reached[end], best = torch.stack(torch.broadcast_tensors(*options)).min(0)
                firsts = [layers.start for layers in runs]
                chosen[end] = torch.tensor(firsts, device=best.device)[best]
        values = reached
        starts.append(chosen)
    if frozen.depth not in values:
        allowed = f"no deeper and no wider than the frozen network of widths {frozen.widths}"
        raise InputError("target", allowed=allowed, given=f"widths {target.widths}")

    value = values[frozen.depth]
    ends = [torch.full_like(value, frozen.depth, dtype=torch.long)]
    for chosen in reversed(starts):
        table = ends[0].new_zeros(frozen.depth + 1, *value.shape)
        for layer, start in chosen.items():
            table[layer] = start
        ends.append(table.gather(0, ends[-1][None])[0])
    return OptimalPartition(torch.stack(ends[::-1], dim=-1).diff(dim=-1), value)
