"""A batch equals its members: of all functions that broadcast, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import PRENORM, benign, conditioned, moderate, normal, plain_splitting, seeds
from torch import Tensor

from lorapower import bounds, lowrank, regions
from lorapower.adapters import Adapters
from lorapower.bounds import samples
from lorapower.constructions import adapt_linear, adapt_relu, adapt_transformer
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, Decoder, Gap, LinearNetwork, Network, Transformer, blocks
from lorapower.regression import reduced_rank, second_moment_root, truncate

# An argument is made from its batch shape and a seed.
Maker = Callable[[tuple[int, ...], int], Any]
SHAPES: list[tuple[int, ...]] = [(), (3,), (2, 1), (2, 3)]


def matrix(rows: int, cols: int) -> Maker:
    return lambda batch, seed: normal(*batch, rows, cols, seed=seed)


def deep(depth: int) -> Maker:
    return lambda batch, seed: conditioned(depth, 4, batch_shape=batch, seed=seed)


def relu(depth: int) -> Maker:
    return lambda batch, seed: benign(depth, 4, batch, seed)


def heads(batch: tuple[int, ...], seed: int) -> Transformer:
    return moderate(2, 4, 2, batch, seed)


def normed(batch: tuple[int, ...], seed: int) -> Decoder:
    return Decoder.random(1, 4, 2, batch_shape=batch, seed=seed, purpose=f"{seed}", **PRENORM)


def adapters_of(left: Tensor, right: Tensor, bias: Tensor) -> Adapters:
    return Adapters((LowRank(left, right),), (bias[..., 0],))


def of_region(kind: str, points: Tensor, size: Tensor, M: Tensor) -> list[Tensor]:
    low, high = points.amin(-1), points.amax(-1)
    held: regions.Region = regions.Samples(points, 0.3)
    if kind != "samples":
        held = regions.Box(low, high) if kind == "box" else regions.Ball(size[..., 0, 0].abs(), low)
    image, positive = held.image(M, M @ held.centre), held.relu()
    ends = [each.lowest(torch.eye(each.width).double()) for each in (image, positive)]
    return [held.lowest(M), held.typical(1.0), image.centre, positive.centre, *ends]


def of_gap(frozen: LinearNetwork, target: LinearNetwork) -> list[Tensor]:
    gap = Gap(frozen, target)
    matrices = [gap.matrix, gap.best(2).matrix(), gap.undone(1), gap.reached(2)]
    return [*matrices, gap.error(1), gap.error(1, "fro"), gap.rank, gap.threshold, gap.noise]


def of_svd(M: Tensor) -> list[Tensor]:
    U, S, V = lowrank.svd(M)
    return [S, U * S[..., None, :] @ V.mT, lowrank.norm(M), lowrank.condition_number(M)]


def of_linear(network: LinearNetwork, x: Tensor) -> list[Tensor]:
    return [network(x), network.product(), network.norm, network.rounding_scale, *network.halves()]


def of_relu(network: FNN, x: Tensor) -> list[Tensor]:
    inner = network.preactivations(x)
    parts = network.linearize([slice(0, 2), slice(2, 3)]), network.layers(slice(1, 3))
    return [network(x), *inner, *(part(x) for part in parts)]


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pin the splitting; of two that are equally good, the last bits would choose one."""

    def run(*arguments: Any) -> Any:
        with plain_splitting():
            return function(*arguments)

    return run


def of_transformer(frozen: Transformer, target: Transformer) -> list[Tensor]:
    found = adapt_transformer(frozen, target, 2, throw=False)
    return [found.success, found.adapters.merge(frozen)(X[:, :3])]


def of_fnn(frozen: FNN, target: FNN, radius: Tensor) -> list[Tensor]:
    ball = regions.Ball(1 + radius[..., 0, 0].abs())
    found = adapt_relu(frozen, target, 2, ball, throw=False)
    evidence = [found.success, found.block_errors, found.digits_lost]
    return [*evidence, found.adapters.merge(frozen)(X)]


def least_rank(frozen: Transformer, target: Transformer) -> Tensor:
    return bounds.transformer_ranks(frozen, target).largest()


def of_linear_adapt(frozen: LinearNetwork, target: LinearNetwork) -> list[Tensor]:
    found = adapt_linear(frozen, target, 1, throw=False)
    evidence = [found.success, found.spectral_error, found.frobenius_error]
    return [*evidence, found.adapters.merge(frozen).product()]


X = normal(4, 200)
M, N, POINTS, ONE = matrix(4, 3), matrix(5, 4), matrix(3, 6), matrix(1, 1)
INPUTS, TOKENS = matrix(4, 8), matrix(4, 3)
DESIGN = samples.Design(50, 4, 6, 3.0)

CASES: dict[str, tuple[Callable[..., Any], Sequence[Maker]]] = {
    "svd": (of_svd, [M]),
    "truncated_svd": (lambda A: lowrank.truncated_svd(A, 2).matrix(), [M]),
    "rank": (lambda A, B: lowrank.rank(A @ B), [matrix(4, 2), matrix(2, 5)]),
    "solve": (lowrank.solve, [matrix(3, 5), matrix(3, 2)]),
    "LowRank": (lambda A, B: LowRank(A, B).balanced().matrix(), [M, matrix(5, 3)]),
    "second_moment_root": (partial(second_moment_root, ridge=0.1), [matrix(3, 9)]),
    "truncate": (
        lambda A, Z, R: truncate(A, 2, inputs=Z, metric=R).matrix(),
        [M, matrix(3, 7), N],
    ),
    "reduced_rank": (
        lambda y, z, E, R: (
            (found := reduced_rank(y, z, 2, towards=E, shrinkage=0.1, metric=R)).update.matrix(),
            found.intercept,
        ),
        [INPUTS, matrix(3, 8), M, N],
    ),
    **{
        f"regions, {kind}": (partial(of_region, kind), [POINTS, ONE, M])
        for kind in ("ball", "box", "samples")
    },
    "LinearNetwork": (of_linear, [deep(3), INPUTS]),
    "FNN": (of_relu, [relu(3), INPUTS]),
    "Transformer": (lambda network, z: network(z), [heads, TOKENS]),
    "Decoder": (lambda network, z: network(z), [normed, TOKENS]),
    "merge": (
        lambda network, *parts: adapters_of(*parts).merge(network)(X),
        [relu(1), matrix(4, 2), matrix(4, 2), matrix(4, 1)],
    ),
    "Gap": (of_gap, [deep(2), deep(1)]),
    "blocks": (lambda *pair: [gap.matrix for gap in blocks(*pair)], [relu(3), relu(2)]),
    "fnn_threshold": (bounds.fnn_threshold, [relu(3), relu(2)]),
    "fnn_error": (lambda f, t, x: bounds.fnn_error(f, t, 1, x), [relu(3), relu(2), INPUTS]),
    "fnn_error_on": (lambda f, t, x: bounds.fnn_error_on(f, t, 1, x), [relu(3), relu(2), INPUTS]),
    "transformer_ranks": (least_rank, [heads, heads]),
    "transformer_ranks, norms": (least_rank, [normed, normed]),
    "attention_floor": (lambda f, t: bounds.attention_floor(f, t, X, 1).value, [normed] * 2),
    "sure": (lambda A: DESIGN.sure(lowrank.spectrum(A)), [matrix(4, 6)]),
    "shrink_values": (lambda A: DESIGN.shrink_values(lowrank.spectrum(A)), [matrix(4, 6)]),
    "adapt_linear": (of_linear_adapt, [deep(2), deep(1)]),
    "adapt_relu": (plainly(of_fnn), [relu(3), relu(2), ONE]),
    "adapt_transformer": (plainly(of_transformer), [heads, heads]),
    "adapt_transformer, norms": (plainly(of_transformer), [normed, normed]),
}


# This goes through members one by one, and needs one.
BY_MEMBER = {"attention_floor"}


def batch_of(value: Any) -> tuple[int, ...]:
    return tuple(value.batch_shape if isinstance(value, Network) else value.shape[:-2])


def member(value: Any, batch: tuple[int, ...], index: tuple[int, ...]) -> Any:
    """Pick a member, counted in the common batch, of a value whose ``batch`` broadcasts to it."""
    last = index[len(index) - len(batch) :]
    return value[tuple(0 if size == 1 else i for size, i in zip(batch, last, strict=True))]


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [*value]


@pytest.mark.parametrize("name", CASES)
@given(st.data(), seeds)
def test_a_batch_equals_its_members(name: str, data: st.DataObject, seed: int) -> None:
    function, makers = CASES[name]
    shapes = st.sampled_from(SHAPES)
    arguments = [make(data.draw(shapes), seed + k) for k, make in enumerate(makers)]
    batches = [batch_of(value) for value in arguments]
    index = tuple(data.draw(st.integers(0, n - 1)) for n in torch.broadcast_shapes(*batches))
    together = results(function(*arguments))
    members = [member(*pair, index) for pair in zip(arguments, batches, strict=True)]
    for ours, own in zip(together, results(function(*members)), strict=True):
        ours = member(ours, tuple(ours.shape[: ours.ndim - own.ndim]), index)
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", sorted(CASES.keys() - BY_MEMBER))
@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)
def test_a_batch_without_members_has_an_empty_result(name: str, batch: tuple[int, ...]) -> None:
    function, makers = CASES[name]
    for found in results(function(*(make(batch, k) for k, make in enumerate(makers)))):
        assert tuple(found.shape[: len(batch)]) == batch
