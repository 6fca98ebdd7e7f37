"""Partitions of a frozen network's layers into blocks, one for each target layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .. import _checks
from ..errors import InputError
from .gap import Gap
from .layers import FNN, LinearNetwork


@dataclass(frozen=True)
class Partition:
    """Consecutive blocks ``ℬ_i`` of ``M_i ≥ 1`` layers, by their ``sizes`` [def-partition]."""

    sizes: tuple[int, ...]

    def __init__(self, sizes: Iterable[int]) -> None:
        each = enumerate(sizes, start=1)
        checked = tuple(_checks.integer(f"size of block {i}", size, 1) for i, size in each)
        if not checked:
            raise InputError("sizes", allowed="at least one block", given="none")
        object.__setattr__(self, "sizes", checked)

    @classmethod
    def uniform(cls, depth: int, blocks: int) -> Partition:
        """Put ``⌊L/L̄⌋`` layers in each block; the last block also takes the remainder."""
        blocks = _checks.integer("blocks", blocks, 1, depth, limit="the depth, a layer for each")
        size = depth // blocks
        return cls([size] * (blocks - 1) + [depth - size * (blocks - 1)])

    @property
    def depth(self) -> int:
        """Number of layers ``L``."""
        return sum(self.sizes)

    @property
    def slices(self) -> list[slice]:
        """Where each block lies among the layers."""
        return [slice(*ends) for ends in pairwise(accumulate(self.sizes, initial=0))]


def blocks(frozen: FNN, target: FNN, partition: Partition | None = None) -> list[Gap]:
    """Compare the blocks of a partition (uniform by default) with the target's layers.

    A block's first weight is cut to the columns and its last to the rows of the target layer;
    biases are left out. Raises `InputError` for a target deeper or wider than the frozen network,
    where only one of the two ends with a ReLU, and for a partition that does not cover the frozen
    layers with a block for each target layer.
    """
    _checks.kind(FNN, frozen=frozen, target=target)
    if frozen.linear_last != target.linear_last:
        allowed = f"with linear_last={frozen.linear_last}, like the frozen network"
        remedy = "adapters leave the end as it is"
        raise InputError("target", allowed, f"one with {target.linear_last}", remedy)
    if partition is None:
        partition = Partition.uniform(frozen.depth, target.depth)
    if (partition.depth, len(partition.sizes)) != (frozen.depth, target.depth):
        allowed = f"of {target.depth} blocks, the target's layers, with {frozen.depth} layers"
        raise InputError("partition", allowed=allowed, given=partition)
    gaps = []
    for i, layers in enumerate(partition.slices):
        outputs, inputs = target.weights[i].shape[-2:]
        sides = ("inputs", inputs, layers.start), ("outputs", outputs, layers.stop)
        for side, needed, l in sides:
            name, limit = f"{side} of target layer {i + 1}", "the frozen network's width there"
            _checks.integer(name, needed, 1, frozen.widths[l], limit=limit)
        weights = list(frozen.weights[layers])
        weights[0] = weights[0][..., :inputs]
        weights[-1] = weights[-1][..., :outputs, :]
        target_layer = LinearNetwork([target.weights[i]], checked=False)
        gaps.append(Gap(LinearNetwork(weights, checked=False), target_layer))
    return gaps
