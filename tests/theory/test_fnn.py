"""ReLU networks and linearization: exact over the region, however extreme the input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, benign, dtypes, normal, of_widths, seeds
from torch import Tensor

from lorapower import InputError, PrecisionError, SingularError, bounds
from lorapower.constructions import FNNAdaptation, adapt_relu
from lorapower.networks import FNN, LinearNetwork, Partition, blocks
from lorapower.regions import Ball, Box, Region, Samples


def forward(network: FNN, x: Tensor) -> np.ndarray:
    """By numpy, in double precision."""
    z = before = x.double().numpy()
    for weight, bias in zip(network.weights, network.biases, strict=True):
        before = weight.double().numpy() @ z + bias.double().numpy()[..., None]
        z = np.maximum(before, 0)
    return before if network.linear_last else z


def region_of(kind: str, width: int, seed: int) -> Region:
    x = normal(width, 40, seed=seed)
    return {"ball": Ball(4.0, x[:, 0]), "box": Box(-3.0, 2.0), "samples": Samples(x)}[kind]


def worst_inputs(found: FNNAdaptation, adapted: FNN, kind: str) -> Tensor:
    """Where some unit of the first block's inner layers comes closest to being switched off."""
    region = found.region
    inner = LinearNetwork([w[..., : region.width] for w in adapted.weights[:1]]).product()
    if kind == "ball":
        steps = -4.0 * inner / inner.norm(dim=-1, keepdim=True)
    elif kind == "box":
        steps = -2.5 * inner.sign()
    else:
        return region.sample(400, edge=len(found.partition.sizes) == 1)
    return region.centre + steps.mT


def tolerance(found: FNNAdaptation, x: Tensor) -> Tensor:
    """Set by the type and by what the construction itself says about rounding."""
    lost = 10 ** found.digits_lost.amax(-1)
    unit = torch.finfo(x.dtype).eps * lost
    return 30 * unit + 30 * found.rounding_errors.amax(-1) * (1 + x.norm(dim=-2).amax(-1))


@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), batch_shapes, dtypes, seeds)
def test_network_is_layer_after_layer(
    depth: int, width: int, linear_last: bool, batch: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    network = FNN.random(
        depth, width, linear_last=linear_last, batch_shape=batch, seed=seed, dtype=dtype
    )
    assert network.relus == depth - linear_last
    assert (network.depth, network.batch_shape, network.dtype) == (depth, batch, dtype)
    x = normal(width, 7, seed=seed).to(dtype)
    atol = 100 * torch.finfo(dtype).eps
    np.testing.assert_allclose(network(x).numpy(), forward(network, x), atol=atol)
    before = network.preactivations(x)
    assert len(before) == depth
    z = x
    for l in range(depth):
        z = network.layers(slice(l, l + 1))(z)
        expected = before[l] if linear_last and l == depth - 1 else before[l].relu()
        torch.testing.assert_close(z, expected)
    torch.testing.assert_close(z, network(x))
    if depth > 1:
        torch.testing.assert_close(network.layers(slice(1, None))(before[0].relu()), network(x))
        assert not network.layers(slice(0, -1)).linear_last


@given(st.integers(1, 3), st.booleans(), seeds)
def test_a_linear_last_layer_stays_one(depth: int, linear_last: bool, seed: int) -> None:
    network = FNN.random(depth, 3, linear_last=linear_last, batch_shape=(2,), seed=seed)
    for copy in (
        network.with_parameters(network.weights),
        network.to(torch.float32),
        network.map(lambda values: -values),
        network[1],
        network.layers(slice(depth - 1, depth)),
    ):
        assert copy.linear_last == linear_last


sizes = st.tuples(st.integers(1, 10), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
region_kinds = st.sampled_from(["ball", "box", "samples"])


@given(sizes, batch_shapes, region_kinds, st.booleans(), seeds)
def test_exact_from_the_threshold_on_all_over_the_region(
    sizes: tuple[int, ...], batch: tuple[int, ...], kind: str, linear_last: bool, seed: int
) -> None:
    width, layers, size, spare = sizes
    frozen = benign(layers * size, width, linear_last=linear_last, batch=batch, seed=seed)
    target = FNN.random(layers, width, linear_last=linear_last, seed=seed + 1)
    rank = min(int(bounds.fnn_threshold(frozen, target).max()) + spare, width)
    region = region_of(kind, width, seed)
    found = adapt_relu(frozen, target, rank, region, throw=False)
    adapted = found.adapters.merge(frozen)
    assert found.adapters.ranks == (rank,) * frozen.depth
    assert found.digits_lost.shape == (*batch, layers)
    # The hull of samples is promised for one layer, behind it only what the samples become.
    edge = kind != "samples" or layers == 1
    fitted = found.region
    for x in (
        fitted.sample(200, seed=seed),
        fitted.sample(200, edge=edge, seed=seed),
        worst_inputs(found, adapted, kind),
    ):
        expected = torch.from_numpy(forward(target, x))
        allowed = tolerance(found, x)[..., None, None] * (1 + expected.abs().max())
        assert ((adapted(x) - expected).abs() <= allowed).all()
        assert found.covers(frozen, x).all()
    assert (found.block_errors <= 1e-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [4.0, 1e2, 1e4])
def test_digits_are_lost_as_expected(dtype: torch.dtype, radius: float) -> None:
    frozen = FNN.random(4, 16, batch_shape=(40,), seed=3, dtype=dtype)
    target = FNN.random(2, 16, batch_shape=(40,), seed=4, dtype=dtype)
    found = adapt_relu(frozen, target, 8, Ball(radius), throw=False)
    x = normal(16, 500).to(dtype)
    x = x * (4.0 / x.norm(dim=0)).clamp(max=1)
    exact = target.to(torch.float64)(x.double())
    errors = (found.adapters.merge(frozen)(x).double() - exact).square().mean((-2, -1)).sqrt()
    unit = torch.finfo(dtype).eps / 2 * exact.square().mean((-2, -1)).sqrt()
    lost = (errors / unit).log10()
    assert (lost - found.digits_lost.amax(-1)).abs().median() < 0.5
    assert (lost - found.digits_lost.amax(-1)).max() < 1.5


@pytest.mark.parametrize("far", [1e12, torch.finfo(torch.float64).max ** 0.6])
def test_a_region_that_swallows_the_precision_is_refused_unless_accepted(far: float) -> None:
    frozen, target, region = FNN.random(2, 8), FNN.random(1, 8, seed=2), Ball([1.0, far, 1.0])
    with pytest.raises(PrecisionError, match=r"block 1 of batch member 1.* at most 7\.8") as error:
        adapt_relu(frozen, target, 4, region)
    assert error.value.block == 1
    assert error.value.digits_lost > 10
    accepted = adapt_relu(frozen, target, 4, region, throw=False)
    assert accepted.success.tolist() == [True, False, True]
    # One layer alone needs no biases; the network fails with the block that does.
    one, partition = FNN.random(3, 8, seed=1), Partition([1, 2])
    found = adapt_relu(one, FNN.random(2, 8, seed=2), 8, Ball(far), partition, throw=False)
    assert found.digits_lost[0] == 0
    assert found.digits_lost[1] > 10
    assert not found.success


@given(st.integers(1, 6), st.integers(0, 2), st.integers(0, 6), seeds)
def test_a_last_block_of_one_linear_layer_needs_no_region(
    width: int, before: int, rank: int, seed: int
) -> None:
    rank = min(rank, width)
    frozen = benign(before + 1, width, linear_last=True, seed=seed)
    last = FNN.random(1, width, linear_last=True, seed=seed + 1)
    # The layers before are the target's own, so that nothing there is to be made affine.
    target = FNN(
        [*frozen.weights[:-1], *last.weights], [*frozen.biases[:-1], *last.biases], linear_last=True
    )
    found = adapt_relu(frozen, target, [0] * before + [rank], Ball(0.1))
    adapted = found.adapters.merge(frozen)
    x = 1e3 * normal(width, 50, seed=seed)
    assert found.covers(frozen, x).all()
    inner = target.layers(slice(0, before))(x) if before else x
    off = (adapted(x) - target(x)).norm(dim=0)
    limit = found.block_errors[-1] * inner.norm(dim=0)
    assert (off <= limit * (1 + 1e-9) + 1e-9).all()


@given(st.booleans(), seeds, st.data())
def test_layers_of_any_sizes_are_exact_from_the_threshold_on_and_not_below(
    linear_last: bool, seed: int, data: st.DataObject
) -> None:
    sizes = st.integers(1, 6)
    widths = data.draw(st.lists(sizes, min_size=2, max_size=5))
    outline = data.draw(st.lists(sizes, min_size=2, max_size=len(widths)))
    if data.draw(st.booleans()):
        outline = [min(outline[0], widths[0]), *outline[1:-1], min(outline[-1], widths[-1])]
    frozen = of_widths(widths, linear_last=linear_last, seed=seed, purpose="frozen")
    target = of_widths(outline, linear_last=linear_last, seed=seed, purpose="target")
    largest = max(min(weight.shape) for weight in frozen.weights)
    try:
        # Of some target layers the frozen blocks are already what they should be.
        weights = [
            gap.frozen.product() if data.draw(st.booleans()) else weight
            for gap, weight in zip(blocks(frozen, target), target.weights, strict=True)
        ]
        target = target.with_parameters(weights)
        threshold = int(bounds.fnn_threshold(frozen, target))
    except InputError as refused:
        for R in range(1, largest + 1):
            with pytest.raises(InputError, match=f"^{re.escape(str(refused))}$"):
                adapt_relu(frozen, target, R, Ball(2.0), throw=False)
        return
    for R in range(largest + 1):
        found = adapt_relu(frozen, target, R, Ball(2.0), throw=False)
        x = found.region.sample(100, edge=True, seed=seed)
        outputs, expected = found.adapters.merge(frozen)(frozen.fill(x)), target(x)
        off = outputs[: outline[-1]] - expected
        if R < threshold:
            # The bound may be 0: no input may reach a block that is off.
            assert found.block_errors.max() > 1e-6
            bound = bounds.fnn_error_on(frozen, target, R, x)
            assert off.square().sum(0).mean().sqrt() <= bound + 1e3 * tolerance(found, x)
            continue
        # What is reached without adapters is so up to the rounding of products.
        assert found.block_errors.max() <= 1e-12
        assert off.abs().max() <= 10 * tolerance(found, x) * (1 + expected.abs().max())
        assert found.covers(frozen, x).all()
        # Behind a ReLU nothing is left of the units that the target does not have.
        assert linear_last or not outputs[outline[-1] :].any()


def test_at_a_single_point_few_digits_are_lost() -> None:
    # Rounding alone decides which units are active.
    frozen = FNN.random(3, 8, batch_shape=(50,), seed=1)
    point = adapt_relu(frozen, FNN.random(1, 4, seed=2), 2, Box(0.5, 0.5), throw=False)
    assert point.covers(frozen, torch.full((4, 1), 0.5).double()).all()
    assert (point.digits_lost < 3).all()


def test_a_singular_block_is_named_by_its_layer_in_the_network() -> None:
    frozen = FNN.random(4, 4)
    weights = [*frozen.weights[:2], torch.zeros(4, 4).double(), torch.zeros(4, 4).double()]
    with pytest.raises(SingularError, match=r"layer [34] ") as error:
        adapt_relu(FNN(weights, frozen.biases), FNN.random(2, 4, seed=1), 2, Ball(1.0))
    assert error.value.layer in (3, 4)


@given(st.integers(1, 20), st.data())
def test_uniform_blocks_are_equal_but_for_the_remainder(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    sizes = Partition.uniform(depth, count).sizes
    assert sum(sizes) == depth
    assert set(sizes[:-1]) <= {depth // count}
    assert sizes[-1] == depth // count + depth % count
    assert Partition([2, 1, 3]).slices == [slice(0, 2), slice(2, 3), slice(3, 6)]
