"""Random streams: each has its seed and its purpose."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
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


def test_the_state_is_that_of_the_mersenne_twister_of_numpy() -> None:
    limit = 2**20  # for far larger ones torch takes 64 bits a number
    ours = torch.randint(limit, (700,), generator=randomness.generator(3, "a", 1))
    twister = np.random.MT19937(randomness._sequence(3, ("a", 1)))
    twister.random_raw()  # the last of the words as they were given, which torch leaves out
    assert ours.tolist() == [int(twister.random_raw()) % limit for _ in range(700)]


def test_all_bits_of_seeds_count() -> None:
    one, two = (torch.rand(8, generator=randomness.generator(s)) for s in (5, 5 + 2**32))
    assert not torch.equal(one, two)
    numbers = {randomness.number(seed, "x") for seed in range(100)}
    assert len(numbers) == 100
    assert all(0 <= value < 2**32 for value in numbers)


def test_seeded_leaves_the_global_numbers_as_they_were() -> None:
    before = torch.get_rng_state()
    with randomness.seeded(1, "module"):
        inside = torch.rand(4)  # bare, to show it
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(4, generator=randomness.generator(1, "module")))
    with pytest.raises(ZeroDivisionError), randomness.seeded(1, "module"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def calls(path: Path, names: set[str]) -> Iterator[ast.Call]:
    """Find the calls of functions of these names, whatever they are an attribute of."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in names:
            yield node


def test_each_place_of_the_package_has_purposes_of_its_own() -> None:
    purposes = [
        ", ".join(map(ast.unparse, call.args[1:]))
        for path in (ROOT / "lorapower").rglob("*.py")
        for call in calls(path, {"generator", "seeded", "number"})
    ]
    named = Counter(purpose for purpose in purposes if "'" in purpose)
    assert len(named) >= 15
    assert {purpose for purpose, count in named.items() if count > 1} == set()


def test_nothing_is_drawn_without_a_stream() -> None:
    draws = {"randn", "rand", "randint", "randperm", "default_rng", "Random"}
    for path in [*(ROOT / "lorapower").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for call in calls(path, {*draws, "manual_seed", "manual_seed_all"}):
            bare = ast.unparse(call.func).startswith("torch") and not any(
                word.arg == "generator" for word in call.keywords
            )
            shown = lines[call.lineno - 1].endswith("# bare, to show it")
            assert shown or (call.args and not bare), f"{path.name}, line {call.lineno}"
