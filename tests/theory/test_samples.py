"""Risks of least squares of a given rank, and of shrunk directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal
from torch import Tensor

from lorapower import InputError, lowrank
from lorapower.bounds import samples
from lorapower.networks import LinearNetwork
from lorapower.regression import reduced_rank

# --- Risks ----------------------------------------------------------------------------------------


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


def test_risks_are_those_of_reduced_rank_regression() -> None:
    """The closed form in the rows of ``X`` is least squares over all matrices of the rank."""
    E, x, rank = normal(5, 6), normal(6, 4, seed=1), 2
    y = E @ x + 0.3 * normal(5, 4, seed=2)
    K = reduced_rank(y, x, rank, intercept=False).update.matrix()
    rows = lowrank.svd(x).V[:, :4]
    best = lowrank.truncated_svd(y @ rows, rank).matrix() @ rows.mT
    torch.testing.assert_close(K @ x, best, rtol=1e-8, atol=1e-8)


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


def test_without_noise_all_ranks_pay_but_for_rounding() -> None:
    frozen, x = LinearNetwork.random(1, 8), normal(8, 60)
    found = samples.fit(frozen, x, normal(8, 8, seed=1) @ x, noise=0.0)
    assert found.rank == 8
    assert (found.risks.diff() < 0).all()
    change = normal(8, 3, seed=1) @ normal(3, 8, seed=2)
    assert samples.fit(frozen, x, (frozen.product() + change) @ x, noise=0.0).rank == 3


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
        ("inputs", frozen, 0 * x, x),
        ("outputs", frozen, x, x[:, 1:]),
        ("outputs", frozen, x, 1e200 * x),
    ):
        with pytest.raises(InputError, match=f"^{name}"):
            samples.fit(network, inputs, outputs)
    with pytest.raises(InputError, match=r"^spectrum"):
        samples.Design(9, 2, 3, 1.0).sure(torch.ones(3))
    for noise in (-1.0, torch.inf, 1e200):
        with pytest.raises(InputError, match=r"^noise"):
            samples.Design(9, 2, 3, noise)


# --- Shrinking ------------------------------------------------------------------------------------


def shrunk_matrix(M: Tensor, limit: float, exponent: float) -> Tensor:
    U, S, V = lowrank.svd(M)
    kept = S * (1 - (limit / S) ** exponent).clamp(min=0)
    return (U * kept[..., None, :]) @ V.mT


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 2),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_shrunk_risk_has_the_divergence_of_shrinking(
    out: int, span: int, part: float, exponent: int, equal: bool, seed: int
) -> None:
    """The trace of the derivative, by differences; also where singular values agree."""
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


def test_shrinking_without_noise_is_least_squares_and_with_much_nothing() -> None:
    frozen, x, change = LinearNetwork.random(1, 8), normal(8, 60), normal(8, 8, seed=1)
    y = (frozen.product() + change) @ x
    found = samples.fit(frozen, x, y, noise=0.0)
    torch.testing.assert_close(found.update.matrix(), change)
    assert found.risk == pytest.approx(0, abs=1e-9)
    assert samples.fit(frozen, x, y, noise=1e4).update.rank == 0
