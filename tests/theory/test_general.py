"""One call for every kind of network, the rank that an error needs, and fitted adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PRENORM, dtypes, normal, seeds
from torch import Tensor, nn

from lorapower import InputError, bounds
from lorapower.constructions import (
    FittedAdaptation,
    adapt,
    adapt_fitted,
    adapt_linear,
    adapt_relu,
    adapt_transformer,
    rank_for_error,
)
from lorapower.constructions.fitted import nearest
from lorapower.constructions.fused import fuse
from lorapower.networks import FNN, Decoder, Gap, LinearNetwork, Transformer
from lorapower.regions import Ball, Samples
from lorapower.regression import relative_error
from lorapower.training import Fixed, Fresh, Tuning, polish, train

KINDS = ["linear", "fnn", "transformer"]


def problem(kind: str, *, seed: int = 0) -> tuple[Any, Any, Tensor]:
    """A frozen network, a target, and inputs."""
    x = normal(5, 4, 30, seed=seed)
    other: dict[str, Any] = {"seed": seed, "purpose": "target"}
    if kind == "linear":
        return LinearNetwork.random(2, 4, seed=seed), LinearNetwork.random(1, 4, **other), x[0]
    if kind == "fnn":
        return FNN.random(4, 4, seed=seed), FNN.random(2, 4, **other), x[0]
    options = PRENORM if kind == "residual" else {"scale": 0.5}
    cls: Any = Decoder if kind == "residual" else Transformer
    return cls.random(2, 4, 2, seed=seed, **options), cls.random(2, 4, 2, **options, **other), x


def relative(frozen: Any, target: Any, rank: int, x: Tensor) -> float:
    """The mean squared error that the construction leaves, computed sequence by sequence."""
    on = Samples(x) if isinstance(frozen, FNN) else None
    adapted = adapt(frozen, target, rank, on, throw=False).network
    each = x if x.ndim > 2 else x[None]
    errors = [(adapted(one) - target(one)).numpy() for one in each]
    variance = np.concatenate([target(one).numpy() for one in each], -1).var(-1).mean()
    return float(np.mean(np.square(errors)) / variance)


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_is_the_construction_of_the_kind(kind: str) -> None:
    frozen, target, _ = problem(kind)
    on = [Ball(2.0)] if kind == "fnn" else []
    construct = {"linear": adapt_linear, "fnn": adapt_relu, "transformer": adapt_transformer}[kind]
    found = adapt(frozen, target, 3, *on)
    expected: Any = construct(frozen, target, 3, *on)  # type: ignore[operator]
    assert type(found.evidence) is type(expected)
    assert bool(found.evidence.success)
    assert type(found.network) is type(frozen)
    for mine, other in zip(found.adapters.updates, expected.adapters.updates, strict=True):
        assert torch.equal(mine.matrix(), other.matrix())


def test_modules_and_matrices_come_back_as_they_were_given() -> None:
    linear = nn.Linear(4, 3, bias=False).double()
    alone: Any = adapt(linear, nn.Linear(4, 3, bias=False).double(), 3).network
    assert (type(alone), alone.bias) == (nn.Linear, None)
    relu = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    layers: Any = (*relu[:2], nn.Dropout(), nn.Linear(4, 4, bias=False))
    deep, shallow = nn.Sequential(*layers).double(), nn.Sequential(relu[2]).double()
    shallow.append(nn.Linear(4, 4)).double()
    x = normal(9, 4)
    adapted = adapt(deep, shallow, 4, x.mT).network
    assert [type(part) for part in adapted] == [type(part) for part in deep]
    assert adapted.eval()(x).allclose(shallow(x))
    # Of a layer that is used twice both uses are adapted.
    twice = nn.Sequential(linear_4 := nn.Linear(4, 4, bias=False).double(), linear_4)
    assert adapt(twice, torch.eye(4).double(), 2).network(x).allclose(x)
    W, goal = normal(2, 3, 4)
    for matrix in (W, W.numpy()):
        single: Any = adapt(matrix, goal, 3).network
        assert type(single) is type(matrix)
        np.testing.assert_allclose(single, goal, atol=1e-12)
    several = adapt([normal(4, 4), W.numpy()], goal, [1, 2]).network
    assert [type(part) for part in several] == [Tensor, np.ndarray]
    stacked = adapt(normal(2, 4, 4), normal(4, 4, seed=1), 2).network
    assert stacked.shape == (2, 4, 4)


def test_rows_in_place_of_columns_are_named() -> None:
    frozen, target, x = problem("fnn")
    for ask in (adapt, adapt_relu):
        with pytest.raises(InputError, match=r"^on must be of shape .*columns: pass x\.mT$"):
            ask(frozen, target, 4, x.mT)


def test_layers_without_relus_are_adapted_wherever() -> None:
    frozen, target = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    x = 100 * normal(9, 4)
    assert adapt(frozen, target, 3).network(x).allclose(target(x))


@pytest.mark.parametrize("kind", [*KINDS, "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_the_rank_is_the_first_that_an_exhaustive_search_finds(kind: str, seed: int) -> None:
    frozen, target, x = problem(kind, seed=seed)
    left = [relative(frozen, target, rank, x) for rank in range(5)]
    for error in (1e-15, 1e-3, 0.1, 0.5):
        least = next(rank for rank, value in enumerate(left) if value <= error)
        assert rank_for_error(frozen, target, error, x) == least
    exact = rank_for_error(frozen, target, 1e-15, x)
    if kind == "residual":  # unrelated networks
        ranks = (dict.fromkeys(frozen.weight_kinds, R) for R in range(exact - 1, exact + 1))
        assert [bounds.ranks_suffice(frozen, each) for each in ranks] == [False, True]
    elif kind == "transformer":
        assert exact == bounds.transformer_ranks(frozen, target).largest()
    else:
        threshold = bounds.fnn_threshold if kind == "fnn" else lambda *pair: Gap(*pair).threshold
        assert exact == threshold(frozen, target)


def test_no_rank_is_enough() -> None:
    # Something always rounds.
    frozen, target, x = problem("fnn")
    with pytest.raises(InputError, match=r"^error must be met by some rank; got 0"):
        rank_for_error(frozen, target, 0.0, x)
    assert rank_for_error(frozen, target, 1e9, x) == 0


def test_nothing_is_needed_where_nothing_is_to_be_done() -> None:
    frozen, _, x = problem("linear")
    assert rank_for_error(frozen, frozen.product(), 1e-28, x) == 0
    zero = torch.zeros(4, 4, dtype=torch.float64)
    # Nothing is relative to a target whose outputs do not differ.
    with pytest.raises(InputError, match=r"^outputs of the target must be different from input to"):
        rank_for_error(frozen, zero, 1e9, x)


def test_a_hidden_layer_that_is_too_narrow_is_said_to_be() -> None:
    _, target, x = problem("linear")
    frozen = LinearNetwork([target.weights[0][:2], target.weights[0].mT[:, :2]])
    with pytest.raises(InputError, match=r"^hidden widths must be at least 4"):
        rank_for_error(frozen, target, 1e-3, x)
    # As it is it leaves something, which may be all that is asked for.
    assert rank_for_error(frozen, target, 100.0, x) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_and_trained_networks_stay_on_their_device(kind: str) -> None:
    frozen, target, x = problem(kind)
    frozen, target = (network.to(device="cuda") for network in (frozen, target))
    merged = adapt(frozen, target, 2, *[Ball(1.0)] * (kind == "fnn"), throw=False).network
    assert merged.device.type == merged(x).device.type == "cuda"
    if kind == "fnn":
        assert bounds.fnn_threshold(frozen, target).device.type == "cuda"
    if kind != "transformer":
        runs = train(frozen, [Tuning(1)], Fresh(target, (4,)), steps=2)
        assert runs.network.device.type == "cuda"


def relu(depth: int, layers: int, width: int, **more: Any) -> tuple[FNN, FNN]:
    """A frozen ReLU network and a target."""
    frozen, target = (
        FNN.random(d, width, purpose=p, **more) for d, p in ((depth, "frozen"), (layers, "target"))
    )
    return frozen, target


@given(st.integers(1, 2), st.integers(3, 6), st.integers(0, 3), seeds)
def test_what_fused_networks_reach_is_carried_back(
    depth: int, width: int, rank: int, seed: int
) -> None:
    frozen, target = relu(2 * depth, depth, width, seed=seed)
    x, pair = normal(width, 9, seed=seed), fuse(frozen, target, rank)
    tuned = train(
        pair.network, [Tuning(ranks=pair.fused_ranks, learning_rate=1e-2)],
        Fresh(target, (width,), samples=8), steps=5,
    ).adapters[0].to(torch.float64)  # fmt: skip
    found = pair.split_among_layers(tuned, Ball(20.0), throw=False)
    assert max(found.adapters.ranks, default=0) <= rank
    made, wanted = found.adapters.merge(frozen)(x), tuned.merge(pair.network)(x)
    assert found.success
    assert made.allclose(wanted, rtol=1e-7, atol=1e-7)


def fused_error(found: FittedAdaptation, x: Tensor) -> float:
    """The mean squared error of the fit before it is carried back."""
    adapted = found.fused_adapters.merge(found.fused.network)
    return float((adapted(x) - found.fused.target(x)).square().mean())


def test_fits_lose_to_no_construction_and_no_iteration_makes_them_worse() -> None:
    frozen, target = relu(4, 2, 8)
    x, others = normal(8, 400), normal(8, 800, seed=1)
    found = adapt_fitted(frozen, target, 2, x, others)
    built = adapt_relu(frozen, target, 2, Ball.about(torch.cat([x, others], 1), 1.25))
    left, of_built = (
        relative_error(each.adapters.merge(frozen)(others[:, :400]), target(others[:, :400]))
        for each in (found, built)
    )
    assert left <= of_built * (1 + 1e-9)
    polished = (polish(found, x, others, iterations=count, steps=0) for count in (1, 10, 60))
    errors = [fused_error(each, x) for each in (found, *polished)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1] > errors[3]


def test_partitions_unequal_ranks_and_linear_ends() -> None:
    frozen, target = relu(5, 2, 6, linear_last=True)
    x, others = normal(6, 100), normal(6, 200, seed=1)
    found = adapt_fitted(frozen, target, [1, 2, 0, 1, 2], x, others)
    assert found.adapters.ranks == (1, 2, 0, 1, 2)
    better = polish(found, x, others, iterations=20, steps=20)
    choosing, test = others.tensor_split(2, -1)
    assert fused_error(better, choosing) <= fused_error(found, choosing)
    error = relative_error(better.adapters.merge(frozen)(test), target(test))
    assert float(better.error) == pytest.approx(float(error))


def test_polish_tries_plain_training() -> None:
    frozen, target = relu(2, 1, 16)
    x, others = normal(16, 2000), normal(16, 400, seed=1)
    fit = adapt_fitted(frozen, target, 1, x, others, throw=False)
    options: Any = {"iterations": 1, "throw": False}
    alone, better = (polish(fit, x, others, steps=steps, **options) for steps in (0, 500))
    given = Fixed((x, target(x)), (select := others[:, :200], target(select)), samples=256)
    tuning = Tuning(1, learning_rate=1e-2, schedule="cosine")
    plain = train(frozen, [tuning], given, steps=500, every=20).adapters[0].to(torch.float64)
    errors = [
        float(relative_error(adapters.merge(frozen)(select), target(select)))
        for adapters in (better.adapters, plain, fit.adapters, alone.adapters)
    ]
    assert errors[0] == pytest.approx(min(errors))
    assert errors[0] < errors[3]
    again = polish(fit, x, others, steps=500, **options)
    assert float(again.error) == float(better.error)


@pytest.mark.parametrize("kind", ["few", "repeated", "zeros", "constant"])
def test_degenerate_inputs(kind: str) -> None:
    x, others = normal(6, 40), normal(6, 60, seed=1)
    constant = x.where(torch.arange(6)[:, None] != 2, 1.0)
    other = {"few": x[:, :2], "repeated": x[:, :1].expand(6, 9), "zeros": 0 * x}
    x = other.get(kind, constant)
    for frozen, target in (relu(2, 1, 6), relu(4, 2, 6)):
        assert adapt_fitted(frozen, target, 3, x, others).error < 1e-18
        assert adapt_fitted(frozen, target, 1, x, others).error.isfinite()
        fit = adapt_fitted(frozen, target, 1, x, others)
        assert polish(fit, x, others, steps=20).error.isfinite()


@given(st.integers(2, 6), st.integers(0, 4), st.booleans(), dtypes, seeds)
def test_nearest_layers_are_the_nearest(
    width: int, rank: int, linear_last: bool, dtype: torch.dtype, seed: int
) -> None:
    frozen, target = (n.to(dtype) for n in relu(4, 2, width, seed=seed, linear_last=linear_last))
    mixed = normal(width, width, seed=seed) ** 3
    x = (1 + mixed @ normal(width, 50, seed=seed + 1)).to(dtype)
    pair = fuse(frozen, target, min(rank, width))
    near = nearest(pair, x).merge(pair.network)
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
