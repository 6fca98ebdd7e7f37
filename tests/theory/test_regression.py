"""Least squares of a given rank, against brute force and against Eckart and Young."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

from lorapower import lowrank, randomness
from lorapower.regression import reduced_rank, second_moment_root, truncate


def drawn(seed: int, out: int, into: int, samples: int) -> tuple[Tensor, ...]:
    """Inputs of uneven spread about a mean, outputs, a metric and a matrix to shrink to."""
    generator = randomness.generator(seed, "regression in tests")

    def normal(*shape: int) -> Tensor:
        return randomness.normal(generator, *shape)

    z = 1 + normal(into, into) ** 3 @ normal(into, samples)
    return z, normal(out, samples) + normal(out, into) @ z, normal(out + 1, out), normal(out, into)


def left(K: Tensor, y: Tensor, z: Tensor, R: Tensor, penalty: float, E: Tensor) -> float:
    """The sum that is minimized, after the best intercept."""
    missed = y - K @ z
    missed = missed - missed.mean(-1, keepdim=True)
    return float((R @ missed).square().mean(-1).sum() + penalty * (R @ (K - E)).square().sum())


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 6))


@given(sizes, st.sampled_from([0.0, 0.01, 1.0]), seeds)
def test_no_matrix_of_the_rank_does_better(
    sizes: tuple[int, ...], shrinkage: float, seed: int
) -> None:
    out, into, samples, rank = sizes
    rank = min(rank, out, into)
    z, y, R, E = drawn(seed, out, into, samples)
    found = reduced_rank(y, z, rank, towards=E, shrinkage=shrinkage, metric=R)
    K = found.update.matrix()
    penalty = shrinkage * float((z - z.mean(-1, keepdim=True)).square().mean())
    reached = left(K, y, z, R, penalty, E)
    scale = left(torch.zeros_like(K), y, z, R, penalty, E) + 1e-30
    assert int((lowrank.spectrum(K) > 1e-9 * (1 + K.norm())).sum()) <= rank
    # Local search from the solution and from other starts finds nothing below it.
    generator = randomness.generator(seed, "rivals in tests")
    for size in (1e-4, 1e-2, 1.0):
        A, B = (found.update.left, found.update.right)
        A, B = (f + size * randomness.normal(generator, *f.shape) for f in (A, B))
        assert left(A @ B.mT, y, z, R, penalty, E) >= reached - 1e-9 * scale
    missed = (y - K @ z).mean(-1) - found.intercept
    assert float(missed.abs().max()) <= 1e-9 * (1 + float(y.abs().max()))


@pytest.mark.parametrize("samples", [3, 5, 60])
def test_what_data_leave_open_stays(samples: int) -> None:
    z, _, R, E = drawn(1, 4, 5, samples)
    z[2] = 7.0  # a constant coordinate
    found = reduced_rank(E @ z, z, 4, towards=E, metric=R).update.matrix()
    assert torch.allclose(found, E, atol=1e-10)
    small = reduced_rank(E @ z, z, 4, metric=R).update.matrix()
    centred = z - z.mean(1, keepdim=True)
    assert (small @ centred).allclose(E @ centred, rtol=1e-10, atol=1e-9)
    assert float(small.norm()) <= float(E.norm()) + 1e-9


@pytest.mark.parametrize("small", [1e-3, 1e-9, 1e-12])
def test_small_directions_count_by_what_they_explain(small: float) -> None:
    one, other = torch.linalg.qr(drawn(5, 2, 2, 60)[1].mT - 1).Q.mT * 60**0.5
    one, other = (part - part.mean() for part in (one, other))
    z, y = torch.stack([one, small * other]), torch.stack([5 * one, other])
    found = reduced_rank(y, z, 1)
    missed = y - found.update.matrix() @ z - found.intercept[:, None]
    assert float(missed.square().sum()) <= 1.01 * float(other.square().sum())


def test_inputs_that_do_not_vary_leave_what_is_shrunken_to() -> None:
    z, y, _, E = drawn(0, 3, 4, 9)
    found = reduced_rank(y, torch.ones_like(z), 2, towards=E, shrinkage=0.05)
    nearest = lowrank.truncated_svd(E, 2).matrix()
    assert torch.allclose(found.update.matrix(), nearest)
    assert torch.allclose(found.intercept, y.mean(1) - nearest.sum(1))


def test_infinite_shrinkage_is_the_limit() -> None:
    z, y, R, E = drawn(2, 4, 5, 50)
    limit = reduced_rank(y, z, 4, towards=E, shrinkage=torch.inf, metric=R).update.matrix()
    near = reduced_rank(y, z, 4, towards=E, shrinkage=1e12, metric=R).update.matrix()
    assert limit.allclose(E)
    assert near.allclose(E, atol=1e-8)


def test_without_intercept_the_mean_counts() -> None:
    z, _, _, E = drawn(3, 4, 5, 50)
    found = reduced_rank(E @ z, z, 1, intercept=False)
    least = lowrank.spectrum(E @ z)[1:].square().sum()
    assert float((E @ z - found.update.matrix() @ z).square().sum()) == pytest.approx(float(least))
    assert not found.intercept.any()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 6), seeds)
def test_truncation_is_nearest_in_both_metrics(
    out: int, into: int, samples: int, rank: int, seed: int
) -> None:
    rank = min(rank, out, into)
    Z, _, R, M = drawn(seed, out, into, samples)
    nearest = truncate(M, rank, inputs=Z, metric=R)
    singular = lowrank.spectrum(R @ M @ Z)
    # Eckart and Young: no matrix of the rank is nearer in the two metrics.
    left = (R @ (M - nearest.matrix()) @ Z).norm()
    assert left.allclose(singular[rank:].norm(), atol=1e-9 * float(1 + singular[0]))


def test_triangular_metrics_and_singular_ones() -> None:
    Z, _, R, M = drawn(6, 5, 7, 20)
    triangle = torch.linalg.qr(R).R
    whole = truncate(M, 2, inputs=Z, metric=R).matrix()
    assert truncate(M, 2, inputs=Z, metric=triangle).matrix().allclose(whole)
    triangle[-1] = 0
    nearest = truncate(M, 3, inputs=Z, metric=triangle)
    assert nearest.left.isfinite().all()
    missed = triangle @ (M - nearest.matrix()) @ Z
    assert missed.norm().allclose(lowrank.spectrum(triangle @ M @ Z)[3:].norm())


@pytest.mark.parametrize("ridge", [0.0, 1e-16, 0.1])
def test_a_root_is_a_root(ridge: float) -> None:
    _, y, _, _ = drawn(4, 3, 5, 50)
    R = second_moment_root(y, ridge)
    identity = torch.eye(3).double()
    assert R.equal(R.triu())
    assert (R.mT @ R).allclose(y @ y.mT / 50 + ridge * y.square().mean() * identity)
    assert second_moment_root(0 * y, ridge).equal(identity)
