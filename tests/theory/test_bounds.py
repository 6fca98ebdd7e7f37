"""Thresholds and error bounds of linear and of ReLU networks against measured errors."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds
from torch import Tensor

from lorapower import bounds
from lorapower.constructions import fnn
from lorapower.networks import FNN, Partition
from lorapower.regions import Ball, Box, Samples


def product(frozen: FNN, layers: slice) -> np.ndarray:
    """Computed by numpy."""
    return reduce(lambda P, W: W.numpy() @ P, frozen.weights[layers], np.eye(frozen.widths[0]))


def rms(difference: Tensor) -> Tensor:
    return difference.square().sum(-2).mean(-1).sqrt()


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["ball", "box"]),
    st.booleans(),
    seeds,
    st.data(),
)
def test_bounds_hold_for_any_ranks_and_partition(
    width: int, layers: int, size: int, kind: str, linear_last: bool, seed: int, data: st.DataObject
) -> None:
    depth = layers * size
    frozen, target = (
        FNN.random(count, width, linear_last=linear_last, seed=seed + shift)
        for shift, count in enumerate((depth, layers))
    )
    ranks = data.draw(st.lists(st.integers(0, width), min_size=depth, max_size=depth))
    cuts = data.draw(
        st.sets(st.integers(1, depth - 1), min_size=layers - 1, max_size=layers - 1)
        if depth > 1
        else st.just(set())
    )
    ends = [0, *sorted(cuts), depth]
    sizes = Partition([b - a for a, b in pairwise(ends)])
    region = Ball(3.0, 0.5) if kind == "ball" else Box(-2.0, 1.0)
    found = fnn.adapt(frozen, target, ranks, region, sizes, throw=False)
    adapted = found.adapters.merge(frozen)
    for block, weight, error in zip(sizes.slices, target.weights, found.block_errors, strict=True):
        E = weight.numpy() - product(frozen, block)
        sigma = np.append(np.linalg.svd(E, compute_uv=False), 0.0)
        assert float(error) == pytest.approx(sigma[min(sum(ranks[block]), width)], abs=1e-9)
    lost = 10 ** float(found.digits_lost.max()) * 1e-14 + 1e2 * float(found.rounding_errors.max())
    for edge in (False, True):
        x = found.region.sample(300, edge=edge, seed=seed)
        difference = adapted(x) - target(x)
        allowed = lost * (1 + float(target(x).abs().max()))
        assert rms(difference) <= bounds.fnn_error_on(frozen, target, ranks, x, sizes) + allowed
        assert rms(difference) <= bounds.fnn_error(frozen, target, ranks, x, sizes) + allowed


def test_the_bound_takes_the_trace_of_the_second_moment() -> None:
    # E = σI and Σ = I: the error before the ReLU is σ²D, more than σ² times the norm √D of Σ.
    D, sigma = 16, 0.5
    frozen = FNN(torch.eye(D).expand(2, D, D), torch.zeros(2, D))
    target = FNN([(1 + sigma) * torch.eye(D)], [torch.full((D,), 9.0)])
    x = normal(D, 20000).float()
    found = fnn.adapt(frozen, target, 0, Samples(x))
    squared = rms(found.adapters.merge(frozen)(x) - target(x)) ** 2
    assert squared > 0.9 * sigma**2 * D
    assert squared <= bounds.fnn_error(frozen, target, 0, x.square().sum(0).mean()) ** 2 * 1.001
    assert bounds.fnn_error(frozen, target, 0, float(D)) ** 2 == pytest.approx(sigma**2 * D)
