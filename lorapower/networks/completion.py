"""Vectors that complete an adapted transformer, and transformers of given segments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .segmentation import Segments
from .transformer import GAINS, SHIFTS, Transformer


def assemble(target: Transformer, products: Segments[Tensor]) -> Transformer:
    """Make a transformer with these products of its segments, and all else the target's.

    Source: [prop-transformer-error], [prop-residual-error].
    """
    if target.is_plain:
        return _assemble_plain(target, products)
    first, second = (torch.linalg.pinv(B) for B in target.readings)
    ignores_means = target.settings.final_norm and target.settings.norm == "layer"
    back = target.basis() if ignores_means else torch.eye(target.width).to(first)
    weights = {"W_1": products.inner @ second, "W_2": back @ products.outer}
    if target.settings.gated:
        weights["W_3"] = products.up @ second
    if paired := "query_key" in products:
        weights["W_Q"] = products.query_key @ first
        weights["W_K"] = first.expand(*products.query_key.shape[:-2], -1, -1)
    else:
        weights |= {"W_Q": products.query @ first, "W_K": products.key @ first}
    if "value_output" in products:
        weights["W_V"] = first.expand(*products.value_output.shape[:-2], -1, -1)
        weights["W_O"] = back @ products.value_output
    else:
        weights |= {"W_V": products.value @ first, "W_O": back @ products.sent}
    network = Transformer(weights, target.settings)
    vectors = vectors_of(network, target, paired)
    if paired:
        s = target.shifts[0].unsqueeze(-2)
        keys = (target.W_K @ target.readings[0]).mT
        wanted = times(keys, times(target.W_Q, s) + target.b_Q)
        vectors["b_Q"] = wanted - times(network.W_Q, s)
    return network.replace(**vectors)


def _assemble_plain(target: Transformer, products: Segments[Tensor]) -> Transformer:
    shift, outputs = target.missing_shift, target.W_out.shape[-2]
    identity = torch.eye(target.width).to(shift)
    of_heads = identity.expand(products.query_key.shape)
    of_blocks = of_heads[..., 0, :, :]
    end = pad(products.output, (0, 0, 0, target.width - outputs))
    constant = pad(times(target.W_out, target.b_2[..., -1, :]), (0, target.width - outputs))
    # The first bias has what the target's heads make of the shift and this network's do not.
    sent = target.b_2[..., :-1, None, :]
    for W in (target.W_V, target.W_O):
        sent = times(W[..., 1:, :, :, :], sent)
    wanted = times(target.W_1[..., 1:, :, :], sent.sum(-2))
    missing = wanted - times(products.value_output.sum(-3)[..., 1:, :, :], shift)
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


def vectors_of(adapted: Transformer, target: Transformer, paired: bool) -> dict[str, Tensor]:
    """Find vectors of a transformer that is not plain.

    Where queries and keys are ``paired`` in one segment, the bias of queries is left out.
    """
    s_1, s_2 = target.shifts
    vectors = {}
    for kind in target.bias_kinds:
        if kind in (*GAINS, *SHIFTS, "b_2"):
            vectors[kind] = target.parameters[kind]
        elif kind in (("b_1", "b_3") if paired else ("b_1", "b_3", "b_Q", "b_K")):
            weight = kind.replace("b", "W")
            s = s_2 if kind in ("b_1", "b_3") else s_1.unsqueeze(-2)
            wanted = target.parameters[kind] + times(target.parameters[weight], s)
            vectors[kind] = wanted - times(adapted.parameters[weight], s)
    s = s_1.unsqueeze(-2)
    wanted, reached = (
        times(network.W_O, network.each_head(times(network.W_V, s), -2))
        for network in (target, adapted)
    )
    vectors["b_O"] = target.b_O + (wanted - reached).sum(-2)
    return vectors


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Multiply vectors by matrices."""
    return (matrix @ vector[..., None])[..., 0]
