"""Fitted and polished adapters: optimal segment by segment, exact from the threshold on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, normal, seeds
from torch import Tensor

from lorapower import bounds
from lorapower.constructions import fitted, fnn, fused
from lorapower.networks import FNN, LinearNetwork, Partition
from lorapower.regions import Ball
from lorapower.training import Fresh, Tuning, polish, train


def halves(held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Those that select, and those that test."""
    select, test = held_out.tensor_split(2, -1)
    return select, test


def relu(depth: int, layers: int, width: int, **more: Any) -> tuple[FNN, FNN]:
    """A frozen ReLU network and a target."""
    frozen, target = (
        FNN.random(d, width, purpose=p, **more) for d, p in ((depth, "frozen"), (layers, "target"))
    )
    return frozen, target


@given(st.integers(1, 3), st.integers(2, 5), seeds)
def test_fused_networks_are_the_networks(depth: int, width: int, seed: int) -> None:
    layers = relu(2 * depth, depth, width, seed=seed)
    pair = fused.fuse(*layers, 1)
    assert [len(pair.network.weights), *pair.fused_ranks] == [depth, *[min(2, width)] * depth]
    x = normal(width, 4, seed=seed)
    assert pair.fused_target(x).equal(layers[1](x))
    linear = LinearNetwork.random(depth, width, seed=seed), LinearNetwork.random(1, width, seed=1)
    assert fused.fuse(*linear, 1).network(x).allclose(linear[0](x))


@given(st.integers(1, 2), st.integers(3, 6), st.integers(0, 3), seeds)
@settings(deadline=None, max_examples=15)
def test_what_fused_networks_reach_is_carried_back(
    depth: int, width: int, rank: int, seed: int
) -> None:
    frozen, target = relu(2 * depth, depth, width, seed=seed)
    x, pair = normal(width, 9, seed=seed), fused.fuse(frozen, target, rank)
    tuned = train(
        pair.network, [Tuning(ranks=pair.fused_ranks, learning_rate=1e-2)],
        Fresh(target, (width,), samples=8), steps=5,
    ).adapters[0].to(torch.float64)  # fmt: skip
    found = pair.carry_back(tuned, Ball(20.0), throw=False)
    assert max(found.adapters.ranks, default=0) <= rank
    made, wanted = found.adapters.merge(frozen)(x), tuned.merge(pair.network)(x)
    assert found.success
    assert made.allclose(wanted, rtol=1e-7, atol=1e-7)


def fused_error(found: fitted.FittedAdaptation, x: Tensor) -> float:
    """The mean squared error of the fit before it is carried back."""
    adapted = found.fused_adapters.merge(found.fused.network)
    return float((adapted(x) - found.fused.target(x)).square().mean())


def test_fits_lose_to_no_construction_and_no_iteration_makes_them_worse() -> None:
    frozen, target = relu(4, 2, 8)
    x, others = normal(8, 400), normal(8, 800, seed=1)
    found = fitted.adapt(frozen, target, 2, x, others)
    built = fnn.adapt(frozen, target, 2, Ball.about(torch.cat([x, others], 1), 1.25))
    left = [
        fitted.relative_error(each.adapters.merge(frozen), target, halves(others)[0])
        for each in (found, built)
    ]
    assert left[0] <= left[1] * (1 + 1e-9)
    errors = [fused_error(found, x)]
    for iterations in (1, 10, 60):
        errors.append(fused_error(polish(found, x, others, iterations=iterations), x))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1] > errors[3]


def test_partitions_unequal_ranks_and_linear_ends() -> None:
    frozen, target = relu(5, 2, 6, linear_last=True)
    x, others = normal(6, 100), normal(6, 200, seed=1)
    found = fitted.adapt(frozen, target, [1, 2, 0, 1, 2], x, others, partition=Partition([2, 3]))
    assert found.adapters.ranks == (1, 2, 0, 1, 2)
    better = polish(found, x, others, iterations=20)
    choosing, test = halves(others)
    assert fused_error(better, choosing) <= fused_error(found, choosing)
    error = fitted.relative_error(better.adapters.merge(frozen), target, test)
    assert float(better.error) == pytest.approx(float(error))


@pytest.mark.parametrize("kind", ["few", "repeated", "zeros", "constant"])
def test_degenerate_inputs(kind: str) -> None:
    x, others = normal(6, 40), normal(6, 60, seed=1)
    x = {"few": x[:, :2], "repeated": x[:, :1].expand(6, 9), "zeros": 0 * x, "constant": x}[kind]
    if kind == "constant":
        x = x.clone()
        x[2] = 1.0
    for frozen, target in (relu(2, 1, 6), relu(4, 2, 6)):
        assert fitted.adapt(frozen, target, 3, x, others).error < 1e-18
        assert fitted.adapt(frozen, target, 1, x, others).error.isfinite()
        assert polish(fitted.adapt(frozen, target, 1, x, others), x, others).error.isfinite()


@given(st.integers(2, 6), st.integers(0, 4), st.booleans(), dtypes, seeds)
def test_nearest_layers_are_the_nearest(
    width: int, rank: int, linear_last: bool, dtype: torch.dtype, seed: int
) -> None:
    frozen, target = (n.to(dtype) for n in relu(4, 2, width, seed=seed, linear_last=linear_last))
    mixed = normal(width, width, seed=seed) ** 3
    x = (1 + mixed @ normal(width, 50, seed=seed + 1)).to(dtype)
    pair = fused.fuse(frozen, target, min(rank, width))
    near = fitted.nearest(pair, x).merge(pair.network)
    assert isinstance(near, FNN)
    assert near.linear_last == linear_last
    z, eps = x, torch.finfo(dtype).eps
    for i, P in enumerate(pair.network.weights):
        values = torch.linalg.svdvals(near.weights[i] - P)
        assert (values[pair.fused_ranks[i] :] <= 100 * eps * (1 + values[0])).all()
        wanted = target.weights[i] @ z + target.biases[i][:, None]
        missed = (near.weights[i] @ z + near.biases[i][:, None] - wanted).double()
        # Least squares over all offsets and all updates of that rank, by Eckart and Young.
        centred = ((target.weights[i] - P) @ (z - z.mean(1, keepdim=True))).double()
        least = torch.linalg.svdvals(centred)[pair.fused_ranks[i] :].square().sum()
        scale = float(wanted.double().square().sum() + centred.square().sum())
        assert float(missed.square().sum()) == pytest.approx(float(least), abs=100 * eps * scale)
        z = target.layers(slice(i, i + 1))(z)


def test_a_threshold_on_data() -> None:
    frozen, target = relu(4, 2, 8)
    span = normal(8, 2)
    x, others = span @ normal(2, 100, seed=1), span @ normal(2, 100, seed=2)
    assert bounds.fnn_threshold(frozen, target) == 4
    shallow = relu(2, 1, 8)
    assert fitted.adapt(*shallow, 1, x, others).error < 1e-20
