"""One call for every kind of network, and the rank that an error needs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lorapower
from lorapower import InputError, bounds, randomness
from lorapower.constructions import NeededRank, fnn, linear, transformer
from lorapower.networks import FNN, LinearNetwork, Partition, Transformer, as_network
from lorapower.regions import Ball, Samples

BY: tuple[Literal["bound", "trial"], ...] = ("bound", "trial")
KINDS = ["linear", "fnn", "transformer"]


def problem(
    kind: str, *, width: int = 4, batch: tuple[int, ...] = (), seed: int = 0
) -> tuple[Any, Any, Tensor]:
    """A frozen network, a target, and inputs, not one of which is like another in a batch."""
    generator = randomness.generator(seed, "inputs of the front door")
    x = torch.randn(5, width, 30, generator=generator, dtype=torch.float64)
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
    found = lorapower.adapt(frozen, target, rank, throw=False, **inputs)
    adapted = found.adapters.merge(frozen)
    each = x if x.ndim > 2 else x[None]
    errors = [(adapted(one) - target(one)).numpy() for one in each]
    return float(np.mean(np.square(errors)) / np.mean([target(one).numpy() ** 2 for one in each]))


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_is_the_construction_of_the_kind(kind: str) -> None:
    frozen, target, _ = problem(kind)
    region = [Ball(2.0)] if kind == "fnn" else []
    construct: Any = {"linear": linear, "fnn": fnn, "transformer": transformer}[kind].adapt
    found = lorapower.adapt(frozen, target, 3, *region, rtol=1e-5, seed=3)
    expected = construct(frozen, target, 3, *region, rtol=1e-5, seed=3)
    assert type(found) is type(expected)
    assert bool(found.success)
    for update, other in zip(found.adapters.updates, expected.adapters.updates, strict=True):
        assert torch.equal(update.matrix(), other.matrix())


@pytest.mark.parametrize("kind", [*KINDS, "residual"])
def test_batches_broadcast_and_are_their_members(kind: str) -> None:
    frozen, target, _ = problem(kind, width=6, batch=(2,))
    networks = [frozen, frozen.map(lambda values: 0.9 * values)]
    weights, biases = (
        [torch.stack(parts)[:, None] for parts in zip(*each, strict=True)]
        for each in ([n.weights for n in networks], [n.biases for n in networks])
    )
    both = frozen.with_parameters(weights, biases)
    radii = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    together = lorapower.adapt(both, target, 3, *[Ball(radii)] * (kind == "fnn"), throw=False)
    merged, x = together.adapters.merge(both), problem(kind, width=6)[2][..., :5] / 3
    for i, j in np.ndindex(2, 2):
        region = [Ball(float(radii[i]))] * (kind == "fnn")
        alone = lorapower.adapt(networks[i], target[j], 3, *region, throw=False)
        assert alone.success == together.success[i, j]
        expected = alone.adapters.merge(networks[i])(x)
        torch.testing.assert_close(merged[i, j](x), expected, rtol=1e-6, atol=1e-6)


def test_modules_and_matrices_stand_for_networks() -> None:
    frozen, target, x = problem("fnn")
    modules = frozen.to_sequential(), target.to_sequential()
    found: Any = lorapower.adapt(*modules, 2, x.numpy())
    expected = fnn.adapt(frozen, target, 2, Samples(x))
    assert torch.equal(found.error_bound, expected.error_bound)
    merged = found.adapters.merge(as_network(modules[0]))
    torch.testing.assert_close(merged(x), target(x), rtol=1e-8, atol=1e-8)
    needed = lorapower.rank_for_error(*modules, 0.05, x.tolist())
    assert torch.equal(needed.errors, lorapower.rank_for_error(frozen, target, 0.05, x).errors)

    frozen, target, _ = problem("linear")
    stack = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(2)]).double()
    matrix = target.product()
    for start in (frozen, list(frozen.weights), stack):
        solution: Any = lorapower.adapt(start, matrix, 2)
        reached = solution.adapters.merge(as_network(start)).product()
        torch.testing.assert_close(reached, matrix, rtol=1e-9, atol=1e-9)


@given(seeds, st.integers(2, 5), st.booleans())
def test_logits_of_a_classifier_are_reached(seed: int, width: int, nested: bool) -> None:
    generator = randomness.generator(seed, "classifier")

    def module(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layer = nn.Linear(into, out).double()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            layers += [layer, nn.ReLU(), nn.Dropout(0.5)]
        layers = layers[:-2]
        half = len(layers) // 2
        parts = [nn.Sequential(*layers[:half]), nn.Sequential(*layers[half:])]
        return nn.Sequential(*(parts if nested else layers)).eval()

    frozen, target = module(width, width + 3, width + 2, 3), module(width, 3)
    x = torch.randn(width, 40, generator=generator, dtype=torch.float64)
    rank = int(bounds.fnn_threshold(FNN.from_sequential(frozen), FNN.from_sequential(target)))
    found = lorapower.adapt(frozen, target, rank, x, rtol=1e-6, max_digits_lost=10.0)
    outputs, logits = found.adapters.merge(FNN.from_sequential(frozen))(x)[:3], target(x.mT).mT
    assert (logits < 0).any()
    torch.testing.assert_close(outputs, logits.detach(), rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_not_used_is_named() -> None:
    frozen, target, x = problem("fnn")
    linear_pair, heads = problem("linear")[:2], problem("transformer")[:2]
    adapt, rank = lorapower.adapt, lorapower.rank_for_error
    for name, call in (
        ("inputs", lambda: adapt(frozen, target, 2)),
        ("inputs", lambda: adapt(*linear_pair, 2, x)),
        ("inputs", lambda: adapt(*heads, 2, x)),
        ("options", lambda: adapt(*linear_pair, 2, partition=Partition([2, 2]))),
        ("options", lambda: adapt(frozen, target, 2, x, region=Ball(1.0))),
        ("target", lambda: rank(frozen, linear_pair[1], 0.1, x)),
        ("target", lambda: rank(heads[0], target, 0.1, x)),
        ("frozen", lambda: rank(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), target, 0.1, x)),
        ("by", lambda: rank(frozen, target, 0.1, x, by="guess")),  # type: ignore[arg-type]
        ("ranks", lambda: rank(frozen, target, 0.1, x, ranks=[5])),
        ("partition", lambda: rank(*linear_pair, 0.1, x, partition=Partition([2]))),
    ):
        with pytest.raises(InputError, match=f"^{name} must be"):
            call()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [1e-15, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_by_trial_is_the_first_rank_that_an_exhaustive_search_finds(
    kind: str, error: float, seed: int
) -> None:
    frozen, target, x = problem(kind, seed=seed)
    left = [relative(frozen, target, rank, x) for rank in range(5)]
    least = next(rank for rank, value in enumerate(left) if value <= error)
    found = lorapower.rank_for_error(frozen, target, error, x, by="trial")
    assert bool(found.success)
    assert int(found.rank) == least
    assert found.tried.tolist() == list(range(least + 1))
    # What rounding leaves differs from one order of the inputs to another.
    assert found.errors.tolist() == pytest.approx(left[: least + 1], rel=1e-6, abs=1e-20)
    assert float(found.error) == float(found.errors[-1])


@pytest.mark.parametrize("kind", [*KINDS, "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_never_below_what_is_measured(kind: str, seed: int) -> None:
    frozen, target, x = problem(kind, seed=seed)
    every: dict[str, NeededRank] = {
        by: lorapower.rank_for_error(frozen, target, 0.0, x, by=by, throw=False) for by in BY
    }
    ranks = min(len(found.tried) for found in every.values())
    bound, trial = (every[by].errors[:ranks] for by in ("bound", "trial"))
    assert (trial <= bound * (1 + 1e-9) + 1e-18).all()
    if kind == "linear":
        torch.testing.assert_close(trial, bound, rtol=1e-9, atol=1e-18)
    else:
        assert (trial[0] < 0.999 * bound[0]).all()
    for error in (1e-12, 1e-4, 0.01, 0.1, 1.0, 10.0):
        by_bound, by_trial = (
            lorapower.rank_for_error(frozen, target, error, x, by=by) for by in BY
        )
        assert by_bound.rank >= by_trial.rank
        assert max(by_trial.error, by_bound.error) <= error


@given(st.sampled_from(KINDS), seeds, st.integers(2, 5))
def test_a_tiny_error_needs_the_threshold(kind: str, seed: int, width: int) -> None:
    frozen, target, x = problem(kind, width=width, seed=seed)
    threshold: Any = {
        "linear": bounds.linear_threshold,
        "fnn": bounds.fnn_threshold,
        "transformer": bounds.transformer_threshold,
    }[kind]
    found = lorapower.rank_for_error(frozen, target, 1e-22, x)
    assert int(found.rank) == int(threshold(frozen, target))


@pytest.mark.parametrize("by", ["bound", "trial"])
@pytest.mark.parametrize("kind", [*KINDS, "residual"])
def test_members_of_a_batch_have_ranks_of_their_own(kind: str, by: Any) -> None:
    frozen, target, x = problem(kind, batch=(2, 3), width=6)
    together = lorapower.rank_for_error(frozen, target, 0.3, x, by=by)
    assert together.rank.shape == together.error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = lorapower.rank_for_error(frozen, target[i, j], 0.3, x, by=by)
            assert int(alone.rank) == int(together.rank[i, j])
            assert float(alone.error) == pytest.approx(float(together.error[i, j]), rel=1e-6)
    if by == "trial":
        assert len(together.rank.unique()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_have_batch_dimensions_too(kind: str) -> None:
    frozen, target, x = problem(kind)
    both = torch.stack([x, 3 * x.roll(1, -1) ** 2])
    together = lorapower.rank_for_error(frozen, target, 0.05, both, by="trial")
    for i in range(2):
        alone = lorapower.rank_for_error(frozen, target, 0.05, both[i], by="trial")
        assert int(together.rank[i]) == int(alone.rank)
        assert float(together.error[i]) == pytest.approx(float(alone.error), rel=1e-6)


def test_sequences_count_alike() -> None:
    frozen, target, x = problem("transformer")
    one = lorapower.rank_for_error(frozen, target, 0.1, x[0], by="trial")
    same = lorapower.rank_for_error(frozen, target, 0.1, x[:1].repeat(3, 1, 1), by="trial")
    assert one.errors.tolist() == pytest.approx(same.errors.tolist())


def test_no_rank_is_enough() -> None:
    frozen, target, x = problem("fnn", batch=(3,))
    with pytest.raises(InputError, match=r"^error .* \(one of 3 that fail: 0, 1, 2\)$"):
        lorapower.rank_for_error(frozen, target, 1e-9, x, ranks=[1, 0])
    found = lorapower.rank_for_error(frozen, target, 1e-9, x, ranks=[1, 0], throw=False)
    assert not found.success.any()
    assert found.rank.tolist() == [1, 1, 1]
    assert torch.equal(found.error, found.errors[-1])
    assert found.tried.tolist() == [0, 1]


def test_nothing_is_needed_where_nothing_is_to_be_done() -> None:
    frozen, _, x = problem("linear")
    for by in BY:
        found = lorapower.rank_for_error(frozen, frozen.product(), 1e-28, x, by=by)
        assert int(found.rank) == 0
    zero = torch.zeros(4, 4, dtype=torch.float64)
    found = lorapower.rank_for_error([zero, zero], zero, 0.0, x)
    assert float(found.error) == 0.0
    # Any error is infinitely large beside a target of zeros.
    never = lorapower.rank_for_error(frozen, zero, 1e9, x, ranks=[0, 1], throw=False)
    assert not never.success
    assert bool(never.error.isinf())


@pytest.mark.parametrize("scores_only", [False, True])
def test_heads_that_are_narrow_need_what_they_need(scores_only: bool) -> None:
    frozen, target = (
        Transformer.random(1, 4, 2, head_size=2, scale=0.5, seed=seed) for seed in (0, 1)
    )
    x = problem("transformer")[2]
    least = int(bounds.transformer_threshold(frozen, target))
    if scores_only:
        # A softmax bounds what comes of any scores, but not of what is needed for them.
        target = replace(frozen, W_Q=target.W_Q, W_K=target.W_K)
        least = int(bounds.transformer_ranks(frozen, target).query_key.max())
    found = lorapower.rank_for_error(frozen, target, 1e-20, x)
    assert int(found.rank) == least > 0
    assert found.errors[:least].isinf().any()
    assert found.errors[:least].isinf().all() or not scores_only


@pytest.mark.parametrize("by", BY)
def test_a_hidden_layer_that_is_too_narrow_is_said_to_be(by: Literal["bound", "trial"]) -> None:
    _, target, x = problem("linear")
    frozen = LinearNetwork([target.weights[0][:2], target.weights[0].mT[:, :2]])
    with pytest.raises(InputError, match=r"^hidden widths must be at least 4"):
        lorapower.rank_for_error(frozen, target, 1e-3, x, by=by, throw=False)
    # As it is it leaves something, which may be all that is asked for.
    found = lorapower.rank_for_error(frozen, target, 100.0, x, by=by)
    assert int(found.rank) == 0
    assert float(found.error) > 1e-3


def test_layers_of_several_sizes_and_a_narrower_target() -> None:
    generator = randomness.generator(0, "several sizes")
    sides = [(7, 5), (6, 7), (5, 6)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sides]
    biases = [torch.randn(s[0], generator=generator, dtype=torch.float64) for s in sides]
    frozen = FNN(weights, biases)
    target = FNN([weights[0][:3, :3] + 1.0], [biases[0][:3]])
    x = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    exact = int(bounds.fnn_threshold(frozen, target))
    for by in BY:
        found = lorapower.rank_for_error(frozen, target, 1e-18, x, by=by)
        assert int(found.rank) == exact


def test_a_partition_changes_what_is_needed() -> None:
    frozen, target, x = problem("fnn", width=6)
    partition = Partition([1, 3])
    assert int(bounds.fnn_threshold(frozen, target, partition)) == 6
    for by in BY:
        found = lorapower.rank_for_error(frozen, target, 1e-15, x, by=by, partition=partition)
        assert int(found.rank) == 6
