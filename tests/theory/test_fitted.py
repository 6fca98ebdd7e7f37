"""Fitted and polished adapters: optimal segment by segment, exact from the threshold on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, of_widths, seeds
from torch import Tensor

from lorapower import bounds, randomness
from lorapower.bounds._expansion import first_order
from lorapower.constructions import fitted, fnn, fused, transformer
from lorapower.constructions._blocks import Scores, nearest_scores
from lorapower.networks import FNN, LinearNetwork, Partition, Transformer
from lorapower.regions import Ball
from lorapower.training import Fixed, Fresh, Tuning, polish, train


def normal(*shape: int, seed: int = 0) -> Tensor:
    return randomness.normal(randomness.generator(seed, "inputs in tests"), *shape)


def halves(held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Those that select, and those that test."""
    select, test = held_out.tensor_split(2, 0 if held_out.ndim == 3 else -1)
    return select, test


def heads(
    depth: int, width: int, size: int | None = None, seed: int = 0
) -> tuple[Transformer, Transformer]:
    """A frozen transformer and a target."""
    frozen, target = (
        Transformer.random(
            depth, width, 2, head_size=size, scale=width**-0.5, seed=seed, purpose=purpose
        )
        for purpose in ("frozen", "target")
    )
    return frozen, target


def relu(depth: int, layers: int, width: int, **more: Any) -> tuple[FNN, FNN]:
    """A frozen ReLU network and a target."""
    frozen, target = (
        FNN.random(d, width, purpose=p, **more) for d, p in ((depth, "frozen"), (layers, "target"))
    )
    return frozen, target


@given(st.integers(1, 3), st.integers(2, 5), st.booleans(), seeds)
def test_fused_networks_are_the_networks(depth: int, width: int, wide: bool, seed: int) -> None:
    frozen, target = heads(depth, width, None if wide else max(1, width // 2), seed=seed)
    pair = fused.fuse(frozen, target, 1)
    x = normal(3, width, 4, seed=seed)
    for network, own in ((frozen, pair.network), (target, pair.fused_target)):
        assert own(x).allclose(network(x), rtol=1e-9, atol=1e-9)
    layers = relu(2 * depth, depth, width, seed=seed)
    pair = fused.fuse(*layers, 1)
    assert [len(pair.network.weights), *pair.fused_ranks] == [depth, *[min(2, width)] * depth]
    assert pair.fused_target(x[0]).equal(layers[1](x[0]))


@given(st.integers(1, 2), st.integers(3, 6), st.integers(0, 3), seeds)
@settings(deadline=None, max_examples=15)
def test_what_fused_networks_reach_is_carried_back(
    depth: int, width: int, rank: int, seed: int
) -> None:
    for frozen, target, x in (
        (*relu(2 * depth, depth, width, seed=seed), normal(width, 9, seed=seed)),
        (*heads(depth, width, seed=seed), normal(3, width, 4, seed=seed)),
    ):
        pair = fused.fuse(frozen, target, rank)
        tuned = train(
            pair.network, [Tuning(ranks=pair.fused_ranks, learning_rate=1e-2)],
            Fresh(target, tuple(x.shape[1:]) if x.ndim == 3 else (width,), samples=8), steps=5,
        ).adapters[0].to(torch.float64)  # fmt: skip
        region = Ball(20.0) if isinstance(frozen, FNN) else None
        found = pair.carry_back(tuned, region, throw=False)
        assert max(found.adapters.ranks, default=0) <= rank
        made, wanted = found.adapters.merge(frozen)(x), tuned.merge(pair.network)(x)
        assert found.success
        assert made.allclose(wanted, rtol=1e-7, atol=1e-7)


def test_fits_are_exact_from_the_threshold_on() -> None:
    x, others = normal(6, 60), normal(6, 80, seed=1)
    for layers in (1, 2):
        frozen, target = relu(2 * layers, layers, 6)
        for rank in (3, 4):
            assert fitted.adapt(frozen, target, rank, x, others).error < 1e-20
        assert fitted.adapt(frozen, target, 2, x, others).error > 1e-6
    x, others = normal(40, 6, 5), normal(40, 6, 5, seed=1)
    for depth in (1, 2):
        pair = heads(depth, 6)
        assert fitted.adapt(*pair, 3, x, others).error < 1e-18
        assert fitted.adapt(*pair, 2, x, others).error > 1e-6
    linear = LinearNetwork.random(2, 6), LinearNetwork.random(1, 6, seed=1)
    assert fitted.adapt(*linear, 3, normal(6, 20), normal(6, 30, seed=1)).error < 1e-20


def test_narrow_heads_have_fits_below_their_threshold() -> None:
    frozen, target = heads(1, 8, 2)
    x, others = normal(300, 8, 5), normal(300, 8, 5, seed=1)
    errors = [float(fitted.adapt(frozen, target, R, x, others).error) for R in (0, 1, 2)]
    assert errors[0] > errors[1] > errors[2]
    found = fitted.adapt(frozen, target, 2, x, others)
    theorem = transformer.adapt(frozen, target, 2)
    # Its heads are exact, and its last segment is fitted besides.
    test = halves(others)[1]
    assert found.error <= fitted.relative_error(theorem.adapters.merge(frozen), target, test)[0]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("size", [6, 3])
@pytest.mark.parametrize("kind", [{"scale": 0.4}, {"residual": True, "norm": "layer"}], ids=str)
def test_fits_of_transformers_leave_less_than_the_theorem(
    kind: dict[str, Any], size: int, rank: int
) -> None:
    frozen, target = (
        Transformer.random(1, 6, 2, head_size=size, seed=5, purpose=purpose, **kind)
        for purpose in ("frozen", "target")
    )
    x, others = normal(300, 6, 4, seed=5), normal(300, 6, 4, seed=6)
    found = fitted.adapt(frozen, target, rank, x, others, throw=False)
    theorem = transformer.adapt(frozen, target, rank, throw=False).adapters.merge(frozen)
    assert found.error < fitted.relative_error(theorem, target, halves(others)[1])[0]


def test_heads_wider_than_the_tokens() -> None:
    frozen, target = heads(2, 5, 7)
    x, others = normal(40, 5, 4), normal(60, 5, 4, seed=1)
    assert fitted.adapt(frozen, target, 3, x, others).error < 1e-16
    assert fitted.adapt(frozen, target, 2, x, others).error > 1e-6
    assert fused.fuse(frozen, target, 3).network(x).allclose(frozen(x))


def test_fits_lose_to_no_construction_and_polish_to_no_fit() -> None:
    frozen, target = relu(4, 2, 8)
    x, others = normal(8, 400), normal(8, 4000, seed=1)
    first, test = halves(others)
    for rank in (1, 2, 3):
        found = fitted.adapt(frozen, target, rank, x, others)
        better = polish(found, x, others, iterations=60)
        plain = fnn.adapt(frozen, target, rank, Ball.about(torch.cat([x, others], 1), 1.25))

        def error(adapted: Any, x: Tensor) -> float:
            return float(fitted.relative_error(adapted.adapters.merge(frozen), target, x)[0])

        assert error(found, first) <= error(plain, first) * (1 + 1e-9)
        assert error(better, first) <= error(found, first) * (1 + 1e-9)
        assert error(found, test) == pytest.approx(float(found.error))
        assert found.low <= found.error <= found.high
        assert max(better.adapters.ranks) <= rank


def test_a_metric_is_used_where_it_was_asked_for_and_the_best_is_the_better() -> None:
    pair = fused.fuse(*relu(4, 2, 8), 1)
    x, others = normal(8, 400), normal(8, 400, seed=1)
    wanted = pair.fused_target(others)
    alike, outputs, best = (
        fitted.fit(pair, x, others, metric) for metric in ("alike", "outputs", "best")
    )
    errors = [fit.error(others, wanted) for fit in (alike, outputs, best)]
    assert errors[0] != errors[1]
    assert errors[2] == min(errors)


def test_polish_from_the_start_of_lora() -> None:
    frozen, target = relu(2, 1, 8)
    x, others = normal(8, 400), normal(8, 800, seed=1)
    found = fitted.adapt(frozen, target, 1, x, others)
    both = polish(found, x, others, starts=("fitted", "lora"), steps=400)
    assert both.error < found.error
    network, goal = heads(1, 6)
    x, others = normal(200, 6, 5), normal(400, 6, 5, seed=1)
    found = fitted.adapt(network, goal, 1, x, others)
    data = Fresh(goal, (6, 5), samples=64)
    before = found.fits[0]
    pair = halves(others)[0], goal(halves(others)[0])
    alone = polish(found, x, others, starts=("lora",), steps=1, data=data, iterations=0)
    # A single step from nothing is worse than the fit, which then stays.
    assert alone.fits[0] is before
    assert alone.error == found.error
    both = polish(found, x, others, starts=("fitted", "lora"), steps=300, data=data)
    assert both.fits[0] is not before
    assert both.fits[0].error(*pair) < before.error(*pair)
    assert max(both.adapters.ranks) <= 1


def test_no_more_iterations_than_asked_for_and_none_makes_it_worse() -> None:
    frozen, target = relu(4, 2, 8)
    x, others = normal(8, 400), normal(8, 800, seed=1)
    found = fitted.adapt(frozen, target, 2, x, others)
    errors = [found.fits[0].error(x, target(x))]
    for iterations in (1, 10, 60):
        better = polish(found, x, others, iterations=iterations).fits[0]
        errors.append(better.error(x, target(x)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1] > errors[3]


def test_partitions_unequal_ranks_and_linear_ends() -> None:
    frozen, target = relu(5, 2, 6, batch_shape=(2,), linear_last=True)
    x, others = normal(6, 100), normal(6, 200, seed=1)
    found = fitted.adapt(frozen, target, [1, 2, 0, 1, 2], x, others, partition=Partition([2, 3]))
    assert found.error.shape == (2,)
    assert found.adapters.ranks == (1, 2, 0, 1, 2)
    better = polish(found, x, others, iterations=20)
    choosing, test = halves(others)
    for i in range(2):
        goal = target[i]
        before, after = (one.fits[i].error(choosing, goal(choosing)) for one in (found, better))
        assert after <= before
        merged = better.adapters[i].merge(frozen[i])
        error = fitted.relative_error(merged, goal, test)[0]
        assert float(better.error[i]) == pytest.approx(float(error))


def test_a_narrower_target() -> None:
    frozen, target = of_widths([8, 8, 8, 8, 8]), of_widths([5, 5, 5], seed=1)
    x, others = normal(5, 200), normal(5, 400, seed=1)
    exact = fitted.adapt(frozen, target, 3, x, others)
    assert exact.error < 1e-18
    assert fitted.adapt(frozen, target, 2, x, others).error > 1e-9


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


def test_degenerate_sequences() -> None:
    frozen, target = heads(2, 6)
    x, others = normal(1, 6, 1), normal(40, 6, 1, seed=1)
    for sequences in (x.expand(3, 6, 1), 0 * normal(3, 6, 1)):
        assert fitted.adapt(frozen, target, 3, sequences, others).error < 1e-16
        assert fitted.adapt(frozen, target, 1, sequences, others).error.isfinite()


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
    # The second layer's inputs span more: they come from a ReLU.
    assert bounds.fnn_data_threshold(frozen, target, x) <= 4
    shallow = relu(2, 1, 8)
    assert bounds.fnn_data_threshold(*shallow, x) == 1
    assert fitted.adapt(*shallow, 1, x, others).error < 1e-20
    # Fewer inputs than that have no more directions.
    assert bounds.fnn_data_threshold(*shallow, x[:, :1]) == 0


def test_first_order_is_the_limit_of_small_errors() -> None:
    normed = Transformer.random(2, 6, 1, residual=True, norm="layer", causal=True)
    tokens = normal(100, 6, 4)
    for target, x in (
        (relu(1, 3, 6)[1], normal(6, 500)),
        (heads(2, 6)[1], tokens),
        (normed, tokens),
    ):
        change = [normal(*w.shape, seed=i) for i, w in enumerate(target.weights)]
        quotients = []
        for size in (1e-2, 1e-5):
            moved = [w + size * c for w, c in zip(target.weights, change, strict=True)]
            adapted = target.with_parameters(moved)
            error = fitted.relative_error(adapted, target, x)[0]
            quotients.append(float(first_order(adapted, target, x) / error))
        assert quotients[1] == pytest.approx(1, abs=1e-2)
        assert abs(quotients[1] - 1) <= abs(quotients[0] - 1) + 1e-3
        assert first_order(target, target, x) == 0
    linear, goal = LinearNetwork.random(1, 6), LinearNetwork.random(1, 6, seed=1)
    x = normal(6, 50)
    exact = fitted.relative_error(linear, goal, x)[0]
    assert float(first_order(linear, goal, x)) == pytest.approx(float(exact))


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 4), seeds)
def test_scores_are_a_quadratic_function(a: int, b: int, rank: int, seed: int) -> None:
    keys, queries = normal(20, a, 4, seed=seed), normal(20, b, 4, seed=seed + 1)
    wanted = normal(20, 4, 4, seed=seed + 2)
    moments = Scores.of(keys, queries, wanted)

    def left(K: Tensor) -> float:
        missed = wanted - keys.mT @ (K @ queries)
        return float((missed - missed.mean(-2, keepdim=True)).square().mean())

    K = normal(a, b, seed=seed + 3)
    assert float(moments.left(K)) == pytest.approx(left(K), rel=1e-8)
    rank = min(rank, a, b)
    start = nearest_scores(K, keys, queries, rank)
    better = moments.improved(start, rank)
    assert left(better) <= left(start) * (1 + 1e-9)
    assert left(moments.free()) <= left(better) * (1 + 1e-9)
    assert int((torch.linalg.svdvals(better) > 1e-9).sum()) <= rank


def test_training_from_given_adapters() -> None:
    frozen, target = relu(2, 1, 6)
    x = normal(6, 300)
    data = Fixed((x, target(x)), (x, target(x)))
    first = train(frozen, [Tuning(2, learning_rate=1e-2)], data, steps=300)
    tunings = [
        Tuning(2, learning_rate=1e-3, schedule="cosine", start=first.adapters[0]),
        Tuning(2, learning_rate=1e-2),
    ]
    again = train(frozen, tunings, data, steps=30)
    assert float(again.validation_loss[0, 0]) == pytest.approx(float(first.best_loss[0]), rel=1e-4)
    assert again.best_loss[0] <= first.best_loss[0] * 1.0001
    assert again.validation_loss[1, 0] > again.validation_loss[0, 0]
