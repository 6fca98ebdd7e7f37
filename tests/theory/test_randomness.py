"""Random streams: each has its purpose, and no two have anything in common."""

from __future__ import annotations

import ast
import itertools
import math
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

from lorapower import networks, randomness
from lorapower.experiments import digits, synthetic
from lorapower.experiments.study import Lora
from lorapower.training import Fresh, Tuning, train

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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, ...]]:
    """How often each stream was begun."""
    count: Counter[tuple[Any, ...]] = Counter()
    original = randomness.generator

    def counted(seed: int, *purpose: str | int) -> torch.Generator:
        count[seed, *purpose] += 1
        return original(seed, *purpose)

    monkeypatch.setattr(randomness, "generator", counted)
    monkeypatch.setattr(digits, "generator", counted)
    return count


PROBLEMS: list[dict[str, Any]] = [
    {"model": "linear", "depth": 2, "distance_rank": 2, "distance": 0.5},
    {"model": "fnn", "depth": 2, "distance_rank": 2, "distance": 0.5, "fixed": True},
    {"model": "transformer", "depth": 1, "tokens": 3},
    {"model": "fnn", "depth": 2, "pretraining": synthetic.PRETRAINED},
    {"model": "transformer", "depth": 1, "tokens": 3, "pretraining": synthetic.PRETRAINED},
]


def run(problem: dict[str, Any]) -> None:
    whole = synthetic.Problem(width=4, steps=100, every=50, **problem)
    synthetic.measure([synthetic.Setting(problem=whole, method=Lora(ranks=1))])


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_a_run_uses_each_stream_for_one_thing(
    problem: dict[str, Any], drawn: Counter[tuple[Any, ...]]
) -> None:
    run(problem)
    assert len(drawn) >= 7, "the spy saw nothing"
    # The inputs of the first block are also the training set, where that is fixed.
    twice = {stream for stream, times in drawn.items() if times > 1}
    assert twice <= ({(0, "inputs", 0)} if problem.get("fixed") else set())


def test_digits_use_each_stream_for_one_thing(
    drawn: Counter[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 50)
    # A seed of which nothing is kept from other tests.
    problem = digits.Problem(depth=3, steps=50, seed=97531)
    digits.measure([digits.Setting(problem=problem, method=Lora(ranks=1))])
    assert len([stream for stream in drawn if "order" in stream]) >= 4
    # Each task has the same split.
    assert {stream[1:] for stream, times in drawn.items() if times > 1} <= {("split",)}


def test_every_pair_of_streams_is_uncorrelated(drawn: Counter[tuple[Any, ...]]) -> None:
    """All streams that a run begins, at seeds 0 to 99: their uniform and their normal numbers."""
    for problem in PROBLEMS:
        run(problem)
    network = networks.FNN.random(2, 4)
    train(network, [Tuning(1)], Fresh(network, (4,), samples=8), steps=60)
    digits._task("fnn", 0.0, 0)
    names = sorted({stream[1:] for stream in drawn}, key=repr)
    assert len(names) >= 15
    size, rows = 512, []
    for seed, name in itertools.product(range(100), names):
        for draw in (torch.rand, torch.randn):
            rows.append(draw(size, generator=randomness.generator(seed, *name), dtype=torch.double))
    values = torch.stack(rows)
    # The uniform and the normal numbers of one stream are made of the same bits.
    values -= values.mean(1, keepdim=True)
    values /= torch.linalg.vector_norm(values, dim=1, keepdim=True)
    correlations = (values @ values.mT).abs()
    stream = torch.arange(len(values)) // 2
    correlations[stream[:, None] == stream] = 0
    pairs = len(values) ** 2 / 2
    # With this many independent pairs a larger one occurs in one of a thousand runs.
    limit = math.sqrt(2 * math.log(1000 * pairs) / size)
    assert float(correlations.max()) < limit


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
