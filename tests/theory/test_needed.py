"""The ranks of [thm-needed] against slopes of whole networks: what changes of low rank reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PRENORM, normal, seeds
from torch import Tensor

from lorapower import bounds
from lorapower.networks import Transformer


def slopes(network: Transformer) -> dict[str, Tensor]:
    """A basis of the ways in which weights and biases change outputs, by kind of parameter."""
    kinds = [k for k in network.kinds if k[0] in "Wb" or k in ("g_f", "s_f")]
    counts = [network.parameters[kind].numel() for kind in kinds]
    flat = torch.cat([network.parameters[kind].flatten() for kind in kinds])
    copies = len(flat) // (2 * network.width)
    x = normal(copies, network.width, 4) * (0.3 + normal(copies, 1, 4, seed=1).abs())

    def outputs(numbers: Tensor) -> Tensor:
        pieces = zip(kinds, numbers.split(counts, 1), strict=True)
        stacks = {**network.parameters}
        stacks |= {k: p.reshape(copies, *network.parameters[k].shape) for k, p in pieces}
        listed = (network.one_by_one(k, stacks) for k in (network.weight_kinds, network.bias_kinds))
        return network.with_parameters(*listed, checked=False)(x).sum(0).flatten()

    # Each sequence has parameters of its own: a sum over sequences has the slopes of each.
    rows = torch.func.jacrev(outputs)(flat.expand(copies, -1)).flatten(0, 1)
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    count = dimension(S)
    pieces = zip(kinds, Vh[:count].split(counts, 1), strict=True)
    return {kind: piece.reshape(count, *network.parameters[kind].shape) for kind, piece in pieces}


def dimension(values: Tensor) -> int:
    """Count singular values, among which there must be a gap."""
    count = int((values > 1e-9 * values[0]).sum())
    assert values[count - 1] > 1e-7 * values[0]
    assert count == len(values) or values[count] < 1e-11 * values[0]
    return count


def reached(basis: Mapping[str, Tensor], ranks: Mapping[str, int]) -> int:
    """How many dimensions adapters of these ranks reach, near random ones of all heads."""
    rows = []
    for place, (kind, piece) in enumerate(basis.items()):
        if kind[0] == "W":
            out, into = piece.shape[-2:]
            left, right = (torch.linalg.qr(normal(n, n, seed=place)).Q for n in (out, into))
            kept = torch.ones(out, into, dtype=torch.bool)
            kept[ranks[kind] :, ranks[kind] :] = False
            piece = (left @ piece @ right)[..., kept]
        rows.append(piece.flatten(1))
    return dimension(torch.linalg.svdvals(torch.cat(rows, 1)))


def drawn(blocks: int, width: int, heads: int, **options: Any) -> Transformer:
    """A network with as few hidden units as the theorem allows, all visible."""
    m = width - (options["norm"] == "layer")
    written = m if options["final_norm"] else width
    scales = (options["activation"] == "relu") + options["gated"]
    hidden = [written, m + written - 1, 2 * m + written - 2][scales]
    network = Transformer.random(blocks, width, heads, hidden=hidden, **PRENORM | options)
    return network.replace(b_1=network.b_1 / 4, s_2=0 * network.s_2)


@given(st.integers(1, 2), st.integers(1, 3), st.data())
def test_changes_reach_all_networks_where_ranks_suffice(blocks: int, heads: int, data: Any) -> None:
    options = {
        "norm": data.draw(st.sampled_from(["layer", "rms"])),
        "activation": data.draw(st.sampled_from(["relu", "gelu", "silu"])),
        "gated": data.draw(st.booleans()),
        "final_norm": data.draw(st.booleans()),
        "head_size": data.draw(st.integers(1, 9 // (blocks * heads))),
        "seed": data.draw(seeds),
    }
    network = drawn(blocks, data.draw(st.integers(4, 10 - 2 * blocks)), heads, **options)
    basis = slopes(network)
    full = {kind: min(network.parameters[kind].shape[-2:]) for kind in network.weight_kinds}
    ranks = dict(full)
    for kind in data.draw(st.permutations(network.weight_kinds)):
        while ranks[kind] and bounds.ranks_suffice(network, ranks | {kind: ranks[kind] - 1}):
            ranks[kind] -= 1
    assert reached(basis, ranks) == len(basis["b_1"])
    kind = data.draw(st.sampled_from([kind for kind, rank in ranks.items() if rank]))
    assert reached(basis, ranks | {kind: ranks[kind] - 1}) < len(basis["b_1"])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_changes_reach_all_networks_of_width_16(norm: str) -> None:
    options: dict[str, Any] = {"norm": norm, "activation": "gelu", "gated": False}
    network = drawn(1, 16, 1, head_size=10, final_norm=False, **options)
    basis, ranks = slopes(network), bounds.necessary_ranks(network)
    assert reached(basis, ranks) == len(basis["b_1"])
    for kind in ("W_Q", "W_O", "W_2"):
        assert reached(basis, ranks | {kind: ranks[kind] - 1}) < len(basis["b_1"])
