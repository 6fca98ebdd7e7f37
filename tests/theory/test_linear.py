"""The optimal adaptation of a deep linear network against its theorem."""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, conditioned, dtypes, of_widths, plain_splitting, seeds

from lorapower import InputError, SingularError, lowrank
from lorapower.constructions import adapt_linear
from lorapower.networks import Gap, LinearNetwork

Norm = Literal["fro"] | float


def distance(network: LinearNetwork, target: LinearNetwork, norm: Norm = 2) -> np.ndarray:
    """Computed by numpy, in double precision."""
    difference = network.to(torch.float64).product() - target.to(torch.float64).product()
    distances: np.ndarray = np.linalg.norm(difference.numpy(), norm, (-2, -1))
    return distances


def tails(frozen: LinearNetwork, target: LinearNetwork, r: int) -> tuple[np.ndarray, np.ndarray]:
    """What the theorem predicts, from numpy's singular values in double precision."""
    E = (target.to(torch.float64).product() - frozen.to(torch.float64).product()).numpy()
    sigma = np.linalg.svd(E, compute_uv=False)[..., r:]
    spectral = sigma[..., 0] if sigma.shape[-1] else np.zeros(sigma.shape[:-1])
    return spectral, np.sqrt((sigma**2).sum(-1))


@given(st.integers(1, 64), st.integers(1, 6), batch_shapes, batch_shapes, dtypes, seeds, st.data())
def test_measured_error_is_the_predicted_one(
    width: int, depth: int, batch: Any, other: Any, dtype: torch.dtype, seed: int, data: Any
) -> None:
    ranks = data.draw(st.lists(st.integers(0, width), min_size=depth, max_size=depth))
    other = data.draw(st.sampled_from([batch, ()])) if other != batch else batch
    frozen = conditioned(depth, width, batch_shape=batch, seed=seed, dtype=dtype)
    target = LinearNetwork.random(1, width, batch_shape=other, seed=seed, dtype=dtype)
    solution = adapt_linear(frozen, target, ranks)
    adapted = solution.adapters.merge(frozen)
    assert solution.adapters.ranks == tuple(ranks)
    assert solution.condition_numbers.shape == (*batch, depth)
    unit = (width + 5) * torch.finfo(dtype).eps
    # An adapter is as large as its system is ill-conditioned, and so is what it passes through.
    worst = solution.condition_numbers.amax(-1)
    assert (solution.rounding_error <= 10 * unit * worst**2).all()
    tolerance = float(solution.rounding_error.max()) + 30 * unit * 3**depth
    spectral, frobenius = tails(frozen, target, sum(ranks))
    norms: list[tuple[Norm, float, torch.Tensor, np.ndarray]] = [
        (2, 1, solution.spectral_error, spectral),
        ("fro", width**0.5, solution.frobenius_error, frobenius),
    ]
    for norm, factor, predicted, expected in norms:
        np.testing.assert_allclose(predicted.numpy(), expected, rtol=0, atol=30 * unit * factor)
        measured = distance(adapted, target, norm)
        np.testing.assert_allclose(measured, expected, rtol=0, atol=tolerance * factor)


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(0, 7), seeds)
def test_one_rank_for_layers_of_any_sizes(widths: list[int], rank: int, seed: int) -> None:
    frozen = LinearNetwork(of_widths(widths, seed=seed).weights)
    rank = min(rank, widths[0], widths[-1])
    change = strategies.random_matrix(widths[-1], widths[0], condition_number=2, seed=seed)
    target = LinearNetwork([frozen.product() + lowrank.truncated_svd(change, rank).matrix()])
    sides = [min(weight.shape) for weight in frozen.weights]
    try:
        threshold = int(Gap(frozen, target).threshold)
    except InputError as refused:
        for R in range(1, max(sides) + 1):
            with pytest.raises(InputError, match=f"^{re.escape(str(refused))}$"):
                adapt_linear(frozen, target, R)
        return
    for R in range(max(sides) + 1):
        found = adapt_linear(frozen, target, R)
        off = distance(found.adapters.merge(frozen), target)
        if R < threshold:
            assert found.spectral_error >= 1 / 2 - 1e-10
            assert off == pytest.approx(float(found.spectral_error), abs=1e-10)
            continue
        pairs = zip(found.adapters.ranks, sides, strict=True)
        assert threshold == 0 or all(r == min(R, side) for r, side in pairs)
        assert off <= 1e-10


def test_alternatives_rescue_what_the_plain_splitting_loses() -> None:
    frozen = LinearNetwork.random(6, 16, batch_shape=(20,), seed=0)
    target = LinearNetwork.random(1, 16, batch_shape=(20,), seed=1)
    with plain_splitting():
        plain = adapt_linear(frozen, target, 3, throw=False)
    best = adapt_linear(frozen, target, 3)
    assert (best.rounding_error <= plain.rounding_error).all()
    assert best.rounding_error.median() < 1e-3 * plain.rounding_error.median()


@pytest.mark.parametrize("depth", [10, 20])
def test_rank_to_spare_keeps_deep_networks_from_being_singular(depth: int) -> None:
    # Without it the product of so many layers rounds by 1e-8 to 1e3.
    frozen = LinearNetwork.random(depth, 16, batch_shape=(20,), seed=depth)
    found = adapt_linear(frozen, LinearNetwork.random(1, 16, seed=1), 16)
    assert found.rounding_error.max() < 1e-12


CHANGES = ("generic", "nilpotent", "of square 0", "turn", "singular", "minus 1", "none")


def change(kind: str, width: int, rank: int, seed: int) -> np.ndarray:
    """``K'`` of a rank near that given, for the target ``P (1 + K')``."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(width, width)))[0]
    middle = np.zeros((width, width))
    ones = np.arange(rank)
    if kind == "generic":
        return basis[:, :rank] @ generator.normal(size=(rank, width)) / width**0.5
    if kind == "nilpotent":
        middle[ones[: width - 1], ones[: width - 1] + 1] = 1
    elif kind == "of square 0":
        half = ones[: width // 2]
        middle[half, width - 1 - half] = 1
    elif kind == "turn":
        even = ones[: rank - rank % 2]
        middle[even, even] = -1
        middle[even[::2], even[1::2]], middle[even[1::2], even[::2]] = -1, 1
    elif kind == "singular":
        middle[ones, ones] = np.where(ones % 2, -1, 1)
    elif kind == "minus 1":
        middle[ones, ones] = -1
    return basis @ middle @ basis.T


@given(
    st.sampled_from(CHANGES), st.integers(1, 12), st.integers(1, 6), st.booleans(), seeds, st.data()
)
def test_every_change_of_the_total_rank_is_reached(
    kind: str, width: int, depth: int, rotations: bool, seed: int, data: st.DataObject
) -> None:
    """[lem-any-change]: whatever the partial targets are, at the least total rank there is."""
    frozen = conditioned(depth, width, kappa=1.0 if rotations else 3.0, seed=seed)
    rank = data.draw(st.integers(0, width))
    product = frozen.product().numpy()
    target = product + product @ change(kind, width, rank, seed)
    least = int(np.linalg.matrix_rank(target - product, tol=1e-9))
    cuts = sorted(data.draw(st.integers(0, least)) for _ in range(depth - 1))
    ranks = [b - a for a, b in itertools.pairwise([0, *cuts, least])]
    # A target that is 0 but for rounding has no digits of its own to be reached.
    solution = adapt_linear(frozen, [target], ranks, throw=False)
    reached = np.eye(width)
    for weight, update, R in zip(frozen.weights, solution.adapters.updates, ranks, strict=True):
        matrix = update.left.numpy() @ update.right.numpy().T
        assert np.linalg.matrix_rank(matrix) <= R
        reached = (weight.numpy() + matrix) @ reached
    sizes = [np.linalg.norm(matrix, 2) for matrix in (product, target)]
    assert np.linalg.norm(reached - target, 2) <= 1e-10 * max(sizes)


@pytest.mark.parametrize("singular", [0, 1, 2])
def test_one_singular_layer_with_rank_to_spare_is_adapted_first(singular: int) -> None:
    weights = list(conditioned(3, 6, seed=3).weights)
    U, S, Vh = torch.linalg.svd(weights[singular])
    weights[singular] = (U * torch.where(S > S[-2], S, 0)) @ Vh
    frozen, target = LinearNetwork(weights), LinearNetwork.random(1, 6, seed=4)
    solution = adapt_linear(frozen, target, 2)
    assert distance(solution.adapters.merge(frozen), target) < 1e-12


@given(st.integers(2, 7), st.integers(2, 4), seeds, st.data())
def test_a_singular_layer_with_the_rank_that_it_lacks_attains_the_bound(
    width: int, depth: int, seed: int, data: st.DataObject
) -> None:
    kernel, which = data.draw(st.integers(1, width)), data.draw(st.integers(0, depth - 1))
    target = LinearNetwork.random(1, width, seed=seed)
    weights = [*conditioned(depth, width, seed=seed).weights]
    weights[which] = lowrank.truncated_svd(weights[which], width - kernel).matrix()
    ranks = data.draw(st.lists(st.integers(0, width), min_size=depth, max_size=depth))
    ranks[which] = max(ranks[which], kernel)
    found = adapt_linear(LinearNetwork(weights), target, ranks)
    merged = found.adapters.merge(LinearNetwork(weights))
    spectral, _ = tails(LinearNetwork(weights), target, sum(ranks))
    np.testing.assert_allclose(distance(merged, target), spectral, atol=1e-7)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 5), dtypes)
def test_a_target_that_is_reached_already_needs_nothing(
    width: int, depth: int, rank: int, dtype: torch.dtype
) -> None:
    rank = min(rank, width)
    for frozen in (
        LinearNetwork(torch.zeros(depth, width, width, dtype=dtype)),
        conditioned(depth, width, dtype=dtype),
    ):
        target = LinearNetwork([frozen.product()])
        solution = adapt_linear(frozen, target, rank)
        assert all(not update.matrix().any() for update in solution.adapters.updates)
        assert Gap(frozen, target).threshold == 0


def test_rounding_is_not_mistaken_for_a_small_error() -> None:
    # The product is exactly the identity, though its factors are as large as 1e8.
    diagonal = np.diag([1e8, 1e-8])
    frozen = LinearNetwork([diagonal, np.linalg.inv(diagonal)])
    target = LinearNetwork([2 * np.eye(2)])
    assert Gap(frozen, target).threshold == 1
    solution = adapt_linear(frozen, target, 1)
    assert distance(solution.adapters.merge(frozen), target) < 1e-12


@pytest.mark.parametrize("grow", [1.0, 6.0])
def test_a_network_too_deep_for_the_arithmetic_is_refused(grow: float) -> None:
    frozen = LinearNetwork.random(64, 4).map(lambda weight: grow * weight)
    target = LinearNetwork.random(1, 4, seed=1)
    with pytest.raises(SingularError, match="more than half of the digits"):
        adapt_linear(frozen, target, 1)
    assert adapt_linear(frozen, target, 1, throw=False).rounding_error > 1e-6
