"""Random networks for the tests: sizes from hypothesis, weights from its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorapower import randomness
from lorapower.adapters import Adapters
from lorapower.constructions import linear
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, Decoder, LinearNetwork, Network, Transformer

PRENORM: dict[str, Any] = {"residual": True, "norm": "layer"}
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
batch_shapes = st.sampled_from([(), (1,), (3,), (2, 2)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers, which no network of the tests has."""
    return randomness.normal(randomness.generator(seed, "numbers of tests"), *shape)


@contextmanager
def plain_splitting() -> Iterator[None]:
    """Keep the splitting that is tried first, however it rounds."""
    with mock.patch.object(linear._Solution, "improve"):
        yield


def random_matrix(
    rows: int,
    cols: int,
    *,
    condition_number: float,
    batch_shape: tuple[int, ...] = (),
    seed: int = 0,
    purpose: str = "matrix",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw singular vectors; the singular values are log-spaced and at most 1."""
    generator = randomness.generator(seed, "conditioned", purpose)
    size = min(rows, cols)
    U, V = (
        torch.linalg.qr(randomness.normal(generator, *batch_shape, side, size))[0]
        for side in (rows, cols)
    )
    sigma = torch.logspace(0, -1, size, base=condition_number, dtype=torch.float64)
    return ((U * sigma) @ V.mT).to(dtype)


def conditioned(depth: int, width: int, *, kappa: float = 3.0, **options: Any) -> LinearNetwork:
    """A network whose layers all have the condition number `kappa`."""
    options["batch_shape"] = (*options.get("batch_shape", ()), depth)
    return LinearNetwork(random_matrix(width, width, condition_number=kappa, **options))


def of_widths(
    widths: Sequence[int], *, linear_last: bool = False, seed: int = 0, purpose: str = "network"
) -> FNN:
    """A network of layers of these sizes, each of condition number 3."""
    weights = [
        random_matrix(b, a, condition_number=3, seed=seed, purpose=f"{purpose} {l}")
        for l, (a, b) in enumerate(pairwise(widths))
    ]
    generator = randomness.generator(seed, "biases in tests", purpose)
    biases = [randomness.normal(generator, b) for b in widths[1:]]
    return FNN(weights, biases, linear_last=linear_last)


def benign(
    depth: int, width: int, batch: tuple[int, ...] = (), seed: int = 0, *, linear_last: bool = False
) -> FNN:
    """A ReLU network of layers of condition number 3."""
    weights = conditioned(depth, width, batch_shape=batch, seed=seed).weights
    biases = FNN.random(depth, width, batch_shape=batch, seed=seed).biases
    return FNN(weights, biases, linear_last=linear_last)


def moderate(depth: int, width: int, heads: int, batch: tuple[int, ...], seed: int) -> Transformer:
    """A transformer of well-conditioned matrices."""
    network = Transformer.random(depth, width, heads, batch_shape=batch, seed=seed)
    matrices: Any = {}
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2", "W_out"):
        options: Any = {"batch_shape": getattr(network, name).shape[:-2], "purpose": name}
        matrices[name] = random_matrix(width, width, condition_number=3, seed=seed, **options)
    return network.replace(**matrices)


def residual_pair(seed: int, *sizes: int, **options: Any) -> tuple[Decoder, Decoder]:
    """A frozen and a target decoder, with LayerNorms unless the options say otherwise."""
    frozen, target = (
        Decoder.random(*sizes, seed=seed, purpose=purpose, **PRENORM | options)
        for purpose in ("frozen", "target")
    )
    return frozen, target


def drawn_adapters(
    network: Network, ranks: Sequence[int], seed: int = 0, size: float = 1.0, biases: bool = False
) -> Adapters:
    """Adapters of which no factor, and no change of a bias if there are any, is 0."""
    draw = randomness.generator(seed, "adapters of tests")

    def drawn(*shape: int) -> Tensor:
        shape = (*network.batch_shape, *shape)
        return size * randomness.normal(draw, *shape, dtype=network.dtype)

    updates = tuple(
        LowRank(*(drawn(n, R) for n in w.shape[-2:]))
        for w, R in zip(network.weights, ranks, strict=True)
    )
    return Adapters(updates, tuple(drawn(b.shape[-1]) for b in network.biases) if biases else ())
