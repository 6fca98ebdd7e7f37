"""Partitions of frozen layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorapower.networks import Partition


@given(st.integers(1, 20), st.data())
def test_uniform_blocks_are_equal_but_for_the_remainder(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    sizes = Partition.uniform(depth, count).sizes
    assert sum(sizes) == depth
    assert set(sizes[:-1]) <= {depth // count}
    assert sizes[-1] == depth // count + depth % count


def test_partitions_name_their_layers() -> None:
    assert Partition([2, 1, 3]).slices == [slice(0, 2), slice(2, 3), slice(3, 6)]
