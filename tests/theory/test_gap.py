"""A gap against numpy, what is a network, and members of a batch that fail alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, benign, conditioned, dtypes, moderate, normal, of_widths, seeds

from lorapower import InputError, SingularError, constructions
from lorapower.networks import FNN, Gap, LinearNetwork
from lorapower.regions import Ball

shapes = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3))


@given(shapes, batch_shapes, st.booleans(), dtypes, seeds, st.data())
def test_a_gap_is_what_numpy_finds(
    shape: tuple[int, ...], batch: tuple[int, ...], alike: bool, dtype: Any, seed: int, data: Any
) -> None:
    inputs, outputs, depth = shape
    other = batch if alike else ()
    width = max(inputs, outputs)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    sides = enumerate(pairwise(sizes), start=seed)
    frozen = [normal(*batch, b, a, seed=s).to(dtype) for s, (a, b) in sides]
    target = normal(*other, outputs, inputs, seed=seed + depth).to(dtype)
    gap = Gap(frozen, LinearNetwork([target]))
    P, terms = np.eye(inputs), np.eye(inputs)
    for weight in frozen:
        P = weight.double().numpy() @ P
        terms = np.abs(weight.double().numpy()) @ terms
    E = target.double().numpy() - P
    terms = terms + np.abs(target.double().numpy())
    rank = data.draw(st.integers(0, min(inputs, outputs) + 1))
    sigma = np.linalg.svd(E, compute_uv=False)
    tail = np.concatenate([sigma[..., rank:], np.zeros((*E.shape[:-2], 1))], -1)
    # Sums of products round by their terms; decompositions by a few units of the largest number.
    unit = 4 * depth * width * torch.finfo(dtype).eps * np.linalg.norm(terms, axis=(-2, -1)).max()
    undone = gap.undone(rank).double().numpy()
    for found, expected in (
        (gap.error(rank), tail.max(-1)),
        (gap.error(rank, "fro"), np.sqrt((tail**2).sum(-1))),
        (np.linalg.norm(undone, 2, (-2, -1)), tail.max(-1)),
        (gap.best(rank).matrix().double().numpy() + undone, E),
        (gap.reached(rank).double().numpy() + undone, target.double().numpy() + 0 * E),
    ):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=unit)
    assert gap.best(rank).rank == min(rank, inputs, outputs)
    unknown: Any = "nuc"
    with pytest.raises(InputError, match=r"^ord must be one of 2, 'fro'; got 'nuc'"):
        gap.error(rank, unknown)
    assert gap.batch_shape == gap.rank.shape == torch.Size(E.shape[:-2])


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(0, 7), seeds)
def test_the_threshold_is_the_first_rank_for_all_layers_that_is_enough(
    widths: list[int], rank: int, seed: int
) -> None:
    network = of_widths(widths, seed=seed)
    rank = min(rank, widths[0], widths[-1])
    change = normal(widths[-1], rank, seed=seed) @ normal(rank, widths[0], seed=seed + 1)
    frozen = LinearNetwork(network.weights)
    gap = Gap(frozen, [frozen.product() + change])
    assert gap.rank == rank
    sides = [min(pair) for pair in pairwise(widths)]
    narrow = any(width < max(widths[0], widths[-1]) for width in widths[1:-1])
    if rank and narrow:
        for ask in (lambda: gap.threshold, lambda: gap.ranks([1] * len(sides))):
            with pytest.raises(InputError, match=r"^hidden widths must be at least"):
                ask()
    else:
        enough = [r for r in range(8) if sum(min(r, side) for side in sides) >= rank]
        assert gap.threshold == enough[0]
    # By layer, those that are not cut off may have ranks.
    for l, side in enumerate(sides):
        ranks = [0] * len(sides)
        ranks[l] = side + 1
        before, after = widths[1 : l + 1], widths[l + 1 : -1]
        if all(w >= widths[0] for w in before) and all(w >= widths[-1] for w in after):
            assert gap.ranks(ranks)[l] == side
        elif rank:
            with pytest.raises(InputError, match=r"^hidden widths must be at least"):
                gap.ranks(ranks)
        else:
            assert gap.ranks(ranks) == [0] * len(sides)


def test_rounding_of_large_products_counts_as_nothing() -> None:
    frozen = conditioned(3, 6).map(lambda weight: 100 * weight)
    first, second, third = frozen.weights
    gap = Gap(frozen, [(third @ second) @ first])
    assert gap.matrix.any()
    assert gap.rank == 0


def test_a_product_that_overflows_is_refused() -> None:
    huge = LinearNetwork(torch.full((2, 2, 2), 1e200, dtype=torch.float64))
    gap = Gap(huge, LinearNetwork.random(1, 2))
    with pytest.raises(InputError, match="a product that overflows"):
        print(gap.rank)


@pytest.mark.parametrize("kind", ["linear", "fnn", "transformer"])
def test_a_batch_goes_on_without_its_bad_members(kind: str) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        "linear": (conditioned(2, 4, batch_shape=(4,)), LinearNetwork.random(1, 4)),
        "fnn": (benign(2, 4, (4,), 1), FNN.random(1, 4, seed=2)),
        "transformer": (moderate(2, 4, 2, (4,), 1), moderate(2, 4, 2, (), 2)),
    }
    frozen, target = pairs[kind]

    def scaled(*factors: float) -> Any:
        by = torch.tensor(factors, dtype=torch.float64)[:, None, None]
        return frozen.with_parameters([by * weight for weight in frozen.weights], frozen.biases)

    # Errors of a transformer's segments are relative to their factors.
    bad = 0.0 if kind == "transformer" else 1e120
    broken, region = scaled(1.0, 0.0, bad, 1.0), [Ball(4.0)] * (kind == "fnn")
    found: Any = constructions.adapt(broken, target, 2, *region, throw=False).evidence
    assert found.success.tolist() == [True, False, False, True]
    if kind == "linear":
        assert found.rounding_error[1] > 0.01
    # The batch can be merged, bad members and all.
    merged = found.adapters.merge(broken)
    x = normal(4, 6)
    x = x / torch.linalg.vector_norm(x, dim=0)
    assert ((merged(x) - target(x)).abs().amax((-2, -1))[[0, 3]] < 1e-9).all()
    with pytest.raises((InputError, SingularError), match="batch member 1"):
        constructions.adapt(scaled(1.0, 0.0, 1.0, 1.0), target, 2, *region)
    with pytest.raises(InputError, match=r"batch member .*2.* must be of finite products"):
        constructions.adapt(scaled(1.0, 0.0, 1e160, 1.0), target, 2, *region, throw=False)
