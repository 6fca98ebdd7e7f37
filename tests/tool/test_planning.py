"""Directions in two metrics, and ranks for a budget, against theory and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapower import randomness
from lorapower.checkpoints import Module, metrics, planner
from lorapower.checkpoints.metrics import Moments

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return randomness.normal(randomness.generator(seed, "drawn"), *shape)


def moments(seed: int, out: int, into: int, samples: int, gradients: int) -> Moments:
    return Moments(
        drawn(seed + 1, samples, into) / samples**0.5,
        drawn(seed + 2, into),
        drawn(seed + 3, gradients, out) / gradients**0.5,
    )


@given(SEEDS, SIZES, SIZES, st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_predicted_error_of_directions_is_the_error(
    seed: int, out: int, into: int, samples: int, gradients: int, rank: int
) -> None:
    E, about = drawn(seed, out, into), moments(seed, out, into, samples, gradients)
    R = about.root()
    assert R is not None
    nowhere = torch.eye(into, dtype=torch.float64), torch.eye(out, dtype=torch.float64)
    for given_moments, (Z, left) in ((None, nowhere), (about, (about.inputs, R))):
        one = metrics.directions(E, given_moments, 9)
        r = min(rank, len(one.values))
        K = one.update.leading(r).matrix()
        error = (left @ (E - K) @ Z.mT).square().sum()
        predicted = one.total - one.values[:r].square().sum()
        assert error == pytest.approx(float(predicted), abs=1e-9 * (1 + one.total))
        # No other matrix of this rank does better: the singular values say so.
        tail = torch.linalg.svdvals(left @ E @ Z.mT)[r:].square().sum()
        assert error == pytest.approx(float(tail), abs=1e-9 * (1 + one.total))
        assert torch.allclose(one.bias(r), (E - K) @ one.mean)


def test_what_no_output_depends_on_gets_no_rank() -> None:
    about = moments(0, 4, 3, 5, 5)._replace(outputs=torch.zeros(5, 4))
    one = metrics.directions(drawn(0, 4, 3), about, 3)
    assert one.values.numel() == one.total == 0
    assert torch.allclose(one.bias(0), drawn(0, 4, 3) @ about.mean)


def modules(costs: list[int]) -> dict[str, Module]:
    return {
        f"m{i}": Module(f"m{i}", "mlp", (cost - 1, 1), True, False) for i, cost in enumerate(costs)
    }


@given(
    st.lists(
        st.tuples(st.integers(2, 5), st.lists(st.integers(1, 30), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 30),
)
def test_allocation_is_optimal_up_to_one_item(
    given_modules: list[tuple[int, list[int]]], budget: int
) -> None:
    known = modules([cost for cost, _ in given_modules])
    values = {
        name: torch.tensor(sorted(found, reverse=True), dtype=torch.float64).sqrt()
        for name, (_, found) in zip(known, given_modules, strict=True)
    }
    path = metrics.allocate(values, known)
    ranks = path.ranks(budget)
    assert planner._cost(ranks, known) <= budget

    def gain(chosen: dict[str, int]) -> float:
        return sum(float(values[name][:r].square().sum()) for name, r in chosen.items())

    best = 0.0
    for choice in itertools.product(*(range(len(found) + 1) for found in values.values())):
        trial = dict(zip(known, choice, strict=True))
        if planner._cost(trial, known) <= budget:
            best = max(best, gain(trial))
    taken = sum(ranks.values())
    following = path.after(taken + 1)
    assert best < gain(following) + 1e-9 or best == pytest.approx(gain(ranks))
    if planner._cost(ranks, known) == budget:
        assert gain(ranks) == pytest.approx(best)


@given(st.integers(1, 4), st.integers(0, 200))
def test_ranks_in_buckets_are_multiples_or_the_most(step: int, budget: int) -> None:
    known = modules([3, 5])
    values = {name: drawn(i, 7).abs().sort(descending=True).values for i, name in enumerate(known)}
    ranks = metrics.allocate(values, known, step).ranks(budget)
    assert planner._cost(ranks, known) <= budget
    assert all(r % step == 0 or r == 7 for r in ranks.values())


@given(st.integers(0, 300))
def test_rules_of_others_keep_to_what_there_is(budget: int) -> None:
    known = {n: Module(n, "mlp", (9, 6), True, False) for n in "abc"}
    found = {n: metrics.directions(drawn(i, 8, 6), None, 6) for i, n in enumerate(known)}
    ranks = planner._by_energy(found, known, budget)
    least = planner._cost(dict.fromkeys(known, 1), known)
    assert planner._cost(ranks, known) <= max(budget, least)
    assert all(1 <= rank <= 6 for rank in ranks.values())
    if budget >= least:

        def share(name: str, rank: int) -> float:
            return float(found[name].values[:rank].square().sum()) / found[name].total

        before = [share(name, rank - 1) for name, rank in ranks.items()]
        assert max(before) <= min(share(name, rank) for name, rank in ranks.items()) + 1e-9


def test_uniform_ranks_stop_at_the_smaller_side() -> None:
    known = {
        "wide": Module("wide", "mlp", (9, 6), True, False),
        "thin": Module("thin", "mlp", (2, 8), True, False),
    }
    assert planner._uniform(known, 4) == {"wide": 4, "thin": 2}
