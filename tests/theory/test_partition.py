"""Partitions, and the search for the best one against exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, of_widths, seeds

from lorapower import InputError, bounds, randomness
from lorapower.constructions import fnn
from lorapower.networks import FNN, Partition, blocks
from lorapower.regions import Ball


def every_partition(depth: int, count: int) -> Iterator[Partition]:
    for cuts in combinations(range(1, depth), count - 1):
        yield Partition([end - start for start, end in pairwise((0, *cuts, depth))])


@given(st.integers(1, 20), st.data())
def test_uniform_blocks_are_equal_but_for_the_remainder(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    sizes = Partition.uniform(depth, count).sizes
    assert sum(sizes) == depth
    assert set(sizes[:-1]) <= {depth // count}
    assert sizes[-1] == depth // count + depth % count


def test_partitions_name_their_layers() -> None:
    assert Partition([2, 1, 3]).slices == [slice(0, 2), slice(2, 3), slice(3, 6)]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), seeds)
def test_every_partition_is_exact_at_its_own_threshold(
    width: int, count: int, more: int, seed: int
) -> None:
    frozen = FNN.random(count + more, width, seed=seed)
    target = FNN.random(count, width, seed=seed + 1)
    for sizes in every_partition(frozen.depth, count):
        rank = int(bounds.fnn_threshold(frozen, target, sizes))
        found = fnn.adapt(frozen, target, rank, Ball(2.0), sizes, throw=False)
        assert found.partition == sizes
        if found.digits_lost.max() + found.rounding_errors.max().log10() + 16 > 10:
            continue  # too ill-conditioned to tell exact from nearly so
        x = found.region.sample(50, edge=True, seed=seed)
        assert (found.adapters.merge(frozen)(x) - target(x)).abs().max() < 1e-6


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 2), seeds)
def test_the_search_finds_what_exhaustive_search_finds(
    width: int, count: int, more: int, near: int, seed: int
) -> None:
    depth = count + more
    frozen = FNN.random(depth, width, batch_shape=(2,), seed=seed)
    target = FNN.random(count, width, batch_shape=(2,), seed=seed + 1)
    # Some target layers are products of frozen ones, so that partitions differ in rank.
    weights = list(target.weights)
    for i in range(min(near, count)):
        weights[i] = blocks(frozen, target)[i].frozen.product()
    target = FNN(weights, target.biases)
    every = list(every_partition(depth, count))

    ranks = torch.stack([bounds.fnn_threshold(frozen, target, p) for p in every])
    least = bounds.least_rank(frozen, target)
    assert torch.equal(least.value, ranks.amin(0))
    generator = randomness.generator(seed, "test")
    given_ranks = torch.randint(0, width + 1, (depth,), generator=generator).tolist()
    x = normal(width, 30, seed=seed)
    for inputs in (x, 3.0):
        errors = torch.stack(
            [bounds.fnn_error(frozen, target, given_ranks, inputs, p) for p in every]
        )
        best = bounds.least_error(frozen, target, given_ranks, inputs)
        torch.testing.assert_close(best.value, errors.amin(0))
        for member in range(2):
            chosen = every.index(best.partition(member))
            torch.testing.assert_close(errors[chosen, member], errors[:, member].amin())
    for member in range(2):
        assert ranks[every.index(least.partition(member)), member] == least.value[member]


@given(st.booleans(), seeds, st.data())
def test_the_search_passes_over_blocks_that_are_too_narrow(
    linear_last: bool, seed: int, data: st.DataObject
) -> None:
    sizes = st.integers(1, 5)
    widths = data.draw(st.lists(sizes, min_size=2, max_size=6))
    outline = data.draw(st.lists(sizes, min_size=2, max_size=len(widths)))
    frozen = of_widths(widths, linear_last=linear_last, seed=seed, purpose="frozen")
    target = of_widths(outline, linear_last=linear_last, seed=seed, purpose="target")
    needed = {}
    for cut in every_partition(frozen.depth, target.depth):
        with suppress(InputError):
            needed[cut] = int(bounds.fnn_threshold(frozen, target, cut))
    if needed:
        best = bounds.least_rank(frozen, target)
        assert best.value == min(needed.values()) == needed[best.partition()]
    else:
        with pytest.raises(InputError, match="target must be no deeper and no wider"):
            bounds.least_rank(frozen, target)
