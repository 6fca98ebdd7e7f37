"""Low-rank matrices against numpy and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, normal, random_matrix, seeds

from lorapower import lowrank

sides = st.integers(1, 12)


@given(sides, sides, batch_shapes, dtypes, seeds, st.data())
def test_truncated_svd_is_the_best_approximation(
    rows: int, cols: int, batch: tuple[int, ...], dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(rows, cols)))
    matrix = normal(*batch, rows, cols, seed=seed).to(dtype)
    approximation = lowrank.truncated_svd(matrix, rank)
    assert approximation.rank == rank
    assert approximation.parameter_count == (rows + cols) * rank
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    left_out = np.concatenate([sigma[..., rank:], np.zeros((*batch, 1))], -1)
    difference = (matrix - approximation.matrix()).double().numpy()
    tolerance = 20 * torch.finfo(dtype).eps * max(rows, cols) * sigma.max()
    for kind, expected in ((2, left_out.max(-1)), ("fro", np.sqrt((left_out**2).sum(-1)))):
        norm = np.linalg.norm(difference, kind, (-2, -1))  # type: ignore[arg-type]
        np.testing.assert_allclose(norm, expected, rtol=0, atol=tolerance)


@given(st.integers(1, 10), st.data(), seeds)
def test_rank_counts_the_terms_of_a_sum(width: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(0, width))
    factors = normal(2, width, rank, seed=seed)
    matrix = factors[0] @ factors[1].mT
    assert lowrank.rank(matrix) == np.linalg.matrix_rank(matrix.numpy()) == rank


def test_rank_of_a_difference_ignores_the_rounding_of_its_terms() -> None:
    matrix = normal(8, 8)
    noise = (matrix * 3) / 3 - matrix
    assert noise.any()
    assert lowrank.rank(noise) > 0
    assert lowrank.rank(noise, scale=lowrank.spectrum(matrix)[0]) == 0


@given(sides, sides, st.floats(1, 1e8), seeds)
def test_the_condition_number_is_that_of_the_singular_values(
    rows: int, cols: int, kappa: float, seed: int
) -> None:
    matrix = random_matrix(rows, cols, condition_number=kappa, seed=seed)
    expected = kappa if min(rows, cols) > 1 else 1
    assert lowrank.condition_number(matrix) == pytest.approx(expected, rel=1e-6)
    assert lowrank.spectrum(matrix)[0] == pytest.approx(1)


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0]))])
def test_singular_matrices_have_an_infinite_condition_number(matrix: torch.Tensor) -> None:
    assert lowrank.condition_number(matrix) == torch.inf


@given(sides, sides, batch_shapes, seeds)
def test_solve_gives_the_smallest_solution(
    rows: int, more: int, batch: tuple[int, ...], seed: int
) -> None:
    matrix = random_matrix(rows, rows + more - 1, condition_number=10, batch_shape=batch, seed=seed)
    right = normal(*batch, rows, 2, seed=seed)
    expected = np.linalg.pinv(matrix.numpy()) @ right.numpy()
    np.testing.assert_allclose(lowrank.solve(matrix, right).numpy(), expected, atol=1e-11)


def test_rounding_of_the_longer_side_counts_as_zero() -> None:
    wide = torch.zeros(2, 100, dtype=torch.float64)
    wide[0, 0], wide[1, 1] = 1.0, 20 * torch.finfo(wide.dtype).eps
    assert lowrank.rank(wide) == 1
    wide[1, 1] *= 10
    assert lowrank.rank(wide) == 2
