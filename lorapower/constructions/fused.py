"""Networks with one matrix for each segment: all that adapters can reach.

Adapters of total rank ``r`` turn a segment of non-singular layers with product ``P`` into ``P + K``
for any ``K`` with ``rank K ≤ r`` [lem-any-change], and nothing else. So one matrix can stand for
each segment, and what is found for it is carried back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from .. import _checks
from ..adapters.core import Adapters
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition, blocks
from ..networks.transformer import Transformer
from ..regions import Region
from . import _heads, general
from .linear import Adaptation


@dataclass(frozen=True)
class Fused:
    """A frozen network and a target with one matrix for each segment [def-fused].

    ``network`` and ``fused_target`` are the fused ``frozen`` and ``target``, to which they are
    equal, but a ReLU ``network`` has no ReLUs within blocks of the ``partition``. ``fused_ranks``
    are what adapters of ``ranks`` reach on each of its weights.
    """

    frozen: Network
    target: Network
    ranks: Any
    partition: Partition | None
    network: Network
    fused_target: Network
    fused_ranks: tuple[int, ...]

    def carry_back(
        self, adapters: Adapters, region: Region | None = None, *, throw: bool = True
    ) -> Adaptation:
        """Give the frozen network the function that adapters give to the fused one.

        Returns and raises what the construction does. In ReLU networks it holds in the ``region``.
        """
        reached = adapters.merge(self.network)
        options: dict[str, Any] = {"throw": throw}
        if isinstance(reached, FNN):
            options |= {"inputs": region, "partition": self.partition, "max_digits_lost": inf}
        return general.adapt(self.frozen, reached, self.ranks, **options)


def fuse(
    frozen: LinearNetwork | FNN | Transformer,
    target: LinearNetwork | FNN | Transformer,
    ranks: Any,
    partition: Partition | None = None,
) -> Fused:
    """Fuse a frozen network and a target of its kind: one matrix for each segment [def-fused].

    In a linear network that is the whole product; in a ReLU network each block of the partition,
    cut to the target's widths, with the target's biases; for transformers see `Transformer.fuse`.
    ``ranks`` are as the construction takes them; the partition of ReLU networks is uniform by
    default.

    Raises `InputError` for what the construction refuses, for batches, and for a transformer with
    more outputs than a token has coordinates.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    _checks.single(frozen=frozen, target=target)
    if isinstance(frozen, Transformer):
        assert isinstance(target, Transformer)
        # Sizes that match, and what has to be inverted.
        frozen.segments(target)
        if target.width != frozen.width:
            raise InputError("target", allowed=f"of width {frozen.width}", given=target.width)
        reach = frozen.fused_ranks(_heads.ranks_by_name(ranks, frozen))
        pair = frozen.fuse(), target.fuse(frozen)
        return Fused(frozen, target, ranks, None, *pair, reach)
    each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    if isinstance(frozen, FNN):
        assert isinstance(target, FNN)
        gaps = blocks(frozen, target, partition)
        partition = Partition([gap.frozen.depth for gap in gaps])
        products = [gap.frozen.product() for gap in gaps]
        network = target.with_parameters(products)
        reach = tuple(
            min(sum(gap.ranks(each[layers])), *w.shape)
            for gap, layers, w in zip(gaps, partition.slices, products, strict=True)
        )
        return Fused(frozen, target, ranks, partition, network, target, reach)
    gap = Gap(frozen, target)
    product = LinearNetwork([gap.frozen.product()])
    reach = (min(sum(gap.ranks(each)), *product.weights[0].shape),)
    fused_target = LinearNetwork([gap.target.product()])
    return Fused(frozen, target, ranks, None, product, fused_target, reach)
