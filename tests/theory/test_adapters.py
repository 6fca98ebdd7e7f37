"""Adapters: merging, counting and picking members."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, normal, seeds
from torch import Tensor

from lorapower import InputError, randomness
from lorapower.adapters import Adapters
from lorapower.constructions import fnn, transformer
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork, Network, Transformer
from lorapower.regions import Ball
from lorapower.training import Fresh, Tuning, train


def random_adapters(
    network: Network, ranks: list[int], seed: int, *, biases: bool = False
) -> Adapters:
    draw = randomness.generator(seed, "test")

    def drawn(*shape: int) -> Tensor:
        return randomness.normal(draw, *network.batch_shape, *shape, dtype=network.dtype)

    updates = tuple(
        LowRank(*(drawn(n, R) for n in w.shape[-2:]))
        for w, R in zip(network.weights, ranks, strict=True)
    )
    return Adapters(updates, tuple(drawn(b.shape[-1]) for b in network.biases) if biases else ())


def parameters(network: Network) -> tuple[Tensor, ...]:
    return (*network.weights, *network.biases)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), batch_shapes, seeds)
def test_merge_adds_the_products_of_the_factors(
    ranks: list[int], batch: tuple[int, ...], seed: int
) -> None:
    network = FNN.random(len(ranks), 4, batch_shape=batch, seed=seed)
    adapters = random_adapters(network, ranks, seed, biases=True)
    before = [weight.clone() for weight in network.weights]
    merged = adapters.merge(network)
    for weight, update, old in zip(merged.weights, adapters.updates, before, strict=True):
        change = sum(
            (
                torch.einsum("...i,...j->...ij", update.left[..., d], update.right[..., d])
                for d in range(update.rank)
            ),
            torch.zeros_like(old),
        )
        torch.testing.assert_close(weight, old + change)
    assert all(torch.equal(w, old) for w, old in zip(network.weights, before, strict=True))
    assert adapters.ranks == tuple(ranks)
    for bias, change, old in zip(merged.biases, adapters.bias_updates, network.biases, strict=True):
        torch.testing.assert_close(bias, old + change)
    assert adapters.parameter_count == 8 * sum(ranks) + 4 * len(ranks)


def test_a_sum_that_is_not_finite_is_refused() -> None:
    network = LinearNetwork.random(1, 2)
    huge = torch.full((2, 1), 1e200, dtype=torch.float64)
    with pytest.raises(InputError, match="weight of layer 1 must be finite"):
        Adapters((LowRank(huge, huge),)).merge(network)


@given(batch_shapes, seeds, st.booleans())
def test_merging_keeps_the_type_of_the_network(
    batch: tuple[int, ...], seed: int, biases: bool
) -> None:
    network = FNN.random(2, 3, batch_shape=batch, seed=seed)
    adapters = random_adapters(network, [1, 2], seed, biases=biases)
    narrow = network.to(torch.float32)
    merged = adapters.merge(narrow)
    assert merged.dtype == torch.float32
    assert all(bias.dtype == torch.float32 for bias in merged.biases)
    # The sum is taken in double precision and rounded once.
    wanted = adapters.merge(narrow.to(torch.float64)).to(torch.float32)
    for found, sure in zip(parameters(merged), parameters(wanted), strict=True):
        assert torch.equal(found, sure)


# Of a batch of shape [2, 2]: what one may write into the brackets.
INDICES: list[Any] = [
    0,
    -1,
    (1, 0),
    slice(1),
    (slice(None), 1),
    ...,
    None,
    [1, 0],
    torch.tensor([[True, False], [True, True]]),
    torch.zeros(2, 2, dtype=torch.bool),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "fnn", "transformer"])
def test_members_are_those_of_the_network(kind: str, index: Any) -> None:
    network: Any
    wanted: Any
    if kind == "transformer":
        network = Transformer.random(1, 3, 2, batch_shape=(2, 2))
        wanted = Transformer.random(1, 3, 2, seed=1)
        adapters = transformer.adapt(network, wanted, 2).adapters
    elif kind == "fnn":
        network = FNN.random(2, 3, batch_shape=(2, 1))
        # The target's batch makes the adapters' wider than the network's own.
        wanted = FNN.random(1, 3, batch_shape=(2,), seed=1)
        adapters = fnn.adapt(network, wanted, 1, Ball(1.0)).adapters
        network = network.map(lambda v: v.expand(2, 2, *v.shape[2:]))
    else:
        network = LinearNetwork.random(2, 3, batch_shape=(2, 2))
        adapters = random_adapters(network, [2, 0], 0)
    picked = adapters[index]
    assert picked.ranks == adapters.ranks
    assert picked.parameter_count == adapters.parameter_count
    if not torch.arange(4).reshape(2, 2)[index].numel():
        assert picked.batch_shape == (0,)
        return
    found, sure = picked.merge(network[index]), adapters.merge(network)[index]
    assert picked.batch_shape == found.batch_shape == sure.batch_shape
    for one, other in zip(parameters(found), parameters(sure), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [2, (0, 0, 0), torch.ones(3, dtype=torch.bool)], ids=str)
def test_an_index_that_the_batch_does_not_have_is_refused(index: Any) -> None:
    network = LinearNetwork.random(2, 3, batch_shape=(2, 2))
    for batch in (network, random_adapters(network, [1, 1], 0)):
        with pytest.raises(IndexError):
            batch[index]


# Widths 5 → 6 → 4 → 3: ranks of the adapters, and how many numbers they and the biases have.
OWN: list[tuple[Tuning, tuple[int, ...], int]] = [
    (Tuning(2), (2, 2, 2), 2 * (11 + 10 + 7) + 13),
    (Tuning(5), (5, 4, 3), 5 * 11 + 4 * 10 + 3 * 7 + 13),
    (Tuning((0, 3, 1), biases=False), (0, 3, 1), 3 * 10 + 7),
    (Tuning(0), (0, 0, 0), 13),
    (Tuning(final=1), (0, 0, 0), 3),
    (Tuning(final=2, biases=False), (0, 0, 0), 0),
]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_runs_of_training_have_ranks_and_counts_of_their_own(batch: tuple[int, ...]) -> None:
    sides = 5, 6, 4, 3
    weights = [normal(*batch, o, i).float() for i, o in pairwise(sides)]
    biases = [normal(*batch, o).float() for o in sides[1:]]
    frozen = FNN(weights, biases)

    def labelled(x: Tensor) -> Tensor:
        return x[..., :3, :]

    runs = train(frozen, [tuning for tuning, _, _ in OWN], Fresh(labelled, (5,)), steps=3)
    assert runs.adapters.ranks == (5, 4, 3)
    with pytest.raises(InputError, match=r"tune equally many .*some that tune \[0, 3, .*pick one"):
        _ = runs.adapters.parameter_count
    for i, (tuning, ranks, count) in enumerate(OWN):
        own = runs.adapters[i]
        assert own.ranks == ranks
        assert own.parameter_count == count
        assert bool(own.bias_updates) == tuning.biases
        if not tuning.final:
            merged, sure = own.merge(frozen), runs.network[i]
            for one, other in zip(merged.weights, sure.weights, strict=True):
                assert torch.equal(one, other)
            for one, other in zip(merged.biases, sure.biases, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    both = runs.adapters[[0, 2]]
    assert both.ranks == (2, 3, 2)
    assert [both[0].ranks, both[1].ranks] == [(2, 2, 2), (0, 3, 1)]
    assert not both[1].bias_updates
    assert runs.adapters[[3, 3]].parameter_count == 13
