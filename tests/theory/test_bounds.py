"""Regions, error bounds of ReLU networks, floors of final layers, and the risk of samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, normal, of_widths, seeds
from torch import Tensor

from lorapower import InputError, bounds, lowrank
from lorapower.bounds import samples
from lorapower.constructions import adapt_relu
from lorapower.networks import FNN, LinearNetwork, Partition
from lorapower.regions import Ball, Box, Region, Samples
from lorapower.regression import reduced_rank


def product(frozen: FNN, layers: slice) -> np.ndarray:
    """Computed by numpy."""
    return reduce(lambda P, W: W.numpy() @ P, frozen.weights[layers], np.eye(frozen.widths[0]))


def rms(difference: Tensor) -> Tensor:
    return difference.square().sum(-2).mean(-1).sqrt()


sides = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


@given(sides, st.sampled_from(["ball", "box"]), st.booleans(), seeds, st.data())
def test_bounds_hold_for_any_ranks_and_partition(
    sides: tuple[int, ...], kind: str, linear_last: bool, seed: int, data: st.DataObject
) -> None:
    width, layers, size = sides
    depth = layers * size
    frozen, target = (
        FNN.random(count, width, linear_last=linear_last, seed=seed + shift)
        for shift, count in enumerate((depth, layers))
    )
    ranks = data.draw(st.lists(st.integers(0, width), min_size=depth, max_size=depth))
    cuts = data.draw(
        st.sets(st.integers(1, depth - 1), min_size=layers - 1, max_size=layers - 1)
        if depth > 1
        else st.just(set())
    )
    ends = [0, *sorted(cuts), depth]
    sizes = Partition([b - a for a, b in pairwise(ends)])
    region = Ball(3.0, 0.5) if kind == "ball" else Box(-2.0, 1.0)
    found = adapt_relu(frozen, target, ranks, region, sizes, throw=False)
    adapted = found.adapters.merge(frozen)
    for block, weight, error in zip(sizes.slices, target.weights, found.block_errors, strict=True):
        E = weight.numpy() - product(frozen, block)
        sigma = np.append(np.linalg.svd(E, compute_uv=False), 0.0)
        assert float(error) == pytest.approx(sigma[min(sum(ranks[block]), width)], abs=1e-9)
    lost = 10 ** float(found.digits_lost.max()) * 1e-14 + 1e2 * float(found.rounding_errors.max())
    for edge in (False, True):
        x = found.region.sample(300, edge=edge, seed=seed)
        difference = adapted(x) - target(x)
        allowed = lost * (1 + float(target(x).abs().max()))
        assert rms(difference) <= bounds.fnn_error_on(frozen, target, ranks, x, sizes) + allowed
        assert rms(difference) <= bounds.fnn_error(frozen, target, ranks, x, sizes) + allowed


def test_the_bound_takes_the_trace_of_the_second_moment() -> None:
    # E = σI and Σ = I: the error before the ReLU is σ²D, more than σ² times the norm √D of Σ.
    D, sigma = 16, 0.5
    frozen = FNN(torch.eye(D).expand(2, D, D), torch.zeros(2, D))
    target = FNN([(1 + sigma) * torch.eye(D)], [torch.full((D,), 9.0)])
    x = normal(D, 20000).float()
    found = adapt_relu(frozen, target, 0, Samples(x))
    squared = rms(found.adapters.merge(frozen)(x) - target(x)) ** 2
    assert squared > 0.9 * sigma**2 * D
    assert squared <= bounds.fnn_error(frozen, target, 0, x.square().sum(0).mean()) ** 2 * 1.001
    for trace in (float(D), D, np.int64(D)):
        assert bounds.fnn_error(frozen, target, 0, trace) ** 2 == pytest.approx(sigma**2 * D)


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
    frozen = FNN([torch.eye(2)], [torch.zeros(2)]).to(torch.float64)
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
    found = bounds.final_layers_floor(frozen, target, samples=20000)
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
    networks = FNN([W], [b]), FNN([V], [c])
    found = bounds.final_layers_floor(*networks, samples=20000, seed=seed)
    noise = np.hypot(np.std(variances) / len(variances) ** 0.5, float(found.standard_error))
    assert abs(np.mean(variances) - float(found.mean_squared_error)) < 4 * noise


def test_there_is_no_floor_where_the_first_layer_keeps_everything() -> None:
    frozen = FNN([torch.eye(4)], [torch.full((4,), 50.0)]).to(torch.float64)
    found = bounds.final_layers_floor(frozen, FNN.random(1, 4), samples=100)
    assert found.mean_squared_error == 0
    x = normal(4, 5)
    assert torch.equal(bounds.colliding_inputs(frozen, x), x)


def some_region(kind: str, width: int, seed: int) -> Region:
    points = normal(width, 20, seed=seed)
    if kind == "ball":
        return Ball(2.5, points[:, 0])
    if kind == "box":
        return Box(points.amin(1), points.amax(1))
    return Samples(points, margin=0.3)


@given(st.sampled_from(["ball", "box"]), st.integers(1, 6), seeds)
def test_regions_of_images_hold_them(kind: str, width: int, seed: int) -> None:
    region = some_region(kind, width, seed)
    matrix = normal(3, width, seed=seed + 1)
    bias = normal(3, 1, seed=seed + 2)
    affine = region.image(matrix, matrix @ region.centre + bias)
    for edge in (False, True):
        x = region.sample(500, edge=edge, seed=seed)
        images = matrix @ x + bias
        for values, holds in (
            (images, affine),
            (images.relu(), affine.relu()),
            (x.relu(), region.relu()),
        ):
            assert isinstance(holds, Box)
            assert ((values - holds.centre).abs() <= holds.half + 1e-12).all()
            # No more than that: of a single coordinate the values fill the box.
            if edge and width == 1:
                assert (values.amax(-1) - values.amin(-1) >= 2 * holds.half[:, 0] - 1e-12).all()


@given(st.integers(1, 6), st.floats(0.1, 10), seeds)
def test_typical_inputs_have_the_given_scale_and_are_in_the_region(
    width: int, scale: float, seed: int
) -> None:
    wide = Ball(1e3).fit(width, torch.float64)
    inputs = wide.typical(scale)
    covariance = inputs @ inputs.mT / inputs.shape[1]
    torch.testing.assert_close(covariance, scale**2 * torch.eye(width).double())
    for kind in ("ball", "box"):
        region = some_region(kind, width, seed)
        identity = torch.eye(width, dtype=torch.float64)
        beyond = (region.typical(scale) - region.centre).abs() + region.lowest(identity)
        assert (beyond <= 1e-12).all()


@pytest.mark.parametrize("region", [Ball(2.0), Ball([1.0, 2.0]), Ball(1, 0.5), Box(-1, 2)])
def test_single_numbers_need_a_width_first(region: Region) -> None:
    matrix = normal(4, 3)
    needs_width = [
        lambda: region.width,
        lambda: region.centre,
        lambda: region.sample(5),
        lambda: region.typical(1.0),
    ]
    for use in needs_width:
        with pytest.raises(InputError, match=r"region must be of a known width.*fit it to a width"):
            use()
    fitted = region.fit(3, torch.float64)
    torch.testing.assert_close(region.lowest(matrix), fitted.lowest(matrix))
    assert region.batch_shape == fitted.batch_shape
    assert fitted.sample(5).shape == (*fitted.batch_shape, 3, 5)


def test_plain_numbers_and_arrays_make_regions() -> None:
    assert Ball(2).fit(3, torch.float32).centre.dtype == torch.float32
    assert Box(-1, 1).fit(3, torch.float64).half.flatten().tolist() == [1, 1, 1]
    assert Box(np.zeros(2), np.ones(2)).centre.flatten().tolist() == [0.5, 0.5]
    assert Ball(1.0, [0.0]).sample(5).shape == Box([0.0], 1.0).sample(5).shape == (1, 5)
    assert Ball(0).fit(2, torch.float64).sample(3, edge=True).abs().max() == 0


@pytest.mark.parametrize(
    "region", [Ball(1.0, torch.zeros(3)), Box([0.0], 1.0), Samples(torch.ones(1, 2))]
)
def test_a_region_has_one_width(region: Region) -> None:
    with pytest.raises(InputError, match="region must be of 4 coordinates"):
        region.fit(4, torch.float64)


def test_the_ball_about_inputs_holds_them_and_no_more() -> None:
    x = 3 + normal(2, 4, 30)
    ball = Ball.about(x)
    distance = torch.linalg.vector_norm(x - ball.centre, dim=-2)
    torch.testing.assert_close(distance.amax(-1), ball.radius)
    torch.testing.assert_close(ball.centre, x.mean(-1, keepdim=True))
    torch.testing.assert_close(Ball.about(x, 1.5).radius, 1.5 * ball.radius)


# --- Risks ----------------------------------------------------------------------------------------


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))


def trace_of_derivative(function: Callable[[Tensor], Tensor], M: Tensor) -> float:
    """Differences of each entry in itself, added up."""
    h = 1e-6
    steps = h * torch.eye(M.numel(), dtype=M.dtype).view(-1, *M.shape)
    gaps = [function(M + step) - function(M - step) for step in steps]
    return float((torch.stack(gaps) * steps).sum()) / (2 * h**2)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_divergence_is_that_of_the_best_approximation(out: int, span: int, seed: int) -> None:
    """The trace of the derivative of ``M ↦ LR_r(M)``, by differences."""
    M = normal(out, span, seed=seed)
    design = samples.Design(10, out, span, 1.0)
    found = design.divergence(lowrank.spectrum(M))
    for r in range(min(out, span) + 1):
        total = trace_of_derivative(lambda X, r=r: lowrank.truncated_svd(X, r).matrix(), M)  # type: ignore[misc]
        assert float(found[r]) == pytest.approx(total, rel=1e-3, abs=1e-3)
    assert float(found[-1]) == pytest.approx(out * span)
    least = torch.arange(len(found)) * (out + span - torch.arange(len(found)))
    assert (found >= least - 1e-9).all()


def observed() -> tuple[LinearNetwork, Tensor, Tensor, Tensor]:
    """A network, a change of rank 3, and inputs and outputs that show it through noise."""
    frozen, change = LinearNetwork.random(2, 12), normal(12, 3) @ normal(12, 3, seed=1).mT / 4
    x = normal(12, 400, seed=2)
    return frozen, change, x, (frozen.product() + change) @ x + 0.3 * normal(12, 400, seed=3)


@pytest.mark.parametrize("noise", [None, 0.3])
def test_the_rank_that_samples_pay_for(noise: float | None) -> None:
    frozen, _, x, y = observed()
    found = samples.fit(frozen, x, y, noise=noise)
    assert found.rank == 3
    assert found.design.noise == pytest.approx(0.3, rel=0.05)
    few = samples.fit(frozen, x[:, :8], y[:, :8], noise=30.0)
    assert few.rank == 0
    assert few.design.span == 8


def test_span_and_noise_are_found() -> None:
    single = LinearNetwork.random(1, 8, dtype=torch.float32)
    frozen, x = LinearNetwork.random(1, 8), normal(8, 2) @ normal(2, 60, seed=1)
    # In the coarser of the types of inputs and network.
    for network, inputs in ((frozen, x.float()), (single, x), (frozen, x)):
        assert samples.fit(network, inputs, normal(8, 60, seed=2)).design.span == 2
    x = normal(8, 200)
    y = 1e6 * normal(8, 8, seed=1) @ x + 1e-3 * normal(8, 200, seed=2)
    assert samples.fit(frozen, x, y).design.noise == pytest.approx(1e-3, rel=0.1)


def test_noise_is_estimated_without_bias() -> None:
    frozen, x = LinearNetwork.random(1, 8), normal(8, 16)
    fits = [samples.fit(frozen, x, normal(8, 16, seed=s)) for s in range(200)]
    assert sum(fit.design.noise**2 for fit in fits) / 200 == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("outputs", "span", "edge"), [(5, 5, 15), (1, 6, 9), (6, 1, 9)])
def test_edge_of_a_single_direction(outputs: int, span: int, edge: float) -> None:
    assert samples.Design(100, outputs, span, 10.0).edge == pytest.approx(edge)


def test_equal_singular_values_are_kept_or_dropped_together() -> None:
    frozen, x = LinearNetwork.random(1, 4), 3 * torch.eye(4, dtype=torch.float64)
    for noise, rank in ((1.0, 4), (9.0, 0)):
        found = samples.fit(frozen, x, (frozen.product() + torch.eye(4)) @ x, noise=noise)
        assert found.rank == rank
        assert found.risks[1:4].isinf().all()


def test_what_leaves_the_rank_open_is_refused() -> None:
    frozen, x = LinearNetwork.random(1, 4), normal(4, 9)
    narrow = LinearNetwork([normal(2, 4), normal(4, 2)])
    singular = LinearNetwork([narrow.product(), normal(4, 4)])
    for name, network, inputs, outputs in (
        ("noise", frozen, x[:, :4], x[:, :4]),
        ("frozen", narrow, x, x),
        ("frozen", singular, x, x),
        ("span", frozen, 0 * x, x),
        ("outputs", frozen, x, x[:, 1:]),
    ):
        with pytest.raises(InputError, match=f"^{name}"):
            samples.fit(network, inputs, outputs)
    with pytest.raises(InputError, match=r"^spectrum"):
        samples.Design(9, 2, 3, 1.0).sure(torch.ones(3))
    for noise in (-1.0, torch.inf):
        with pytest.raises(InputError, match=r"^noise"):
            samples.Design(9, 2, 3, noise)


def shrunk_matrix(M: Tensor, limit: float, exponent: float) -> Tensor:
    U, S, V = lowrank.svd(M)
    kept = S * (1 - (limit / S) ** exponent).clamp(min=0)
    return (U * kept[..., None, :]) @ V.mT


@given(shapes, st.floats(0, 2), st.sampled_from([1, 2, 8]), st.booleans(), st.integers(0, 99))
def test_shrunk_risk_has_the_divergence_of_shrinking(
    shape: tuple[int, int], part: float, exponent: int, equal: bool, seed: int
) -> None:
    """The trace of the derivative, by differences; also where singular values agree."""
    out, span = shape
    M = normal(out, span, seed=seed)
    if equal:
        U, _, V = lowrank.svd(M)
        M = U @ V.mT
    values = lowrank.spectrum(M)
    limit = part * float(values.mean())
    if (values - limit).abs().min() < 1e-4:
        return
    design = samples.Design(10, out, span, 2.0)
    found = design.shrunk_risk(values, torch.tensor(limit), exponent)
    total = trace_of_derivative(lambda X: shrunk_matrix(X, limit, exponent), M)
    missed = (shrunk_matrix(M, limit, exponent) - M).square().sum()
    predicted = float(missed) + design.variance * (2 * total - out * span)
    assert float(found) == pytest.approx(predicted, rel=1e-3, abs=1e-3)


def test_shrinking_gives_an_update_of_the_rank_that_it_says() -> None:
    frozen, change, x, y = observed()
    found = samples.fit(frozen, x, y)
    missing = y - frozen.product() @ x
    least = reduced_rank(missing, x, 12, intercept=False).update.matrix()
    # In the metric of the inputs, it is what least squares finds, shrunk.
    scaled = lowrank.svd(least @ x)
    kept = found.kept / (scaled.S / 400**0.5)[:12]
    assert ((kept >= 0) & (kept < 1 + 1e-12)).all()
    direct = (scaled.U * found.kept) @ scaled.V.mT * 400**0.5
    torch.testing.assert_close(found.update.matrix() @ x, direct)
    assert found.update.rank == int((found.kept > 0).sum()) >= 3

    def risk(K: Tensor) -> float:
        return float(((K - change) @ x).square().sum() / 400)

    fits = [reduced_rank(missing, x, r, intercept=False).update.matrix() for r in range(13)]
    assert risk(found.update.matrix()) <= 1.01 * min(map(risk, fits))
    assert found.risk == pytest.approx(risk(found.update.matrix()), abs=0.02)


def test_without_noise_all_but_rounding_is_kept_and_with_much_nothing() -> None:
    frozen, x, change = LinearNetwork.random(1, 8), normal(8, 60), normal(8, 8, seed=1)
    y = (frozen.product() + change) @ x
    found = samples.fit(frozen, x, y, noise=0.0)
    assert found.rank == 8
    assert (found.risks.diff() < 0).all()
    torch.testing.assert_close(found.update.matrix(), change)
    assert found.risk == pytest.approx(0, abs=1e-9)
    assert samples.fit(frozen, x, y, noise=1e4).update.rank == 0
    low = change[:, :3] @ normal(3, 8, seed=2)
    assert samples.fit(frozen, x, (frozen.product() + low) @ x, noise=0.0).rank == 3
