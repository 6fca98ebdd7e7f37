"""The floor of adapters on all modules: what it counts, and what attains it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from strategies import normal, residual_pair
from torch import Tensor

from lorapower import bounds, lowrank, randomness
from lorapower.networks import Transformer
from records.floors import WholeFloor

KINDS: list[dict[str, Any]] = [
    {"activation": "gelu", "causal": True},
    {"norm": "rms", "activation": "gelu_tanh", "groups": 1, "rotary": 10.0},
    {"gated": True, "activation": "silu", "groups": 1},
    {"norm": "rms", "gated": True},
]


def pair(seed: int, *sizes: int, **options: Any) -> tuple[Transformer, Transformer]:
    """Two networks without hidden biases and second shifts."""
    frozen, target = (
        one.replace(**{k: 0 * getattr(one, k) for k in {"b_1", "b_3", "s_2"} & {*one.kinds}})
        for one in residual_pair(seed, *sizes, **options)
    )
    return frozen, target


def of_values(network: Transformer, k: Tensor) -> Tensor:
    """What attention adds behind many equal far tokens ``k``."""
    added = torch.zeros_like(k)
    for l, h in itertools.product(range(network.depth), range(network.heads)):
        group = h * network.groups // network.heads
        read = network.g_1[l][:, None] * k + network.s_1[l][:, None]
        added = added + network.W_O[l, h] @ network.W_V[l, group] @ read
    return added


@pytest.mark.parametrize("options", KINDS)
def test_without_rank_the_floor_is_the_variance_of_what_it_counts(options: Any) -> None:
    frozen, target = pair(2, 2, 5, 2, head_size=4, **options)
    floor, v = WholeFloor(frozen, target).at(0), normal(5, 40_000)
    n = bounds.directions(frozen, target, v)
    values = of_values(target, n) - of_values(frozen, n)
    assert float(floor.values) == pytest.approx(float(values.var(-1).mean()), rel=0.03)
    # Single tokens far out: what attention adds is affine.
    x = 1e7 * torch.stack([n, -n]).permute(2, 0, 1)[..., None]
    added = (target(x) - frozen(x))[..., 0]
    odd, even = ((added[:, 0] + sign * added[:, 1]).mT / 2 for sign in (-1, 1))
    part = even if options.get("gated") else odd - values + values.mean(-1, keepdim=True)
    assert float(floor.feed_forward) == pytest.approx(float(part.var(-1).mean()), rel=0.03)
    assert float(floor.value) == pytest.approx(float(floor.values + floor.feed_forward))
    # Of given tokens the covariance counts, also of few that lie in a plane.
    k = v[:, :2] @ normal(2, 30, seed=1)
    found, k = WholeFloor(frozen, target).at(0, k), bounds.directions(frozen, target, k)
    values = of_values(target, k) - of_values(frozen, k)
    assert float(found.values) == pytest.approx(float(values.var(-1, correction=0).mean()))
    assert found.feed_forward == floor.feed_forward


@pytest.mark.parametrize("options", KINDS)
def test_no_adapters_are_below_the_floor_and_it_falls_to_zero_with_rank(options: Any) -> None:
    frozen, target = pair(7, 1, 8, 1, **options)
    floors = [WholeFloor(frozen, target).at(R) for R in range(10)]
    for more, less in itertools.pairwise(floors):
        assert all(a >= b for a, b in zip(more, less, strict=True))
    assert floors[3].values > 0 == floors[4].value == floors[9].value
    draw = randomness.generator(7, "far pairs")
    k, n = bounds.directions(frozen, target, randomness.normal(draw, 8, 80)).chunk(2, 1)
    x = 1e6 * torch.cat([k.mT[..., None].expand(40, 8, 199), n.mT[..., None]], 2)
    for seed in range(4):
        draw, weights = randomness.generator(seed, "adapters"), []
        for W, wanted in zip(frozen.weights, target.weights, strict=True):
            best = lowrank.truncated_svd(wanted - W, 1)
            out = best.left + 0.1 * seed * randomness.normal(draw, *best.left.shape)
            weights.append(W + out @ best.right.mT)
        adapted = frozen.with_parameters(weights)
        assert (adapted(x) - target(x))[..., -1].square().mean() > floors[1].value > 0.02


@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_layers_count_only_where_their_parity_is_known(gated: bool) -> None:
    frozen, target = pair(9, 1, 6, 1, gated=gated)
    assert WholeFloor(frozen, target).at(0).feed_forward > 0
    for kind in {"b_1", "b_3", "s_2"} & {*frozen.kinds}:
        biased = target.replace(**{kind: getattr(target, kind) + 1})
        for one, two in ((frozen, biased), (biased, frozen)):
            floor = WholeFloor(one, two).at(0)
            assert floor.feed_forward == 0 < floor.values == floor.value
    assert WholeFloor(pair(9, 1, 6, 1, gated=not gated)[0], target).at(0).feed_forward == 0


def test_forms_of_wide_networks_are_unfolded_both_ways() -> None:
    frozen, target = pair(3, 2, 70, 1, head_size=2, hidden=3, gated=True)
    V, forms = frozen.basis(), torch.zeros(70, 69, 69).double()
    for sign, network in ((-1, frozen), (1, target)):
        for l in range(2):
            gate, up = (W[l] * network.g_2[l] @ V for W in (network.W_1, network.W_3))
            forms += sign * torch.einsum("of,fi,fj->oij", network.W_2[l], gate, up) / 2
    forms = (forms + forms.mT) / 2
    forms -= torch.eye(69) * forms.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    outer, inner = (lowrank.spectrum(x.flatten(1)).square() for x in (forms, forms.movedim(1, 0)))
    for out, into in ((0, 0), (1, 0), (0, 1), (2, 1)):
        left = outer[out:].sum() - 2 * inner[:into].sum()
        floor = WholeFloor(frozen, target).at({"W_2": out, "W_3": into})
        assert left > 0
        assert float(floor.feed_forward) == pytest.approx(2 * 70 / (69 * 71) * float(left))
