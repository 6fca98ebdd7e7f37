"""What tuning the final layers cannot reach, against exact values and rejection sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, normal, of_widths, seeds
from torch import Tensor

from lorapower import bounds
from lorapower.networks import FNN


def single(weight: Tensor, bias: Tensor) -> FNN:
    return FNN([weight.double()], [bias.double()])


@given(st.integers(2, 10), batch_shapes, dtypes, seeds)
def test_colliding_inputs_look_the_same_behind_the_first_layer(
    width: int, batch: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    frozen = FNN.random(2, width, batch_shape=batch, seed=seed, dtype=dtype)
    x = normal(width, 50, seed=seed).to(dtype)
    other = bounds.colliding_inputs(frozen, x, reach=2.0, seed=seed)
    h = frozen.layers(slice(0, 1))
    tolerance = 100 * torch.finfo(dtype).eps
    assert (h(x) - h(other)).abs().max() <= tolerance
    assert (frozen(x) - frozen(other)).abs().max() <= tolerance
    distance = (other - x).norm(dim=-2)
    assert distance.max() <= 2 * (1 + tolerance)
    active = (h(x) > 0).sum(-2)
    assert (distance[active == width] == 0).all()
    assert (distance[active < width] > 0).all()


def test_they_lie_as_far_as_the_inactive_units_allow() -> None:
    # One inactive unit on each of two coordinates: from (-1, -2) the first leaves at 0.
    frozen = single(torch.eye(2), torch.zeros(2))
    x = torch.tensor([[-1.0], [-2.0]]).double()
    for seed in range(20):
        other = bounds.colliding_inputs(frozen, x, reach=100.0, seed=seed)
        assert (other <= 1e-12).all()
        assert (other - x).norm() == pytest.approx(100) or other.max().abs() < 1e-12


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_all_units_of_a_linear_layer_are_seen(units: int, inputs: int, seed: int) -> None:
    frozen = of_widths([inputs, units], linear_last=True, seed=seed)
    x = 3 * normal(inputs, 40, seed=seed)
    other = bounds.colliding_inputs(frozen, x, reach=1.5, seed=seed)
    torch.testing.assert_close(frozen(other), frozen(x), rtol=0, atol=1e-12)
    distance = (other - x).norm(dim=0)
    # No unit limits the way, where there is one.
    expected = torch.full_like(distance, 1.5 if units < inputs else 0.0)
    torch.testing.assert_close(distance, expected, rtol=1e-9, atol=0)


def test_the_floor_behind_a_linear_layer_is_what_its_null_space_holds() -> None:
    frozen = of_widths([6, 4], linear_last=True, seed=1)
    target = of_widths([6, 3], linear_last=True, seed=2)
    found = bounds.final_layers_floor(frozen, target, samples=20000, steps=32)
    # Given what the layer passes on, x is normal in its null space about the projection of x.
    null = torch.linalg.svd(frozen.weights[0])[2][4:]
    exact = float((target.weights[0] @ null.mT).square().sum() / 3)
    assert abs(found.mean_squared_error - exact) < 4 * found.standard_error + 0.01 * exact
    whole = of_widths([6, 6], linear_last=True, seed=1)
    assert bounds.final_layers_floor(whole, target, samples=50).mean_squared_error < 1e-24


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.nightly) for k in (1, 2))])
def test_the_floor_is_the_conditional_variance_found_by_rejection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    W, b, V, c = (rng.normal(size=size) / 2 for size in ((3, 4), 3, (4, 4), 4))
    variances = []
    for x in rng.normal(size=(1000, 4)):
        active = W @ x + b > 0
        _, _, Vh = np.linalg.svd(W[active], full_matrices=True)
        free = Vh[active.sum() :].T if active.any() else np.eye(4)
        start = x - free @ (free.T @ x)
        same = np.empty((0, 4))
        while len(same) < 200:
            moved = start + rng.normal(size=(5000, free.shape[1])) @ free.T
            kept = moved[((moved @ W[~active].T + b[~active]) <= 0).all(1)]
            same = np.concatenate([same, kept])
        variances.append(np.maximum(same @ V.T + c, 0).var(0, ddof=1).mean())
    found = bounds.final_layers_floor(
        FNN([W], [b]), FNN([V], [c]), samples=20000, steps=150, seed=seed
    )
    noise = np.hypot(np.std(variances) / len(variances) ** 0.5, float(found.standard_error))
    assert abs(np.mean(variances) - float(found.mean_squared_error)) < 4 * noise


def test_there_is_no_floor_where_the_first_layer_keeps_everything() -> None:
    frozen = single(torch.eye(4), torch.full((4,), 50.0))
    found = bounds.final_layers_floor(frozen, FNN.random(1, 4), samples=100)
    assert found.mean_squared_error == 0
    x = normal(4, 5)
    assert torch.equal(bounds.colliding_inputs(frozen, x), x)
