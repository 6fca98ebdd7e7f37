"""Partitions of frozen layers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lorapower import bounds
from lorapower.constructions import fnn
from lorapower.networks import FNN, Partition
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
