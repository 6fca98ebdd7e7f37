"""Transformers with one matrix for each segment of attention [def-fused]."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import InputError
from ..networks.layers import pad
from ..networks.transformer import Transformer

# The two factors of a segment of a head: the one that holds their product, and the other.
_FACTORS = {"query size": ("W_Q", "W_K"), "value size": ("W_O", "W_V")}


def fuse(network: Transformer, frozen: Transformer) -> Transformer:
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
        last = pad(network.W_out @ network.W_2[-1], network.width)
        bias = pad(network.W_out @ network.b_2[-1, :, None], network.width)
        parts["W_1"] = identity.expand(network.depth, -1, -1)
        parts["W_2"] = torch.cat([kept, last[None]])
        parts["b_2"] = torch.cat([torch.linalg.solve(turned, network.b_2[:-1]), bias.mT])
        parts["W_out"] = identity[:outputs]
    if not network.is_narrow("query size"):
        rows = network.sizes["query size"]
        scores = parts["W_K"].mT @ parts["W_Q"]
        if not network.is_plain:
            parts["b_Q"] = pad(network.W_K.mT @ network.b_Q[..., None], rows)[..., 0]
        parts["W_Q"], parts["W_K"] = pad(scores, rows), pad(identity.expand_as(scores), rows)
    if not network.is_narrow("value size"):
        rows = network.sizes["value size"]
        parts["W_O"] = pad(values.mT, rows).mT
        parts["W_V"] = pad(identity.expand_as(values), rows)
    return Transformer(parts, settings)


def fused_ranks(network: Transformer, ranks: Mapping[str, int]) -> tuple[int, ...]:
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
