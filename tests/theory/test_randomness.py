"""Random streams: each has its seed and its purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from lorapower import randomness

purposes = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 9)), max_size=3).map(tuple)


@given(seeds, purposes, seeds, purposes)
def test_equal_numbers_only_for_equal_seed_and_purpose(
    seed: int, purpose: tuple[Any, ...], other_seed: int, other: tuple[Any, ...]
) -> None:
    same = (seed, purpose) == (other_seed, other)
    one, two = (
        torch.rand(8, generator=randomness.generator(s, *p))
        for s, p in ((seed, purpose), (other_seed, other))
    )
    assert torch.equal(one, two) == same
    assert torch.equal(one, torch.rand(8, generator=randomness.generator(seed, *purpose)))


def test_all_bits_of_seeds_count() -> None:
    one, two = (torch.rand(8, generator=randomness.generator(s)) for s in (5, 5 + 2**32))
    assert not torch.equal(one, two)
    numbers = {randomness.number(seed, "x") for seed in range(100)}
    assert len(numbers) == 100
    assert all(0 <= value < 2**32 for value in numbers)


def test_seeded_leaves_the_global_numbers_as_they_were() -> None:
    before = torch.get_rng_state()
    with randomness.seeded(1, "module"):
        inside = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(4, generator=randomness.generator(1, "module")))
    with pytest.raises(ZeroDivisionError), randomness.seeded(1, "module"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
