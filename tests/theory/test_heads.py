"""Heads of transformers far out, and what adapters leave of their differences."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lorapower import InputError, bounds, randomness
from lorapower.bounds import head_tails, heads
from lorapower.networks import Decoder

kinds = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(["rms", "layer"]),
        "head_size": st.sampled_from([2, 4, 8]),
        "groups": st.sampled_from([None, 1]),
        "final_norm": st.booleans(),
    }
)


def products(network: Decoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute ``A`` and ``M`` of each head by numpy, from the weights."""
    V = network.basis().numpy()
    parts = {name: part.numpy() for name, part in network.parameters.items()}
    found = []
    for l in range(network.depth):
        B = parts["g_1"][l][:, None] * V
        for h in range(network.heads):
            shared = h * network.groups // network.heads
            W_Q, W_O = parts["W_Q"][l, h], parts["W_O"][l, h]
            W_K, W_V = parts["W_K"][l, shared], parts["W_V"][l, shared]
            M = W_O @ W_V @ B
            found.append((B.T @ W_K.T @ W_Q @ B, V.T @ M if "g_f" in parts else M))
    return found


def tail(matrix: np.ndarray, rank: int) -> float:
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


@given(st.integers(1, 2), kinds, st.tuples(st.integers(0, 9), st.integers(0, 9)), seeds)
def test_tails_are_the_least_over_all_orders_of_heads(
    blocks: int, kind: dict[str, Any], ranks: tuple[int, int], seed: int
) -> None:
    frozen, target = (
        Decoder.random(blocks, 6, 2, residual=True, purpose=side, seed=seed, **kind)
        for side in ("frozen", "target")
    )
    ours, theirs = products(frozen), products(target)
    costs = {
        order: sum(
            tail(theirs[h][part] - ours[g][part], ranks[part])
            for g, h in enumerate(order)
            for part in (0, 1)
        )
        for order in permutations(range(len(ours)))
    }
    total, order = head_tails(frozen, target).least(*ranks)
    size = sum(tail(matrix, 0) for pair in theirs for matrix in pair)
    assert total == pytest.approx(min(costs.values()), abs=1e-11 * size)
    assert costs[tuple(order.tolist())] == pytest.approx(total, abs=1e-11 * size)


@given(kinds, st.lists(st.integers(0, 3), min_size=4, max_size=4), seeds)
def test_no_adapters_come_closer_than_the_tails(
    kind: dict[str, Any], ranks: list[int], seed: int
) -> None:
    frozen, target = (
        Decoder.random(1, 6, 3, residual=True, purpose=side, seed=seed, **kind | {"groups": None})
        for side in ("frozen", "target")
    )
    draw = randomness.generator(seed, "adapters")
    changed = {}
    for name, rank in zip(("W_Q", "W_K", "W_V", "W_O"), ranks, strict=True):
        W = frozen.parameters[name]
        left, right = (randomness.normal(draw, *W.shape[:2], n, rank) for n in W.shape[-2:])
        changed[name] = W + left @ right.mT
    adapted = frozen.replace(**changed)
    sums = ranks[0] + ranks[1], ranks[2] + ranks[3]
    # What adapters reach they leave nothing of.
    reached, _ = head_tails(frozen, adapted).least(*sums)
    size = sum(tail(matrix, 0) for pair in products(adapted) for matrix in pair)
    assert reached <= 1e-10 * size
    left_over = sum(
        tail(wanted - made, 0)
        for pairs in zip(products(target), products(adapted), strict=True)
        for wanted, made in zip(*pairs, strict=True)
    )
    assert head_tails(frozen, target).least(*sums)[0] <= left_over * (1 + 1e-9)


def test_heads_give_the_scores_and_what_a_token_adds_far_out() -> None:
    network = Decoder.random(2, 6, 2, residual=True, norm="layer", head_size=3)
    found, n = heads(network), randomness.normal(randomness.generator(0, "tokens"), 6, 5)
    xi = bounds.directions(network, network, n)
    inner = network.basis().mT @ xi
    scores = network.replace(eps=0.0).scores(0, xi)
    made = inner.mT @ (found.keys @ found.queries @ inner + found.a[..., None])
    # The softmax ignores what is the same for all keys.
    torch.testing.assert_close(
        made[:2] - made[:2, :1], scores - scores[..., :1, :], rtol=1e-9, atol=1e-9
    )
    values = network.W_V[0] @ (network.g_1[0, :, None] * xi)
    added = network.W_O[0] @ values
    torch.testing.assert_close((found.outputs @ found.values @ inner)[:2], added)


def test_float32_and_equal_heads_are_no_obstacle() -> None:
    frozen = Decoder.random(2, 6, 2, residual=True, norm="layer", head_size=2).to(torch.float32)
    W_Q = frozen.W_Q + torch.outer(torch.ones(2), torch.ones(6))
    for target, rank in ((frozen, 0), (frozen.replace(W_Q=W_Q), 1)):
        least, order = head_tails(frozen, target).least(rank, 0)
        assert least < 1e-10
        assert order.tolist() == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused() -> None:
    frozen = Decoder.random(1, 6, 2, residual=True, norm="rms")
    with pytest.raises(InputError, match="2 heads in all"):
        head_tails(frozen, Decoder.random(1, 6, 3, residual=True, norm="rms"))
    with pytest.raises(InputError, match="norm"):
        head_tails(frozen, Decoder.random(1, 6, 2, residual=True, norm="layer"))
    for kind in ({"final_norm": True}, {"rotary": 100.0}):
        other = Decoder.random(1, 6, 2, residual=True, norm="rms", head_size=2, **kind)
        with pytest.raises(InputError, match=next(iter(kind))):
            head_tails(frozen, other)
    with pytest.raises(InputError, match="from_decoder"):
        heads(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="residual connections and norms"):
        heads(Decoder.random(1, 6, 2, residual=True))
    with pytest.raises(InputError, match="scores_rank"):
        head_tails(frozen, frozen).least(-1, 0)
