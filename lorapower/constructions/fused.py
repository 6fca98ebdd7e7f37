"""Networks with one matrix for each segment: all that adapters can reach.

Adapters of total rank ``r`` turn a segment of non-singular layers with product ``P`` into ``P + K``
for any ``K`` with ``rank K ≤ r`` [lem-any-change], and nothing else. So one matrix can stand for
each segment, and what is found for it is carried back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import _checks
from ..adapters import Adapters
from ..errors import InputError
from ..networks._segments import segments
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition, blocks
from ..networks.transformer import Transformer
from ..regions import Region
from . import _heads, general
from .linear import Adaptation

# The two factors of a segment of a head: the one that holds their product, and the other.
_FACTORS = {"query size": ("W_Q", "W_K"), "value size": ("W_O", "W_V")}


@dataclass(frozen=True)
class Fused:
    """Hold a frozen network and a target with one matrix for each segment [def-fused].

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

        Returns and raises what the construction does. For ReLU networks, and for no others, it
        holds in a ``region``.
        """
        reached = adapters.merge(self.network)
        options = {"partition": self.partition} if self.partition else {}
        return general.adapt(self.frozen, reached, self.ranks, region, throw=throw, **options)


def fuse(frozen: Network, target: Network, ranks: Any, partition: Partition | None = None) -> Fused:
    """Fuse a frozen network and a target of its kind: one matrix for each segment [def-fused].

    In a linear network that is the whole product; in a ReLU network each block of the partition,
    cut to the target's widths, with the target's biases; in a transformer the segments of attention
    and, if plain, the output's. ``ranks`` are as the construction takes them; the partition of ReLU
    networks is uniform by default.

    Raises `InputError` for what the construction refuses, for batches, and for a transformer with
    more outputs than a token has coordinates.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    _checks.single(frozen=frozen, target=target)
    if isinstance(frozen, Transformer) and isinstance(target, Transformer):
        # Sizes that match, and what has to be inverted.
        segments(frozen, target)
        if target.width != frozen.width:
            raise InputError("target", allowed=f"of width {frozen.width}", given=target.width)
        reach = _fused_ranks(frozen, _heads.ranks_by_kind(ranks, frozen))
        pair = _fuse_transformer(frozen, frozen), _fuse_transformer(target, frozen)
        return Fused(frozen, target, ranks, None, *pair, reach)
    each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    if isinstance(frozen, FNN) and isinstance(target, FNN):
        gaps = blocks(frozen, target, partition)
        partition = Partition([gap.frozen.depth for gap in gaps])
        network: Network = target.with_parameters([gap.frozen.product() for gap in gaps])
        fused_target: Network = target
        shares = [each[layers] for layers in partition.slices]
    else:
        gaps, partition, shares = [Gap(frozen, target)], None, [each]
        network, fused_target = (
            LinearNetwork([side.product()]) for side in (gaps[0].frozen, gaps[0].target)
        )
    reach = tuple(
        min(sum(gap.ranks(share)), *weight.shape)
        for gap, share, weight in zip(gaps, shares, network.weights, strict=True)
    )
    return Fused(frozen, target, ranks, partition, network, fused_target, reach)


def _fuse_transformer(network: Transformer, frozen: Transformer) -> Transformer:
    """Write the same function with one matrix for each segment of attention [def-fused].

    ``W_Q`` and ``W_O`` become the products, ``W_K`` and ``W_V`` identities; heads narrower than the
    tokens keep two factors. If plain, ``W_1`` becomes the identity, ``W_2`` of the last block the
    product at the end, and tokens between blocks have the coordinates of the ``W_2`` of ``frozen``.
    """
    settings = network.settings
    if settings.gated or network.groups < network.heads or settings.rotary is not None:
        raise InputError(
            "frozen",
            allowed="without gated layers, grouped heads and rotary positions",
            given=network,
            remedy="a fused network has no such parts; constructions.transformer.adapt takes them",
        )
    outputs = network.sizes.get("outputs", 0)
    if outputs > network.width:
        raise InputError(
            "frozen",
            allowed=f"of at most {network.width} outputs, the coordinates of a token",
            given=outputs,
            remedy="fewer coordinates cannot hold a bias for all of them",
        )
    identity = torch.eye(network.width).to(network.W_Q)
    parts = dict(network.parameters)
    values = network.W_O @ network.W_V
    if network.is_plain:
        kept = frozen.W_2[:-1]
        turned = torch.linalg.solve(kept.mT, network.W_2[:-1].mT).mT
        before = torch.cat([identity[None], turned])[:, None]
        parts |= {kind: parts[kind] @ before for kind in ("W_Q", "W_K", "W_V")}
        parts["W_O"] = network.W_1[:, None] @ network.W_O
        values = network.W_1[:, None] @ network.W_O @ network.W_V @ before
        last = identity[:, :outputs] @ network.W_out
        parts["W_1"] = identity.expand(network.depth, -1, -1)
        parts["W_2"] = torch.cat([kept, (last @ network.W_2[-1])[None]])
        between = torch.linalg.solve(turned, network.b_2[:-1])
        parts["b_2"] = torch.cat([between, (last @ network.b_2[-1])[None]])
        parts["W_out"] = identity[:outputs]
    if not network.is_narrow("query size"):
        wide = torch.eye(network.sizes["query size"], network.width).to(identity)
        if not network.is_plain:
            parts["b_Q"] = (network.W_K.mT @ network.b_Q[..., None])[..., 0] @ wide.mT
        parts["W_Q"] = wide @ parts["W_K"].mT @ parts["W_Q"]
        parts["W_K"] = wide.expand_as(parts["W_Q"])
    if not network.is_narrow("value size"):
        wide = torch.eye(network.sizes["value size"], network.width).to(identity)
        parts["W_O"], parts["W_V"] = values @ wide.mT, wide.expand_as(network.W_V)
    return Transformer(parts, settings)


def _fused_ranks(network: Transformer, ranks: Mapping[str, int]) -> tuple[int, ...]:
    """Compute the rank that adapters of these ranks, by kind, reach on each fused weight."""
    reach = dict(ranks)
    for side, (holds, other) in _FACTORS.items():
        if not network.is_narrow(side):
            reach |= {holds: min(ranks[holds] + ranks[other], network.width), other: 0}
    if not network.is_plain:
        return tuple(reach[kind] for kind in network.kind_of_weight)
    outputs = min(ranks["W_2"] + ranks["W_out"], network.sizes["outputs"])
    reach |= {"W_1": 0, "W_2": 0, "W_out": 0, f"W_2 of block {network.depth}": outputs}
    names = zip(network.weight_names, network.kind_of_weight, strict=True)
    return tuple(reach.get(name, reach[kind]) for name, kind in names)
