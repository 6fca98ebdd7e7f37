"""One call for every kind of network, and the rank that an error needs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from strategies import normal
from torch import Tensor

from lorapower import InputError, bounds
from lorapower.constructions import adapt, fnn, linear, rank_for_error, transformer
from lorapower.networks import FNN, Gap, LinearNetwork, Transformer
from lorapower.regions import Ball, Samples

KINDS = ["linear", "fnn", "transformer"]


def problem(
    kind: str, *, width: int = 4, batch: tuple[int, ...] = (), seed: int = 0
) -> tuple[Any, Any, Tensor]:
    """A frozen network, a target, and inputs, not one of which is like another in a batch."""
    x = normal(5, width, 30, seed=seed)
    target: dict[str, Any] = {"batch_shape": batch, "seed": seed, "purpose": "target"}
    if kind == "linear":
        frozen = LinearNetwork.random(2, width, seed=seed)
        return frozen, LinearNetwork.random(1, width, **target), x[0]
    if kind == "fnn":
        return FNN.random(4, width, seed=seed), FNN.random(2, width, **target), x[0]
    sizes: dict[str, Any] = {"heads": 2, "scale": width**-0.5}
    if kind == "residual":
        sizes |= {"scale": None, "residual": True, "norm": "layer"}
    frozen_one = Transformer.random(2, width, seed=seed, **sizes)
    return frozen_one, Transformer.random(2, width, **sizes, **target), x


def relative(frozen: Any, target: Any, rank: int, x: Tensor) -> float:
    """The mean squared error that the construction leaves, computed sequence by sequence."""
    inputs = {"inputs": Samples(x)} if isinstance(frozen, FNN) else {}
    found = adapt(frozen, target, rank, throw=False, **inputs)
    adapted = found.adapters.merge(frozen)
    each = x if x.ndim > 2 else x[None]
    errors = [(adapted(one) - target(one)).numpy() for one in each]
    return float(np.mean(np.square(errors)) / np.mean([target(one).numpy() ** 2 for one in each]))


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_is_the_construction_of_the_kind(kind: str) -> None:
    frozen, target, _ = problem(kind)
    region = [Ball(2.0)] if kind == "fnn" else []
    construct: Any = {"linear": linear, "fnn": fnn, "transformer": transformer}[kind].adapt
    found = adapt(frozen, target, 3, *region, rtol=1e-5)
    expected = construct(frozen, target, 3, *region, rtol=1e-5)
    assert type(found) is type(expected)
    assert bool(found.success)
    for update, other in zip(found.adapters.updates, expected.adapters.updates, strict=True):
        assert torch.equal(update.matrix(), other.matrix())


def equal_ranks(frozen: Transformer, _: Transformer) -> int:
    """Find the first rank that is enough on all weights of unrelated networks."""
    equal = (dict.fromkeys(frozen.weight_kinds, rank) for rank in itertools.count())
    return next(r["W_1"] for r in equal if bounds.ranks_suffice(frozen, r))


@pytest.mark.parametrize("kind", [*KINDS, "residual"])
@pytest.mark.parametrize("error", [1e-15, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_the_first_that_an_exhaustive_search_finds(
    kind: str, error: float, seed: int
) -> None:
    frozen, target, x = problem(kind, seed=seed)
    left = [relative(frozen, target, rank, x) for rank in range(5)]
    least = next(rank for rank, value in enumerate(left) if value <= error)
    assert rank_for_error(frozen, target, error, x) == least
    if error == 1e-15:
        threshold: Any = {
            "linear": lambda *pair: Gap(*pair).threshold,
            "fnn": bounds.fnn_threshold,
            "residual": equal_ranks,
        }.get(kind, lambda *pair: bounds.transformer_ranks(*pair).largest())
        assert least == int(threshold(frozen, target))


def test_no_rank_is_enough() -> None:
    frozen, target, x = problem("fnn")
    with pytest.raises(InputError, match=r"^error must be met by a rank that is tried; got 1e-09"):
        rank_for_error(frozen, target, 1e-9, x, ranks=[0, 1])
    assert rank_for_error(frozen, target, 1e9, x, ranks=[0, 1]) == 0


def test_nothing_is_needed_where_nothing_is_to_be_done() -> None:
    frozen, _, x = problem("linear")
    assert rank_for_error(frozen, frozen.product(), 1e-28, x) == 0
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert rank_for_error([zero, zero], zero, 0.0, x) == 0
    # Any error is infinitely large beside a target of zeros.
    with pytest.raises(InputError, match=r"^error must be"):
        rank_for_error(frozen, zero, 1e9, x, ranks=[0, 1])


def test_a_hidden_layer_that_is_too_narrow_is_said_to_be() -> None:
    _, target, x = problem("linear")
    frozen = LinearNetwork([target.weights[0][:2], target.weights[0].mT[:, :2]])
    with pytest.raises(InputError, match=r"^hidden widths must be at least 4"):
        rank_for_error(frozen, target, 1e-3, x)
    # As it is it leaves something, which may be all that is asked for.
    assert rank_for_error(frozen, target, 100.0, x) == 0
