"""Batches without a member: the answer is an empty one of the right shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorapower import InputError, bounds, lowrank
from lorapower.constructions import fnn, linear, partition, transformer
from lorapower.networks import FNN, Gap, LinearNetwork, Network, Transformer
from lorapower.regions import Ball, Box, Region, Samples
from lorapower.training import Fresh, Tuning, minimize, train

WIDTH = 3
X = torch.ones(WIDTH, 5).double() + torch.eye(WIDTH, 5)
KINDS = ["linear", "fnn", "transformer", "narrow heads"]

pytestmark = pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)


def pair(kind: str, batch: tuple[int, ...]) -> tuple[Any, Any]:
    """A frozen network and a target, without a member."""
    if kind in ("linear", "fnn"):
        network: Any = {"linear": LinearNetwork, "fnn": FNN}[kind]
        frozen, target = (network.random(d, WIDTH, batch_shape=batch, seed=d) for d in (4, 2))
        return frozen, target
    size = WIDTH if kind == "transformer" else 2
    frozen, target = (
        Transformer.random(2, WIDTH, 2, head_size=size, batch_shape=batch, seed=seed)
        for seed in (0, 1)
    )
    return frozen, target


def adapted(kind: str, batch: tuple[int, ...], **options: Any) -> Any:
    networks = pair(kind, batch)
    if kind == "fnn":
        return fnn.adapt(*networks, 2, Ball(1.0), **options)
    return (linear if kind == "linear" else transformer).adapt(*networks, 2, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("throw", [True, False])
def test_networks_adapt_and_merge(batch: tuple[int, ...], kind: str, throw: bool) -> None:
    frozen, _ = pair(kind, batch)
    found = adapted(kind, batch, throw=throw)
    assert found.success.shape == batch
    merged: Network = found.adapters.merge(frozen)
    assert merged.batch_shape == batch
    assert merged(X).shape == (*batch, WIDTH, 5)
    assert merged.to(torch.float32)[..., :0].batch_shape == (*batch[:-1], 0)
    members = frozen.members(...)
    assert members.shape == batch


@pytest.mark.parametrize("ranks", [0, 3, [1, 0, 2, 3]])
def test_splittings(batch: tuple[int, ...], ranks: Any) -> None:
    found = linear.adapt(*pair("linear", batch), ranks, rtol=0.0)
    assert found.rounding_error.shape == batch
    assert found.condition_numbers.shape == (*batch, 4)
    assert found.adapters.updates[3].matrix().shape == (*batch, WIDTH, WIDTH)


@pytest.mark.parametrize(
    "region", [Ball(1.0), Box(-1.0, 1.0), Samples(X), Ball(torch.ones(0).double())], ids=repr
)
def test_relu_networks_over_regions(batch: tuple[int, ...], region: Region) -> None:
    frozen, target = pair("fnn", batch)
    found = fnn.adapt(frozen, target, 1, region, scalar_biases=True)
    for values in (found.error_bound, found.success):
        assert values.shape == batch
    for values in (found.block_errors, found.rounding_errors, found.plain, found.digits_lost):
        assert values.shape == (*batch, 2)
    assert found.covers(frozen, X).shape == (*batch, 5)
    assert bounds.fnn_data_threshold(frozen, target, X).shape == batch


def test_bounds(batch: tuple[int, ...]) -> None:
    linears, fnns, transformers = (pair(kind, batch) for kind in KINDS[:3])
    scalars = [
        bounds.linear_threshold(*linears),
        *bounds.linear_error(*linears, 2),
        bounds.fnn_threshold(*fnns),
        bounds.fnn_error(*fnns, 1, X),
        bounds.fnn_error(*fnns, 1, 3.0),
        bounds.fnn_error_on(*fnns, 1, X),
        bounds.transformer_threshold(*transformers),
        bounds.transformer_error(*transformers, adapted("transformer", batch).errors, X),
        bounds.final_layers_floor(*fnns, samples=4, steps=1).standard_error,
        partition.least_rank(*fnns).value,
        partition.least_error(*fnns, 1, X).value,
    ]
    assert {tuple(value.shape) for value in scalars} == {batch}
    assert bounds.colliding_inputs(fnns[0], X).shape == (*batch, WIDTH, 5)
    assert Gap(*linears).flat().batch_shape == (0,)
    assert minimize(*linears, 1, starts=2).shape == (*batch, 2)


def test_matrices(batch: tuple[int, ...]) -> None:
    matrix = lowrank.random_matrix(3, 4, condition_number=2.0, batch_shape=batch)
    assert lowrank.spectrum(matrix).shape == (*batch, 3)
    assert lowrank.rank(matrix).shape == lowrank.condition_number(matrix).shape == batch
    assert lowrank.truncated_svd(matrix, 2).matrix().shape == (*batch, 3, 4)
    assert lowrank.solve(matrix, torch.ones(3, 2).double()).shape == (*batch, 4, 2)


def test_regions(batch: tuple[int, ...]) -> None:
    regions: list[Region] = [
        Ball(torch.ones(batch), torch.zeros(WIDTH)),
        Box(torch.zeros(*batch, WIDTH), torch.ones(WIDTH)),
        Samples(torch.ones(*batch, WIDTH, 4)),
    ]
    for region in regions:
        assert region.sample(6).shape == (*batch, WIDTH, 6)
        assert region.largest_norm().shape == batch


@pytest.mark.parametrize("kind", KINDS[:3])
def test_nothing_cannot_be_trained(batch: tuple[int, ...], kind: str) -> None:
    frozen, _ = pair(kind, batch)
    shape = (WIDTH, 2) if kind == "transformer" else (WIDTH,)
    data = Fresh(lambda x: x, shape, samples=4)
    with pytest.raises(InputError, match="frozen must be at least one network; got batch shape"):
        train(frozen, [Tuning(1)], data, steps=1)


def test_minimizing_over_no_factors_is_the_gap(batch: tuple[int, ...]) -> None:
    frozen, target = (LinearNetwork.random(2, WIDTH, seed=seed) for seed in (0, 1))
    errors = minimize(frozen, target, 0, starts=2)
    expected = (target.product() - frozen.product()).square().sum().sqrt()
    torch.testing.assert_close(errors, expected.expand(2))
    assert len(batch) > 0
