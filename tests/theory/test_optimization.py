"""Losses, training in the fused network, descent and flows: each against another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from lorapower import InputError, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork, Partition, Transformer
from lorapower.training import (
    Fixed,
    Fresh,
    Tuning,
    descend,
    train,
    train_fused,
)
from lorapower.training._task import Task
from lorapower.training.dynamics import course


def relu(depth: int, width: int, seed: int = 0, batch: tuple[int, ...] = ()) -> FNN:
    return FNN.random(depth, width, seed=seed, batch_shape=batch)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return randomness.normal(randomness.generator(seed, "test"), *shape)


def fixed(target: Any, x: Tensor) -> Fixed:
    return Fixed((x, target(x)), (x, target(x)))


def drawn(network: Any, rank: int, size: float = 0.5) -> Adapters:
    """Adapters of which no factor and no bias is 0."""
    each = iter(range(1000))
    updates = tuple(
        LowRank(*(size * normal(side, rank, seed=next(each)) for side in w.shape[-2:]))
        for w in network.weights
    )
    return Adapters(updates, tuple(size * normal(len(b), seed=next(each)) for b in network.biases))


# --- The one-sided loss ---------------------------------------------------------------------------


def by_hand(p: Tensor, y: Tensor) -> Tensor:
    """The definition, case by case."""
    loss = torch.where(y > 0, (p - y).square(), p.clamp(min=0).square())
    return loss.mean()


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 5)), min_size=1, max_size=20))
def test_it_is_at_least_the_squared_error_and_vanishes_with_it(cells: list[Any]) -> None:
    p, y = torch.tensor(cells, dtype=torch.float64).unbind(-1)
    # A layer that returns its input.
    frozen = FNN([[[1.0]]], [[0.0]]).to(torch.float64)

    def losses(p: Tensor) -> Tensor:
        """One-sided and squared, as training computes them."""
        data = Fixed((p[None], y[None]), (p[None], y[None]))
        W, b = torch.ones(1, 2, 1, 1).double(), torch.zeros(1, 2, 1).double()
        task = Task(frozen, data, [], torch.tensor([True, False]))
        task.bind(W, b, torch.zeros_like(W), torch.zeros_like(b))
        return task.slopes((p[None], y[None]), 0)

    one_sided, squared = losses(p)
    torch.testing.assert_close(one_sided, by_hand(p, y))
    assert one_sided >= squared
    assert (losses(torch.where(y > 0, y, -y.new_ones(()))) == 0).all()


def test_dead_outputs_come_back_by_the_one_sided_loss_alone() -> None:
    frozen, target = relu(1, 4), relu(1, 4, seed=1)
    low = frozen.with_parameters(frozen.weights, [frozen.biases[0] - 5])
    data = Fresh(target, (4,), samples=64)
    squared = Tuning(4, learning_rate=0.02, schedule="cosine")
    runs = train(low, [squared, replace(squared, loss="one-sided")], data, steps=1500)
    assert runs.best_loss[0] == runs.validation_loss[0, 0]
    assert runs.best_loss[1] < 0.1 * runs.validation_loss[1, 0]


# --- Without detours ------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=3)
def test_one_layer_is_found_from_data_alone(width: int, depth: int, seed: int) -> None:
    """Convex in one matrix: no start, no luck, but slow where an output is rarely above 0."""
    frozen, target = relu(depth, width, seed), relu(1, width, seed + 1)
    x = normal(width, 2000, seed=seed)
    assume((target(x) > 0).double().mean(-1).min() > 0.02)
    data = Fresh(target, (width,), samples=128, seed=seed)
    found = train_fused(frozen, width, data, starts=1, learning_rates=(3e-2,), steps=10_000)
    inside = torch.linalg.vector_norm(x, dim=0) < 1.5 * 2
    error = (found.adapters.merge(frozen)(x) - target(x)).square()[:, inside].mean()
    assert error < 1e-9
    assert found.validation_loss.shape == (1, 1)


@pytest.mark.parametrize("kind", ["linear", "fnn, linear last"])
def test_other_kinds_of_networks_are_fused_too(kind: str) -> None:
    frozen: Any
    target: Any
    options: dict[str, Any] = {"steps": 2000, "starts": 2, "learning_rates": (1e-2, 3e-2)}
    if kind == "linear":
        frozen, target = LinearNetwork.random(2, 4), LinearNetwork.random(1, 4, seed=1)
    else:
        frozen, target = (FNN.random(d, 4, linear_last=True, seed=d) for d in (2, 1))
    data = Fresh(target, (4,))
    found = train_fused(frozen, 2, data, **options)
    x, y = (part.double() for part in data.test(500))
    error = (found.adapters.merge(frozen)(x) - y).square().mean()
    # Single precision, and for ReLU networks the inputs outside of the region.
    assert error < 1e-9 * y.var()
    assert found.validation_loss.shape == (2, 2)
    assert float(found.validation_loss[found.chosen]) == float(found.validation_loss.min())
    assert max(found.adapters.ranks) <= 2


def test_fused_training_draws_other_factors_than_training() -> None:
    frozen = LinearNetwork.random(2, 4)
    data = Fresh(LinearNetwork.random(1, 4, seed=1), (4,))
    found = train_fused(frozen, 2, data, starts=3, steps=5, every=1)
    tuning = Tuning(4, learning_rate=1e-2, schedule="cosine")
    drawn = [train(found.fused.network, [tuning], data, steps=5, seed=s) for s in range(9)]
    losses = [float(run.validation_loss[0, -1]) for run in drawn]
    assert not set(losses) & set(found.training.validation_loss[0, :, -1].tolist())


def test_the_region_holds_the_inputs_that_were_trained_on() -> None:
    frozen, target = relu(2, 4), relu(1, 4, seed=1)
    x, near = 20 * normal(4, 60), normal(4, 60, seed=1)
    data = Fixed((x, target(x)), (near, target(near)))
    found = train_fused(frozen, 2, data, steps=50, starts=1)
    trained = found.training.network[found.chosen].to(torch.float64)
    torch.testing.assert_close(found.adapters.merge(frozen)(x), trained(x), rtol=1e-6, atol=1e-5)


# --- Gradient flow --------------------------------------------------------------------------------


def integrate(E: Tensor, B: Tensor, times: Any, rates: Any) -> LowRank:
    """The factors of one layer on their way from ``A = 0``, by Runge–Kutta."""
    sizes, first = (E.shape[0] * B.shape[1], B.numel()), E.new_zeros(E.shape[0], B.shape[1])

    def factors(flat: Any) -> tuple[Tensor, Tensor]:
        A, B_now = torch.from_numpy(flat.copy()).split(sizes)
        return A.reshape(first.shape), B_now.reshape(B.shape)

    def velocity(_: float, flat: Any) -> Any:
        A, B_now = factors(flat)
        G = E - A @ B_now.mT
        return torch.cat([(rates[0] * G @ B_now).flatten(), (rates[1] * G.mT @ A).flatten()])

    options: dict[str, Any] = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-15}
    start = torch.cat([first.flatten(), B.flatten()]).numpy()
    run = solve_ivp(velocity, (0, times[-1]), start, t_eval=times, **options)
    left, right = zip(*(factors(flat) for flat in run.y.T), strict=True)
    return LowRank(torch.stack(left), torch.stack(right))


def aligned(size: tuple[int, int, int], beta: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An error of distinct singular values, and orthogonal columns of length ``beta``."""
    out, into, rank = size
    E = normal(out, into, seed=seed)
    return E, beta * torch.linalg.qr(normal(into, rank, seed=seed + 1))[0]


def best(E: Tensor, rank: int) -> Tensor:
    """The best product of that rank, from the singular values."""
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def rate_of(E: Tensor, rank: int, beta: float, rates: tuple[float, float]) -> float:
    """Half of ``μ_R − μ_{R+1}``; where no direction is left over, ``μ_R``."""
    S, into = torch.linalg.svdvals(E), E.shape[1]
    S, size = torch.cat([S, S.new_zeros(into)])[:into], min(rank, len(S))
    mu = torch.sqrt(4 * rates[0] * rates[1] * S.square() + rates[0] ** 2 * beta**4)
    return float(mu[size - 1] - (mu[size] if rank < into else -mu[size - 1])) / 2


@pytest.mark.parametrize("rates", [(1.0, 1.0), (2.0, 0.3)])
@pytest.mark.parametrize(
    ("size", "beta"),
    [((3, 3, 1), 1.0), ((4, 3, 2), 0.3), ((3, 5, 2), 2.0), ((2, 5, 4), 1.0), ((6, 2, 2), 1e-3)],
)
def test_the_closed_course_is_that_of_an_integration(size: Any, beta: float, rates: Any) -> None:
    """``A Bᵀ``, ``A Aᵀ`` and ``B Bᵀ``, from columns that are not aligned; the end's rate."""
    E, B = aligned(size, beta)
    times = np.linspace(0, 8, 9)
    by = integrate(E, B, times, rates)
    found = course(E, B, torch.from_numpy(times), rates=rates)
    for left, right, expected in (
        (found.left, found.right, by.left @ by.right.mT),
        (found.left, found.left, by.left @ by.left.mT),
        (found.right, found.right, by.right @ by.right.mT),
    ):
        np.testing.assert_allclose(left @ right.mT, expected, rtol=0, atol=1e-10)
    grid = torch.arange(1, 201, dtype=E.dtype) / rate_of(E, size[2], beta, rates)
    missing = (course(E, B, grid, rates=rates).matrix() - best(E, size[2])).norm(dim=(1, 2))
    late = int((missing < 1e-8).nonzero()[0])
    # Other modes, a little faster, may still be larger.
    assert 0.99 < float(torch.log(missing[late - 3] / missing[late])) / 3 < 1.25


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_limit_is_the_best_product_whatever_the_sizes(
    out: int, into: int, rank: int, seed: int
) -> None:
    rank, rates = min(rank, into), (1.0, 0.5)
    E, B = aligned((out, into, rank), 0.8, seed=seed)
    late = torch.tensor([1e4], dtype=E.dtype) / rate_of(E, rank, 0.8, rates)
    torch.testing.assert_close(course(E, B, late, rates=rates).matrix()[0], best(E, rank))


def test_an_initialization_that_misses_a_direction_never_learns_it() -> None:
    """The other half of "if and only if": the limit is what the rows of ``VᵀB₀`` say, greedily."""
    S = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    U, V = (torch.linalg.qr(normal(4, 4, seed=s))[0] for s in (0, 1))
    E, h = (U * S) @ V.mT, 0.5**0.5
    rows = torch.tensor([[0, 0], [1, 0], [0, h], [0, h]], dtype=torch.float64)
    both = torch.tensor([[h, 0], [h, 0], [0, h], [0, -h]], dtype=torch.float64)
    for coordinates, kept in ((rows, [1, 2]), (both, [0, 2])):
        B = V @ coordinates
        product = (U[:, kept] * S[kept]) @ V[:, kept].mT
        # Not longer: rounding of what is missed grows like all else.
        times = np.array([0.0, 4.0])
        by = integrate(E, B, times, (1.0, 1.0)).matrix()
        far = course(E, B, torch.tensor([4.0, 1000.0], dtype=torch.float64)).matrix()
        np.testing.assert_allclose(far[0], by[1], rtol=0, atol=1e-9)
        torch.testing.assert_close(far[1], product, rtol=0, atol=1e-12)
    # What is missed by a little is learned late.
    B = V @ torch.linalg.qr(both + 1e-5 * normal(4, 2))[0]
    late = torch.tensor([1000.0], dtype=torch.float64)
    torch.testing.assert_close(course(E, B, late).matrix()[0], best(E, 2))


@pytest.mark.parametrize("rates", [(1.0, 1.0), (1e-3, 10.0)])
@pytest.mark.parametrize("beta", [1e-80, 1e-7, 1.0, 1e4])
def test_an_aligned_direction_is_learned_as_the_proposition_says(
    beta: float, rates: tuple[float, float]
) -> None:
    """Against its formula in 400 digits, to rounding of the direction's strength."""
    mp = pytest.importorskip("mpmath").mp
    sigmas, times = (1e-3, 1.0, 50.0), (1e-9, 1.0, 40.0, 1e3)
    with mp.workdps(400):
        eta_A, eta_B = (mp.mpf(rate) for rate in rates)
        for sigma in sigmas:
            both, push = 2 * sigma * mp.sqrt(eta_A * eta_B), eta_A * mp.mpf(beta) ** 2
            speed = mp.sqrt(both**2 + push**2)
            last = (speed - push) / both
            grown = [mp.exp(speed * time) for time in times]
            rho = [last * (g - 1) / (g + last**2) for g in grown]
            wanted = [mp.sqrt(eta_A / eta_B) * mp.mpf(beta) ** 2 * r / (1 - r**2) for r in rho]
            one = torch.ones(1, 1, dtype=torch.float64)
            at = torch.tensor(times, dtype=torch.float64)
            found = course(sigma * one, beta * one, at, rates=rates).matrix()
            error = np.abs(found.flatten().numpy() - [float(p) for p in wanted])
            assert error.max() <= 1e-12 * sigma


# --- Bad input ------------------------------------------------------------------------------------

FROZEN, CHAIN, LINEAR_END = (
    relu(2, 4),
    LinearNetwork.random(2, 4),
    FNN.random(2, 4, linear_last=True),
)
NARROW = LinearNetwork([normal(2, 4), normal(4, 2)])
Z = normal(4, 6)
DATA, NEGATIVE = Fresh(FROZEN, (4,)), Fixed((Z, -Z.abs()), (Z, Z.abs()))
ONE_SIDED = Tuning(1, loss="one-sided")


# The name in the error, and calls that are refused.
BAD: list[tuple[str, Callable[[], Any]]] = [
    ("loss", lambda: train(CHAIN, [ONE_SIDED], Fresh(CHAIN, (4,)))),
    ("loss", lambda: train(LINEAR_END, [ONE_SIDED], DATA)),
    ("loss", lambda: train(Transformer.random(1, 4, 1), [ONE_SIDED], DATA)),
    ("loss", lambda: train(FROZEN, [ONE_SIDED], DATA, classes=range(4))),
    ("data's labels", lambda: train(FROZEN, [ONE_SIDED], NEGATIVE)),
    ("loss", lambda: Tuning(1, loss="absolute")),  # type: ignore[arg-type]
    ("network", lambda: descend(relu(2, 3), drawn(FROZEN, 1), (Z, Z), (Z, Z))),
    ("training", lambda: descend(FROZEN, drawn(FROZEN, 1), (Z, Z[:2]), (Z, Z))),
    ("adapters", lambda: descend(relu(2, 4, batch=(2,)), drawn(FROZEN, 1), (Z, Z), (Z, Z))),
    ("ranks", lambda: train_fused(NARROW, 2, Fresh(NARROW, (4,)))),
    ("partition", lambda: train_fused(CHAIN, 2, Fresh(CHAIN, (4,)), partition=Partition([2]))),
    ("right", lambda: course(torch.eye(2), torch.ones(2, 2), torch.ones(1))),
    ("right", lambda: course(torch.eye(2), torch.ones(3, 1), torch.ones(1))),
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_bad_input_is_refused(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=f"^{name} must be"):
        call()
