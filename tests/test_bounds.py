"""Rank thresholds and the least error of linear networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import conditioned, seeds

from lorapower import InputError, bounds, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import Gap, LinearNetwork


@given(st.integers(1, 5), st.integers(1, 8), st.data(), seeds)
def test_threshold_of_a_target_that_adapters_made(
    depth: int, width: int, data: st.DataObject, seed: int
) -> None:
    frozen = conditioned(depth, width, seed=seed)
    ranks = data.draw(st.lists(st.integers(0, 2), min_size=depth, max_size=depth))
    ranks = [min(rank, width) for rank in ranks]
    generator = randomness.generator(seed, "test")
    updates = [
        LowRank(*torch.randn(2, width, rank, generator=generator, dtype=torch.float64))
        for rank in ranks
    ]
    target = Adapters(tuple(updates)).merge(frozen)
    expected = min(sum(ranks), width)
    assert Gap(frozen, target).rank == expected
    assert bounds.linear_threshold(frozen, target) == -(-expected // depth)
    spectral, frobenius = bounds.linear_error(frozen, target, expected)
    rounding = 1e-13 * float(Gap(frozen, target).rounding_scale)
    assert spectral <= rounding
    assert frobenius <= rounding
    if expected:
        assert bounds.linear_error(frozen, target, expected - 1).spectral > rounding


def test_a_batch_has_one_threshold_for_each_member() -> None:
    frozen = LinearNetwork(torch.zeros(1, 3, 3))
    diagonals = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 2, 3]])
    target = LinearNetwork([torch.diag_embed(diagonals)])
    assert bounds.linear_threshold(frozen, target).tolist() == [0, 1, 3]


def test_networks_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="of 2 inputs and 2 outputs"):
        bounds.linear_threshold(LinearNetwork.random(1, 2), LinearNetwork.random(1, 3))
