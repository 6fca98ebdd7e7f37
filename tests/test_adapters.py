"""Adapters: merging, unmerging, counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, seeds

from lorapower import InputError, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import LinearNetwork


def random_adapters(network: LinearNetwork, ranks: list[int], seed: int) -> Adapters:
    generator = randomness.generator(seed, "test")
    return Adapters(
        tuple(
            LowRank(
                *(
                    torch.randn(*network.batch_shape, n, R, generator=generator).double()
                    for n in w.shape[-2:]
                )
            )
            for w, R in zip(network.weights, ranks, strict=True)
        )
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), batch_shapes, seeds)
def test_merge_adds_the_products_of_the_factors_and_unmerge_takes_them_away(
    ranks: list[int], batch: tuple[int, ...], seed: int
) -> None:
    network = LinearNetwork.random(len(ranks), 4, batch_shape=batch, seed=seed)
    adapters = random_adapters(network, ranks, seed)
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
    for weight, old in zip(adapters.unmerge(merged).weights, before, strict=True):
        torch.testing.assert_close(weight, old)
    assert all(torch.equal(w, old) for w, old in zip(network.weights, before, strict=True))
    assert adapters.ranks == tuple(ranks)
    assert adapters.parameter_count == 8 * sum(ranks)


def test_adapters_of_another_network_are_refused() -> None:
    network = LinearNetwork.random(2, 4)
    with pytest.raises(InputError, match=r"network must be of weights \[\(4, 4\), \(4, 4\)\]"):
        random_adapters(network, [1, 1], 0).merge(LinearNetwork.random(2, 5))


def test_a_sum_that_is_not_finite_is_refused() -> None:
    network = LinearNetwork.random(1, 2)
    huge = torch.full((2, 1), 1e200, dtype=torch.float64)
    with pytest.raises(InputError, match="weight of layer 1 must be finite"):
        Adapters((LowRank(huge, huge),)).merge(network)
