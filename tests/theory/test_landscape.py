"""Critical points, lines that leave them, where descent ends: theorems against search."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import comb
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from lorapower import InputError, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork
from lorapower.training import settle
from lorapower.training.landscape import critical_points, escape, find_critical

Loss = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return randomness.normal(randomness.generator(seed, "landscape"), *shape)


def root_of(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return (vectors * values.where(values > 1e-12, 0).sqrt()) @ vectors.mT


def product(weights: Any) -> Tensor:
    return reduce(lambda found, layer: layer @ found, weights)


def along(frozen: LinearNetwork, adapters: Adapters, line: Any, g: Loss) -> tuple[float, float]:
    """First and second derivative of a loss of the product along a line, by torch."""

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    triples = zip(frozen.weights, adapters.updates, line.directions, strict=True)
    moved = [W + (u.left + t * d.left) @ (u.right + t * d.right).mT for W, u, d in triples]
    (first,) = torch.autograd.grad(g(product(moved)), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    return first.item(), second.item()


# --- One layer ------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(0, 99), st.booleans())
def test_critical_points_are_saddles_but_for_the_least(
    out: int, into: int, rank: int, seed: int, singular: bool
) -> None:
    E = normal(out, into, seed=seed)
    mixed = normal(into, into - (singular and into > 1), seed=seed + 1)
    C = mixed @ mixed.mT
    C += 0 if singular else 0.1 * torch.eye(into, dtype=E.dtype)
    root = root_of(C)
    rank, count = min(rank, out, into), int(torch.linalg.matrix_rank(E @ root, rtol=1e-9))
    found = list(critical_points(E, rank, covariance=C))
    assert len(found) == sum(comb(count, k) for k in range(min(rank, count) + 1))
    least = torch.linalg.svdvals(E @ root)[rank:].square().sum() / 2

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return ((E - A @ B.mT) @ root).square().sum() / 2

    for one in found:
        A, B = (f.clone().requires_grad_() for f in (one.point.left, one.point.right))
        slopes = torch.autograd.grad(loss(A, B), (A, B)) if rank else ()
        assert all(slope.abs().max() < 1e-8 for slope in slopes)
        value = loss(one.point.left, one.point.right)
        assert float(value) == pytest.approx(one.loss, rel=1e-8, abs=1e-10)
        if one.direction is None:
            assert one.loss == pytest.approx(float(least), rel=1e-8, abs=1e-10)
            continue
        assert one.loss > least * (1 + 1e-12)
        assert one.curvature < 0
        t = 1e-2
        at = [
            loss(one.point.left + s * one.direction.left, one.point.right + s * one.direction.right)
            for s in (-t, 0, t)
        ]
        second = (at[0] + at[2] - 2 * at[1]) / (2 * t * t)
        # A quartic along the line: what is left of order t² belongs to t⁴.
        assert float(second) == pytest.approx(one.curvature, abs=1e-2 * (1 + abs(one.curvature)))


@pytest.mark.parametrize("size", [(3, 3, 1), (2, 4, 2), (4, 3, 2), (3, 3, 3), (4, 4, 5)])
@pytest.mark.parametrize("singular", [False, True])
def test_every_critical_point_is_made_of_singular_triplets(
    size: tuple[int, int, int], singular: bool
) -> None:
    """ "Only if": root search, which knows nothing of triplets, finds no other products."""
    out, into, rank = size
    E, mixed = normal(out, into), normal(into, into - singular, seed=1)
    root = root_of(mixed @ mixed.mT)
    U, S, Vh = torch.linalg.svd(E @ root, full_matrices=False)
    frozen = LinearNetwork([torch.zeros(out, into, dtype=torch.float64)])

    def g(K: Tensor) -> Tensor:
        return ((E - K) @ root).square().sum() / 2

    starts = Adapters((LowRank(normal(60, out, rank, seed=2), normal(60, into, rank, seed=3)),))
    points, losses, curvatures = find_critical(frozen, g, starts, tolerance=1e-11)
    kinds = set()
    for index, (loss, curvature) in enumerate(zip(losses, curvatures, strict=True)):
        point = points[index].updates[0]
        N = point.matrix() @ root
        kept = (U.mT @ N @ Vh.mT).diagonal() > (S / 2).clamp(min=1e-6)
        kinds.add(tuple(kept.tolist()))
        assert int(kept.sum()) <= rank
        torch.testing.assert_close(N, (U[:, kept] * S[kept]) @ Vh[kept], rtol=0, atol=1e-5)
        assert float(loss) == pytest.approx(float(S[~kept].square().sum()) / 2, abs=1e-6)
        if loss > S[rank:].square().sum() / 2 + 1e-6:
            assert curvature < -1e-6
            # In the metric of C, as the proof.
            lifted = Adapters((LowRank(point.left, root @ point.right),))
            line = escape(frozen, lifted, N - E @ root)
            first, second = along(frozen, lifted, line, lambda K: (E @ root - K).square().sum() / 2)
            assert abs(first) < 1e-5
            expected = 2 * line.fall + float(line.change.square().sum())
            assert second == pytest.approx(expected, rel=1e-4)
            assert second < 0
    assert len(losses) > 20
    assert len(kinds) > 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_column_that_one_factor_has_alone_is_used(turned: bool) -> None:
    """The second case of the proof, where the line's first part ``A x`` is not 0."""
    eye = torch.eye(4, dtype=torch.float64)
    goal = torch.diag(torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64))
    full, lacking = torch.stack([eye[0], 5 * eye[3]], 1), torch.stack([eye[0], 0 * eye[0]], 1)
    adapters = Adapters((LowRank(lacking, full) if turned else LowRank(full, lacking),))
    frozen = LinearNetwork([0 * eye])
    line = escape(frozen, adapters, adapters.updates[0].matrix() - goal)
    assert float(line.change.norm()) == pytest.approx(5)
    first, second = along(frozen, adapters, line, lambda K: (goal - K).square().sum() / 2)
    assert first == pytest.approx(0, abs=1e-12)
    assert second == pytest.approx(2 * line.fall + 25)
    assert second <= -2 * 3 * (1 - 1e-12)


def test_gradient_descent_from_anywhere_comes_to_the_least_critical_value() -> None:
    """Independent of the list: where descent ends, it ends at its minimum."""
    E = normal(4, 3)
    least = [c for c in critical_points(E, 2) if c.direction is None]
    assert len(least) == 1
    for seed in range(5):
        starts = normal(4, 2, seed=seed), normal(3, 2, seed=seed + 50)
        end = settle(lambda A, B: (E - A @ B.mT).square().sum() / 2, *starts)
        assert end.loss == pytest.approx(least[0].loss, rel=1e-6)


def test_of_equal_values_any_are_least() -> None:
    found = {one.kept: one for one in critical_points(torch.eye(3, dtype=torch.float64), 1)}
    assert all(found[(d,)].direction is None and found[(d,)].loss == 1 for d in range(3))
    assert found[()].curvature < 0


# --- A product of layers --------------------------------------------------------------------------

SIZES = [(2, (1, 1)), (3, (2, 1)), (3, (1, 1, 1)), (2, (1, 0, 2)), (4, (2, 2))]


def split(width: int, ranks: tuple[int, ...]) -> tuple[LinearNetwork, Tensor, Adapters]:
    """A frozen network, what its product should be, and starts small and large."""
    draw = randomness.generator(0, "split", width, *ranks)
    frozen = LinearNetwork([randomness.normal(draw, width, width) for _ in ranks])
    goal, scale = randomness.normal(draw, width, width), torch.logspace(-0.5, 0.5, 120)
    updates = [
        LowRank(*(scale[:, None, None] * randomness.normal(draw, 120, width, R) for _ in "AB"))
        for R in ranks
    ]
    return frozen, goal, Adapters(tuple(updates))


def test_points_of_layers_that_are_not_singular_are_left_as_the_theorem_says() -> None:
    """More than 200 that are not global, of five sizes, all found by root search."""
    count = 0
    for width, ranks in SIZES:
        frozen, goal, starts = split(width, ranks)

        def g(P: Tensor, goal: Tensor = goal) -> Tensor:
            return (P - goal).square().sum() / 2

        points, losses, curvatures = find_critical(frozen, g, starts)
        merged = points.merge(frozen)
        margin = torch.stack([torch.linalg.svdvals(w)[:, -1] for w in merged.weights]).amin(0)
        other = (losses > 1e-8) & (margin > 1e-3)
        assert curvatures[other].max() < -1e-2
        count += int(other.sum())
        for index in other.nonzero()[:, 0].tolist():
            adapters = points[index]
            slope = product(adapters.merge(frozen).weights) - goal
            line = escape(frozen, adapters, slope)
            assert line.fall <= -float(torch.linalg.matrix_norm(slope, 2)) * (1 - 1e-9)
            first, second = along(frozen, adapters, line, g)
            assert abs(first) < 1e-8 * (1 + abs(second))
            expected = 2 * line.fall + float(line.change.square().sum())
            assert second == pytest.approx(expected, rel=1e-8)
            assert second <= -2 * float(torch.linalg.matrix_norm(slope, 2)) * (1 - 1e-6)
    assert count >= 200


def test_relu_blocks_that_idle_inside_are_left_too() -> None:
    """The same line, with the last bias moved along, lowers the loss of two ReLU layers."""
    frozen, goal, starts = split(3, (2, 1))
    points, losses, _ = find_critical(frozen, lambda P: (P - goal).square().sum() / 2, starts)
    margin = torch.stack(
        [torch.linalg.svdvals(w)[:, -1] for w in points.merge(frozen).weights]
    ).amin(0)
    index = int(((losses > 1e-2) & (margin > 1e-2)).nonzero()[-1])
    adapters = points[index]
    V, W = adapters.merge(frozen).weights
    line = escape(frozen, adapters, W @ V - goal)
    x = torch.cat([torch.eye(3), -torch.eye(3)], 1).double() * 3**0.5
    inner, level = torch.full((3,), 50.0).double(), torch.full((3,), 80.0).double()
    y = goal @ x + level[:, None]
    assert (y > 0).all()
    parts = [f for u in adapters.updates for f in (u.left, u.right)] + [inner, level - W @ inner]
    (d1, d2), (u1, u2) = line.directions, adapters.updates
    moved = d2.left @ u2.right.mT + u2.left @ d2.right.mT
    step = [d1.left, d1.right, d2.left, d2.right, torch.zeros(3).double(), -moved @ inner]

    def loss(*parts: Tensor) -> Tensor:
        A1, B1, A2, B2, b, c = parts
        z = ((frozen.weights[0] + A1 @ B1.mT) @ x + b[:, None]).relu()
        p = (frozen.weights[1] + A2 @ B2.mT) @ z + c[:, None]
        return torch.where(y > 0, p - y, p.relu()).square().mean(-1).sum() / 2

    slopes = grad(loss, argnums=tuple(range(6)))(*parts)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6
    free = [part.clone().requires_grad_() for part in parts]
    turned = torch.autograd.functional.hvp(loss, tuple(free), tuple(step))[1]
    second = sum(float((d * h).sum()) for d, h in zip(step, turned, strict=True))
    expected = 2 * line.fall + float(line.change.square().sum())
    assert second == pytest.approx(expected, rel=1e-6)
    network = FNN([V, W], [parts[4], parts[5]])
    assert (network.preactivations(x)[0] > 0).all()
    assert u1.rank + u2.rank == 3


def test_three_layers_that_are_all_zero_are_a_saddle_of_third_order() -> None:
    """Why the theorem asks for layers that are not singular."""
    frozen = LinearNetwork([torch.ones(1, 1, dtype=torch.float64)] * 3)
    zero = Adapters((LowRank(torch.ones(1, 1, 1).double(), -torch.ones(1, 1, 1).double()),) * 3)
    _, losses, curvatures = find_critical(frozen, lambda P: (P - 1).square().sum() / 2, zero)
    assert losses.tolist() == [0.5]
    assert curvatures.tolist() == [0.0]
    with pytest.raises(InputError, match=r"^adapters must be such that no layer is"):
        escape(frozen, zero[0], -torch.ones(1, 1, dtype=torch.float64))


def test_a_descent_settles_where_nothing_moves() -> None:
    goal, point = normal(2, 3), normal(3, seed=1)

    def loss(matrix: Tensor, vector: Tensor) -> Tensor:
        return (matrix - goal).square().sum() + (vector - point).pow(4).sum()

    end = settle(loss, torch.zeros(2, 3).double(), torch.zeros(3).double())
    torch.testing.assert_close(end.parts[0], goal)
    assert end.loss == loss(*end.parts).item() == pytest.approx(0, abs=1e-12)
    assert end.slope < 1e-9
    cut = settle(loss, torch.zeros(2, 3).double(), torch.zeros(3).double(), iterations=1)
    assert cut.loss > end.loss
    assert cut.slope > end.slope


# --- Below the width ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3, 2, 60), (4, 3, 2, 60), (4, 4, 1, 60), (4, 5, 3, 60)])
def test_the_chain_of_the_proof_holds_at_every_critical_point(shape: Any) -> None:
    """``‖Q‖/σ_R ≥ 2⟨Q, K − E⟩/‖K − E‖² ≥ 1``, and the line leads down."""
    out, into, rank, samples = shape
    half, target = normal(into, samples, seed=1), normal(out, into, seed=2)
    E = normal(out, rank, seed=3) @ normal(rank, into, seed=4)
    x = torch.cat([half, -half], 1)
    C = x @ x.mT / x.shape[1]
    # Inputs of covariance I: the metric of the proof.
    x = torch.linalg.inv(root_of(C)) @ x
    aim = target @ x

    def g(K: Tensor) -> Tensor:
        p = (target - E + K) @ x
        return torch.where(aim > 0, p - aim, p.relu()).square().sum() / (2 * x.shape[1])

    frozen = LinearNetwork([torch.zeros(out, into, dtype=torch.float64)])
    starts = Adapters((LowRank(normal(50, out, rank, seed=5), normal(50, into, rank, seed=6)),))
    points, losses, curvatures = find_critical(frozen, g, starts)
    full = 0
    for index in (losses > 1e-8).nonzero()[:, 0].tolist():
        assert curvatures[index] < -1e-4
        adapters = points[index]
        K = adapters.updates[0].matrix()
        Q, values = grad(g)(K), torch.linalg.svdvals(K)
        # What the proof calls twice the missing half, from the samples on which signs differ.
        p = (target - E + K) @ x
        differ = (p.abs() * (p.abs() + aim.abs()) * (p * aim < 0)).mean(-1).sum() / 2
        gap = (K - E).square().sum()
        assert float((Q * (K - E)).sum()) == pytest.approx(float(gap / 2 + differ), rel=1e-6)
        line = escape(frozen, adapters, Q)
        first, second = along(frozen, adapters, line, g)
        assert abs(first) < 1e-6
        assert second < 0
        if values[rank - 1] > 1e-3:
            full += 1
            ratio = float(torch.linalg.matrix_norm(Q, 2) / values[rank - 1])
            assert ratio >= 2 * float((Q * (K - E)).sum() / gap) - 1e-6
            assert ratio >= 1
            assert line.fall == pytest.approx(-ratio)
    assert full >= 3


# --- Bad input ------------------------------------------------------------------------------------

EYE = torch.eye(2, dtype=torch.float64)
ONE, TWO = LinearNetwork([EYE]), LinearNetwork([EYE, EYE])
NONE, SOME = LowRank(EYE[:, :0], EYE[:, :0]), LowRank(EYE[:, :1], EYE[:, :1])
BAD: list[tuple[str, Callable[[], object]]] = [
    ("covariance", lambda: next(critical_points(EYE, 1, covariance=-EYE))),
    ("covariance", lambda: next(critical_points(EYE, 1, covariance=EYE[:1]))),
    ("rank", lambda: next(critical_points(EYE, 3))),
    ("slope", lambda: escape(ONE, Adapters((SOME,)), 0 * EYE)),
    ("slope", lambda: escape(ONE, Adapters((SOME,)), EYE[:1])),
    ("adapters", lambda: escape(ONE, Adapters((NONE,)), EYE)),
    ("adapters", lambda: escape(TWO, Adapters((SOME, NONE)), EYE)),
    ("network", lambda: escape(ONE, Adapters((SOME, SOME)), EYE)),
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_bad_input_is_refused(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"^{name} must be"):
        call()
