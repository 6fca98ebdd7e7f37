"""Ranks and factors of other tools, and of peft those that it makes itself."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraplan import Module, Pair, save_peft
from loraplan.lab import LowRank
from lorapower import lowrank, randomness
from lorapower.lowrank import SVD
from records import neighbours

# Ranks by each tool's number, as its source defines them.
Values = NDArray[np.float64]
DEFINITIONS: dict[str, Callable[[Values, float], int]] = {
    "peft, energy": lambda s, t: next(
        k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= t * (s**2).sum()
    ),
    "kohya, sv_ratio": lambda s, t: int((s > s[0] / t).sum()),
    "kohya, sv_cumulative": lambda s, t: next(
        k for k in range(1, len(s) + 1) if s[:k].sum() >= t * s.sum()
    ),
    "PARA": lambda s, t: int((s >= 1 / t).sum()),
}


def decompositions() -> tuple[dict[str, SVD], dict[str, Module]]:
    changes, modules = {}, {}
    for name, (out, into) in {"a": (12, 9), "b": (8, 8), "c": (5, 20)}.items():
        draw = randomness.generator(0, name)
        change = out * randomness.normal(draw, out, into) * 0.7 ** torch.arange(into)
        changes[name] = lowrank.svd(change)
        modules[name] = Module(name, "mlp", (out, into), False, False)
    return changes, modules


def cost(ranks: dict[str, int], modules: dict[str, Module]) -> int:
    return sum(modules[name].cost * rank for name, rank in ranks.items())


@pytest.mark.parametrize("rule", neighbours.RULES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_threshold_is_the_largest_that_parameters_pay_for(rule: str, rank: int) -> None:
    changes, modules = decompositions()
    parameters = rank * sum(module.cost for module in modules.values())
    threshold, adapter = neighbours.choose(rule, changes, modules, parameters)
    every = torch.cat([neighbours.RULES[rule](c.S.double()) for c in changes.values()])
    above = float(every[every > threshold].min())

    def ranks(number: float) -> dict[str, int]:
        return {n: DEFINITIONS[rule](c.S.double().numpy(), number) for n, c in changes.items()}

    chosen = ranks((threshold + above) / 2)
    assert {name: rank for name, rank in chosen.items() if rank} == adapter.ranks
    # At rank 1 all rules but one keep a direction of each module.
    assert rank > 1 or (adapter.ranks == dict.fromkeys(modules, 1)) == (rule != "PARA")
    assert cost(chosen, modules) == adapter.parameters <= parameters
    assert cost(ranks(above * (1 + 1e-9)), modules) > parameters
    for name, factors in adapter.factors.items():
        U, S, V = changes[name]
        cut = (U * S * (torch.arange(len(S)) < factors.rank)) @ V.mT
        torch.testing.assert_close(factors.matrix(), cut)


def test_factors_are_those_that_peft_converts_to(tmp_path: Path) -> None:
    """Of an adapter with changes of full rank, by the same share."""
    from peft import PeftModel, convert_to_lora

    base, tuned = files.pair(tmp_path, "LlamaForCausalLM", change=files.low_rank(12))
    pair = Pair.open(base, tuned)
    whole = {name: pair.change(name) for name in pair.modules}
    updates = {name: LowRank(E, torch.eye(E.shape[1])) for name, E in whole.items()}
    save_peft(tmp_path / "whole", pair.network(), updates)
    changes = {name: lowrank.svd(E) for name, E in whole.items()}
    parameters = 5 * sum(module.cost for module in pair.modules.values()) // 2
    share, adapter = neighbours.choose("peft, energy", changes, pair.modules, parameters)
    assert len({*adapter.ranks.values()}) > 1
    with warnings.catch_warnings(action="ignore"):
        # It warns that it is one of LoRA already.
        network = PeftModel.from_pretrained(pair.network("base"), str(tmp_path / "whole"))
        _, tensors = convert_to_lora(network, share + 1e-6)
    for name, factors in adapter.factors.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert len(A) == factors.rank
        torch.testing.assert_close(B @ A, factors.matrix(), rtol=1e-4, atol=1e-5)


@given(
    st.lists(
        st.tuples(st.integers(2, 5), st.lists(st.integers(1, 30), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 30),
)
def test_allocation_is_optimal_up_to_one_item(
    drawn: list[tuple[int, list[int]]], budget: int
) -> None:
    modules = {
        f"m{i}": Module(f"m{i}", "mlp", (c - 1, 1), True, False) for i, (c, _) in enumerate(drawn)
    }
    values = {
        name: torch.tensor(sorted(found, reverse=True), dtype=torch.float64).sqrt()
        for name, (_, found) in zip(modules, drawn, strict=True)
    }

    def gain(chosen: dict[str, int]) -> float:
        return sum(float(values[name][:r].square().sum()) for name, r in chosen.items())

    path = neighbours.allocate(values, modules)
    ranks = path.ranks(budget)
    following = path.after(sum(ranks.values()) + 1)
    choices = itertools.product(*(range(len(found) + 1) for found in values.values()))
    trials = [dict(zip(modules, choice, strict=True)) for choice in choices]
    best = max(gain(trial) for trial in trials if cost(trial, modules) <= budget)
    assert cost(ranks, modules) <= budget
    assert best < gain(following) + 1e-9 or best == pytest.approx(gain(ranks))
    if cost(ranks, modules) == budget:
        assert gain(ranks) == pytest.approx(best)
