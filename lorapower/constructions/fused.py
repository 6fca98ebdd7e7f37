"""Networks with one matrix for each segment: all that adapters can reach.

Adapters of total rank ``r`` turn a segment of non-singular layers with product ``P`` into ``P + K``
for any ``K`` with ``rank K ≤ r`` [lem-any-change], and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition, blocks
from ..regions import Region
from .fnn import adapt_relu
from .linear import Adaptation, adapt_linear

# The package offers the rest.
__all__ = ["Fused"]


class _Split(NamedTuple):
    """Inputs to ``fit``; of those held out, one half to ``select`` a fit and one to ``test`` it."""

    fit: Tensor
    select: Tensor
    test: Tensor


@dataclass(frozen=True)
class Fused:
    """Hold a frozen network, and the ``network`` with one matrix for each segment [def-fused].

    A linear ``network`` equals the ``frozen`` one; a ReLU ``network`` has the target's biases and
    no ReLUs within blocks of the ``partition``. ``fused_ranks`` are what adapters of ``ranks``
    reach on each of its weights.
    """

    frozen: Network
    target: Network
    ranks: Any
    partition: Partition | None
    network: Network
    fused_ranks: tuple[int, ...]

    def split_among_layers(
        self, adapters: Adapters, region: Region | None = None, *, throw: bool = True
    ) -> Adaptation:
        """Give the frozen network the function that adapters give to the fused one.

        For ReLU networks it holds in a ``region``. Raises what `adapt` raises.
        """
        reached = adapters.merge(self.network)
        if isinstance(self.frozen, FNN):
            options: Any = {"partition": self.partition, "throw": throw}
            return adapt_relu(self.frozen, reached, self.ranks, region, **options)
        return adapt_linear(self.frozen, reached, self.ranks, throw=throw)

    def split(self, inputs: Any, held_out: Any) -> _Split:
        """Return inputs to fit, to select by and to test on, as the target takes them.

        Raises `InputError` for inputs that are too few, of another width, or in both sets.
        """
        parts = []
        for name, given, least in (("inputs", inputs, 2), ("held_out", held_out, 4)):
            x = self.target.as_inputs(given, name)
            if x.ndim != 2 or x.shape[-1] < least:
                allowed = f"of shape [width, samples], at least {least} samples"
                raise InputError(name, allowed=allowed, given=f"shape {tuple(x.shape)}")
            parts.append(x)
        columns = [{column.numpy().tobytes() for column in x.cpu().mT} for x in parts]
        # A few inputs may well be drawn twice.
        shared = len(columns[0] & columns[1])
        if 10 * shared > len(columns[1]):
            allowed = "other inputs than those of the fit, which cannot judge it"
            raise InputError("held_out", allowed=allowed, given=f"{shared} that are among them")
        return _Split(parts[0], *parts[1].tensor_split(2, -1))


def fuse(frozen: Network, target: Network, ranks: Any, partition: Partition | None = None) -> Fused:
    """Fuse a frozen network and a target of its kind: one matrix for each segment [def-fused].

    In a linear network that is the whole product; in a ReLU network each block of the partition,
    cut to the target's widths, with the target's biases. ``ranks`` and ``partition`` are as in
    `adapt_relu`, which also says what is refused; so are batches.
    """
    _checks.kind(LinearNetwork, FNN, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    _checks.single(frozen=frozen, target=target)
    each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    if isinstance(frozen, FNN) and isinstance(target, FNN):
        gaps = blocks(frozen, target, partition)
        partition = Partition([gap.frozen.depth for gap in gaps])
        network: Network = target.with_parameters([gap.frozen.product() for gap in gaps])
        shares = [each[layers] for layers in partition.slices]
    else:
        gaps, partition, shares = [Gap(frozen, target)], None, [each]
        network = LinearNetwork([gaps[0].frozen.product()])
    reach = tuple(
        min(sum(gap.ranks(share)), *weight.shape)
        for gap, share, weight in zip(gaps, shares, network.weights, strict=True)
    )
    return Fused(frozen, target, ranks, partition, network, reach)
