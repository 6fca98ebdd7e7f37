"""Directions in two metrics, and ranks for a budget, against theory and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapower import randomness
from lorapower.checkpoints import metrics
from lorapower.checkpoints.metrics import Moments

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return randomness.normal(randomness.generator(seed, "drawn"), *shape)


def moments(seed: int, out: int, into: int, samples: int, gradients: int) -> Moments:
    return Moments(drawn(seed + 1, samples, into), drawn(seed + 3, gradients, out))


@given(SEEDS, SIZES, SIZES, st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_predicted_error_of_directions_is_the_error(
    seed: int, out: int, into: int, samples: int, gradients: int, rank: int
) -> None:
    E, about = drawn(seed, out, into), moments(seed, out, into, samples, gradients)
    R = about.root()
    assert R is not None
    nowhere = torch.eye(into, dtype=torch.float64), torch.eye(out, dtype=torch.float64)
    for given_moments, bias in ((None, False), (about, False), (about, True)):
        one = metrics.directions(E, given_moments, 9, bias=bias)
        Z, left = nowhere if given_moments is None else (about.columns(one.mean).mT, R)
        r = min(rank, len(one.values))
        K = one.update.leading(r).matrix()
        error = (left @ (E - K) @ Z.mT).square().sum()
        predicted = one.total - one.values[:r].square().sum()
        assert error == pytest.approx(float(predicted), abs=1e-9 * (1 + one.total))
        # No other matrix of this rank does better: the singular values say so.
        tail = torch.linalg.svdvals(left @ E @ Z.mT)[r:].square().sum()
        assert error == pytest.approx(float(tail), abs=1e-9 * (1 + one.total))
        assert torch.allclose(one.bias(r), (E - K) @ one.mean)


def test_what_no_output_depends_on_gets_no_rank() -> None:
    about = moments(0, 4, 3, 5, 5)._replace(outputs=torch.zeros(5, 4))
    one = metrics.directions(drawn(0, 4, 3), about, 3, bias=True)
    assert one.values.numel() == one.total == 0
    assert torch.allclose(one.bias(0), drawn(0, 4, 3) @ about.inputs.mean(0))
