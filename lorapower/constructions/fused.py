"""Networks whose segments are one matrix each: what adapters can reach, without their detours.

Between two non-linearities a network is linear. Adapters of total rank ``r`` on a segment of
non-singular layers with product ``P`` make of it any ``P + K`` of ``rank K ≤ r`` [lem-any-change],
and nothing else. So a question of what they reach is asked of the network in which one matrix
stands for each segment, and what is found there is carried back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters
from ..errors import InputError
from ..networks import segments
from ..networks.base import Network
from ..networks.fnn import FNN, pad
from ..networks.gap import Gap
from ..networks.linear import LinearNetwork
from ..networks.partition import Partition, blocks, shares
from ..networks.residual.network import ResidualTransformer
from ..networks.residual.segments import residual_segments
from ..networks.stacked import Stacked
from ..networks.transformer import Transformer
from ..regions import Region
from . import fnn, heads, linear, residual, transformer
from .linear import Adaptation

# The two factors of a segment of a head: the one that holds their product, and the other.
HEADS = {"query size": ("W_Q", "W_K"), "value size": ("W_O", "W_V")}


@dataclass(frozen=True)
class Fused:
    """A frozen network and a target with one matrix for each segment [def-fused].

    Attributes
    ----------
    frozen, target : Network
        As they are given.
    ranks
        Of the frozen network's adapters, as the construction takes them.
    partition : Partition or None
        Of ReLU networks: the blocks.
    network, goal : Network
        The two with fused segments. The first equals the frozen network, but that of a ReLU network
        the ReLUs within its blocks are gone; the second equals the target.
    fused_ranks : tuple of int
        Of each of the fused network's ``weights``: what its segment's adapters reach.
    """

    frozen: Network
    target: Network
    ranks: Any
    partition: Partition | None
    network: Network
    goal: Network
    fused_ranks: tuple[int, ...]

    def carry_back(
        self, adapters: Adapters, region: Region | None = None, *, throw: bool = True
    ) -> Adaptation:
        """Adapters of the frozen network that make it what these make of the fused one.

        Of a ReLU network in the region. Raises what the theorem's construction raises.
        """
        _checks.kind(Adapters, adapters=adapters)
        reached = adapters.merge(self.network)
        if isinstance(reached, FNN):
            _checks.kind(Region, region=region)
            assert isinstance(self.frozen, FNN)
            assert region is not None
            return fnn.adapt(
                self.frozen,
                reached,
                self.ranks,
                region,
                self.partition,
                throw=throw,
                max_digits_lost=torch.inf,
            )
        if isinstance(reached, Transformer):
            assert isinstance(self.frozen, Transformer)
            return transformer.adapt(self.frozen, reached, self.ranks, throw=throw)
        if isinstance(reached, ResidualTransformer):
            assert isinstance(self.frozen, ResidualTransformer)
            return residual.adapt(self.frozen, reached, self.ranks, throw=throw)
        return linear.adapt(self.frozen, reached, self.ranks, throw=throw)


def fuse(
    frozen: LinearNetwork | FNN | Transformer | ResidualTransformer,
    target: LinearNetwork | FNN | Transformer | ResidualTransformer,
    ranks: Any,
    partition: Partition | None = None,
) -> Fused:
    """The two networks with one matrix for each segment.

    Of a linear network that is the whole product; of a ReLU network each block of the partition,
    cut to the target's widths, with the target's biases, since the frozen ones are tuned away. A
    fused transformer has the products before the softmax and before the ReLU as ``W_Q`` and
    ``W_O``, that at the end as ``W_2`` of the last block, and the frozen ``W_2`` of the others, in
    whose coordinates the target's tokens are written as well; ``W_K``, ``W_V``, ``W_1`` are
    identities. A residual one has the products of both factors of attention in the same places, and
    keeps ``W_1`` and ``W_2``. Heads narrower than the tokens keep their two factors.

    Raises `InputError` for what the construction refuses, for batches, and for a transformer of
    more outputs than a token has coordinates.

    Source: [def-fused].

    Parameters
    ----------
    frozen, target : LinearNetwork or FNN or Transformer or ResidualTransformer
        One of each, of one kind.
    ranks
        As the construction for this kind of network takes them.
    partition : Partition, optional
        Of ReLU networks, by default the uniform one.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, ResidualTransformer, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    for name, network in (("frozen", frozen), ("target", target)):
        if network.batch_shape:
            raise InputError(
                name,
                allowed="a single network",
                given=f"batch shape {tuple(network.batch_shape)}",
                remedy="fuse one after the other",
            )
    if isinstance(frozen, Transformer):
        return _transformer(frozen, target, ranks)
    if isinstance(frozen, ResidualTransformer):
        return _residual(frozen, target, ranks)
    each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    if isinstance(frozen, FNN):
        assert isinstance(target, FNN)
        gaps = blocks(frozen, target, partition)
        partition = Partition([gap.frozen.depth for gap in gaps])
        products = [gap.frozen.product() for gap in gaps]
        network = target.with_parameters(products)
        totals = [sum(share) for share in shares(gaps, each)]
        reach = tuple(min(r, *w.shape) for r, w in zip(totals, products, strict=True))
        return Fused(frozen, target, ranks, partition, network, target, reach)
    gap = Gap(frozen, target)
    product = LinearNetwork([gap.frozen.product()])
    reach = (min(sum(gap.ranks(each)), *product.weights[0].shape),)
    goal = LinearNetwork([gap.target.product()])
    return Fused(frozen, target, ranks, None, product, goal, reach)


def is_narrow(network: Stacked, side: str) -> bool:
    """Whether heads are narrower than tokens on a side, ``"query size"`` or ``"value size"``."""
    return network.sizes[side] < network.width


def _transformer(frozen: Transformer, target: Any, ranks: Any) -> Fused:
    # Sizes that match, and what has to be inverted.
    segments(frozen, target)
    own = heads.ranks_by_name(ranks, frozen, transformer.ADAPTED)
    if frozen.sizes["outputs"] > frozen.width:
        raise InputError(
            "frozen",
            allowed=f"of at most {frozen.width} outputs, the coordinates of a token",
            given=frozen.sizes["outputs"],
            remedy="fewer coordinates cannot hold a bias for all of them",
        )
    network, goal = (_fused(one, frozen) for one in (frozen, target))
    for side, (kept, gone) in HEADS.items():
        if not is_narrow(frozen, side):
            own |= {kept: min(own[kept] + own[gone], frozen.width), gone: 0}
    outputs = min(own["W_2"] + own["W_out"], frozen.sizes["outputs"])
    last = {f"W_2 of block {frozen.depth}": outputs}
    by_kind = own | {"W_2": 0, "W_out": 0}
    reach = [last.get(name, by_kind.get(name.split()[0], 0)) for name in frozen.weight_names]
    return Fused(frozen, target, ranks, None, network, goal, tuple(reach))


def _residual(frozen: ResidualTransformer, target: Any, ranks: Any) -> Fused:
    # Sizes that match.
    residual_segments(frozen, target)
    if target.width != frozen.width:
        raise InputError("target", allowed=f"of width {frozen.width}", given=target.width)
    own = heads.ranks_by_name(ranks, frozen, frozen.weight_kinds)
    for side, (kept, gone) in HEADS.items():
        if not is_narrow(frozen, side):
            own |= {kept: min(own[kept] + own[gone], frozen.width), gone: 0}
    reach = tuple(own[name.split()[0]] for name in frozen.weight_names)
    network, goal = (_products(one) for one in (frozen, target))
    return Fused(frozen, target, ranks, None, network, goal, reach)


def _products(network: ResidualTransformer) -> ResidualTransformer:
    """The network with one matrix for each segment of attention, the other being the identity."""
    width = network.width
    one = torch.eye(width, dtype=network.dtype, device=network.device)
    parts = {name: getattr(network, name) for name in (*network.weight_kinds, *network.bias_kinds)}
    if not is_narrow(network, "query size"):
        rows = network.sizes["query size"]
        product = network.W_K.mT @ network.W_Q
        parts |= {"W_Q": pad(product, rows), "W_K": pad(one.expand_as(product), rows)}
        parts["b_Q"] = pad(network.W_K.mT @ network.b_Q[..., None], rows)[..., 0]
    if not is_narrow(network, "value size"):
        rows = network.sizes["value size"]
        product = network.W_O @ network.W_V
        parts |= {"W_V": pad(one.expand_as(product), rows), "W_O": pad(product.mT, rows).mT}
    return ResidualTransformer(**parts, **network.settings)


def _fused(network: Transformer, frozen: Transformer) -> Transformer:
    """One of the two, its tokens between blocks in the coordinates of the frozen one's."""
    width, outputs = network.width, network.sizes["outputs"]
    one = torch.eye(width, dtype=network.dtype, device=network.device)
    inner = frozen.W_2[:-1]
    turned = torch.linalg.solve(inner.mT, network.W_2[:-1].mT).mT
    before = torch.cat([one[None], turned])[:, None]
    parts: dict[str, Tensor] = {}
    if is_narrow(network, "query size"):
        parts |= {"W_Q": network.W_Q @ before, "W_K": network.W_K @ before}
    else:
        rows = network.sizes["query size"]
        product = (network.W_K @ before).mT @ (network.W_Q @ before)
        parts |= {"W_Q": pad(product, rows), "W_K": pad(one.expand_as(product), rows)}
    if is_narrow(network, "value size"):
        parts |= {"W_V": network.W_V @ before, "W_O": network.W_1[:, None] @ network.W_O}
    else:
        rows = network.sizes["value size"]
        product = network.W_1[:, None] @ network.W_O @ network.W_V @ before
        parts["W_V"] = pad(one.expand_as(product), rows)
        parts["W_O"] = pad(product.mT, rows).mT
    # What comes from the last ReLU has one matrix, and a bias of its own.
    last = pad(network.W_out @ network.W_2[-1], width)
    bias = pad(network.W_out @ network.b_2[-1, :, None], width)
    shifts = torch.linalg.solve(turned, network.b_2[:-1])
    return Transformer(
        **parts,
        W_1=one.expand(network.depth, width, width),
        b_1=network.b_1,
        W_2=torch.cat([inner, last[None]]),
        b_2=torch.cat([shifts, bias.mT]),
        W_out=one[:outputs],
    )
