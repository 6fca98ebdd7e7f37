"""Training in the fused network, critical points, and gradient flow against its integration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from strategies import normal, random_matrix
from torch import Tensor
from torch.autograd.functional import hessian

from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork
from lorapower.networks.layers import product
from lorapower.training import Fixed, Fresh, Tuning, train, train_fused
from lorapower.training.dynamics import flow


def relu(depth: int, width: int, seed: int = 0, batch: tuple[int, ...] = ()) -> FNN:
    return FNN.random(depth, width, seed=seed, batch_shape=batch)


@pytest.mark.parametrize("kind", ["linear", "fnn, linear last"])
def test_other_kinds_of_networks_are_fused_too(kind: str) -> None:
    frozen, target = (
        LinearNetwork.random(d, 4, seed=d)
        if kind == "linear"
        else FNN.random(d, 4, linear_last=True, seed=d)
        for d in (2, 1)
    )
    data = Fresh(target, (4,))
    found = train_fused(frozen, 2, data, steps=2000, starts=2, learning_rates=(1e-2, 3e-2))
    x, y = (part.double() for part in data.test(500))
    error = (found.adapters.merge(frozen)(x) - y).square().mean()
    # Single precision, and for ReLU networks the inputs outside of the region.
    assert error < 1e-9 * y.var()
    losses = found.training.best_loss
    assert losses.shape == (2, 2)
    assert losses[found.chosen] == losses.min()
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


Factors = tuple[list[Tensor], list[Tensor]]


def chain(size: int, layers: Sequence[Tensor]) -> Tensor:
    return product([torch.eye(size, dtype=torch.float64), *layers])


def layers_of(factors: Factors) -> list[Tensor]:
    return [torch.eye(len(A), dtype=A.dtype) + A @ B.mT for A, B in zip(*factors, strict=True)]


def flat(factors: Factors) -> Tensor:
    return torch.cat([part.flatten() for pair in zip(*factors, strict=True) for part in pair])


def stacked(goal: Tensor, W: Sequence[Tensor], ranks: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Half the squared error of the product as a function of all factors."""
    size = len(W[0])

    def loss(numbers: Tensor) -> Tensor:
        pairs = numbers.split([2 * size * R for R in ranks])
        layers = zip(
            W, [pair.reshape(2, size, -1 if len(pair) else 0) for pair in pairs], strict=True
        )
        return (chain(size, [w + a @ b.mT for w, (a, b) in layers]) - goal).square().sum() / 2

    return loss


def undisguise(left: Tensor, right: Tensor, ranks: Sequence[int], pivot: int) -> Factors:
    """One adapter's columns as factors: of layers before the pivot upwards, behind it downwards."""
    eye = torch.eye(len(left), dtype=left.dtype)
    A, B = ([part.clone() for part in side.split([*ranks], 1)] for side in (left, right))
    before = behind = eye
    for l in range(pivot):
        B[l] = torch.linalg.solve(before.mT, B[l])
        before = (eye + A[l] @ B[l].mT) @ before
    for l in range(len(ranks) - 1, pivot - 1, -1):
        B[l] = torch.linalg.solve(before.mT, B[l])
        A[l] = torch.linalg.solve(behind, A[l])
        behind = behind @ (eye + A[l] @ B[l].mT)
    return A, B


@pytest.mark.parametrize("kept", [[0], [2], [0, 2]])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (1, 0, 1), (2, 1, 0)])
def test_critical_points_and_their_curvature_correspond(
    ranks: tuple[int, ...], kept: list[int]
) -> None:
    """Of one adapter and of several layers, one singular, which no search meets, or none."""
    size, rank, seed = 3, sum(ranks), kept[-1] + len(kept) + 2
    W = [random_matrix(3, 3, condition_number=3.0, seed=seed, purpose=f"{l}") for l in range(3)]
    merged = [chain(size, W[:l]) for l in range(len(ranks) + 1)]
    P = merged[-1]
    U, V = (torch.linalg.qr(normal(size, size, seed=seed + s)).Q for s in (0, 50))
    for pivot in (None, *(l for l, R in enumerate(ranks) if R)):
        S = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
        if pivot is not None:  # The product becomes singular, and one layer of it.
            S[kept[-1]] = 0
            partial = P + (U[:, kept] * S[kept]) @ V[:, kept].mT
            S[kept[-1]] = -1 / (V[:, kept[-1]] @ torch.linalg.solve(partial, U[:, kept[-1]]))
        error = (U * S) @ V.mT
        mix = normal(rank, rank, seed=seed + 9)
        left = torch.cat([U[:, kept] * S[kept], U.new_zeros(size, rank - len(kept))], 1) @ mix
        right = torch.cat([V[:, kept], U.new_zeros(size, rank - len(kept))], 1)
        right = torch.linalg.solve(mix, right.mT).mT
        A, B = undisguise(torch.linalg.solve(P, left), right, ranks, pivot or 0)
        least = [float(torch.linalg.svdvals(X)[-1]) for X in layers_of((A, B))]
        assert [value < 1e-8 for value in least] == [l == pivot for l in range(len(ranks))]
        # Behind the frozen layers they are the same adapters.
        A = [before @ a for before, a in zip(merged[1:], A, strict=True)]
        B = [torch.linalg.solve(before.mT, b) for before, b in zip(merged[:-1], B, strict=True)]

        of_many, numbers = stacked(P + error, W, ranks), flat((A, B)).requires_grad_()
        of_one = stacked(P + error, [P], [rank])
        torch.testing.assert_close(of_many(numbers), of_one(flat(([left], [right]))))
        (slope,) = torch.autograd.grad(of_many(numbers), numbers)
        assert slope.abs().max() < 1e-8
        signs = []
        for of, at in ((of_many, numbers.detach()), (of_one, flat(([left], [right])))):
            values = torch.linalg.eigvalsh(hessian(of, at))
            tiny = 1e-9 * values.abs().max()
            signs.append([int((values < -tiny).sum()), int((values > tiny).sum())])
        assert signs[0] == signs[1]
        least_loss = torch.linalg.svdvals(error)[rank:].square().sum() / 2
        assert signs[0][0] > 0 or of_many(numbers) < least_loss + 1e-9


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
    """``A Bᵀ``, ``A Aᵀ`` and ``B Bᵀ``, from columns that are not aligned."""
    E, B = aligned(size, beta)
    times = np.linspace(0, 8, 9)
    by = integrate(E, B, times, rates)
    found = flow(E, B, torch.from_numpy(times), rates=rates)
    for left, right, expected in (
        (found.left, found.right, by.left @ by.right.mT),
        (found.left, found.left, by.left @ by.left.mT),
        (found.right, found.right, by.right @ by.right.mT),
    ):
        np.testing.assert_allclose(left @ right.mT, expected, rtol=0, atol=1e-10)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_limit_is_the_best_product_whatever_the_sizes(
    out: int, into: int, rank: int, seed: int
) -> None:
    rank, rates = min(rank, into), (1.0, 0.5)
    E, B = aligned((out, into, rank), 0.8, seed=seed)
    late = torch.tensor([1e4], dtype=E.dtype) / rate_of(E, rank, 0.8, rates)
    torch.testing.assert_close(flow(E, B, late, rates=rates).matrix()[0], best(E, rank))


def test_a_direction_that_is_missed_is_never_learned_and_by_a_little_late() -> None:
    S, h = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), 0.5**0.5
    rows = torch.tensor([[0, 0], [1, 0], [0, h], [0, h]], dtype=S.dtype)
    # Blind to the difference of the first two.
    both = torch.tensor([[h, 0], [h, 0], [0, h], [0, -h]], dtype=S.dtype)
    near = torch.linalg.qr(both + 1e-5 * normal(4, 2))[0]
    U, V = (torch.linalg.qr(normal(4, 4, seed=s))[0] for s in (0, 1))
    E = (U * S) @ V.mT
    for B, kept, atol in ((rows, [1, 2], 1e-12), (both, [0, 2], 1e-12), (near, [0, 1], 1e-7)):
        limit = (U[:, kept] * S[kept]) @ V[:, kept].mT
        far = flow(E, V @ B, torch.tensor([1000.0], dtype=S.dtype)).matrix()[0]
        torch.testing.assert_close(far, limit, rtol=0, atol=atol)


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
            found = flow(sigma * one, beta * one, at, rates=rates).matrix()
            error = np.abs(found.flatten().numpy() - [float(p) for p in wanted])
            assert error.max() <= 1e-12 * sigma
