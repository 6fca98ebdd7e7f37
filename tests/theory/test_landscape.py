"""Adapted linear layers: coordinates of one adapter, critical points, curvature and descents.

In normal coordinates all frozen layers are the identity: ``X_l = I + A_l B_lᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, random_matrix
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from lorapower.networks.layers import product
from lorapower.training import settle

Factors = tuple[list[Tensor], list[Tensor]]
Loss = Callable[[Tensor], Tensor]
shapes = st.tuples(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=4))
seeds = st.integers(0, 10**6)


def chain(size: int, layers: Sequence[Tensor]) -> Tensor:
    return product([torch.eye(size, dtype=torch.float64), *layers])


def layers_of(factors: Factors) -> list[Tensor]:
    return [torch.eye(len(A), dtype=A.dtype) + A @ B.mT for A, B in zip(*factors, strict=True)]


def drawn(size: int, ranks: Sequence[int], seed: int, singular: Sequence[int] = ()) -> Factors:
    """Random factors; layers of at least one column are made singular."""
    each = iter(range(seed, seed + 2 * len(ranks)))
    A, B = ([normal(size, R, seed=next(each)) for R in ranks] for _ in "AB")
    pairs = enumerate(zip(A, B, strict=True))
    return A, [make_singular(a, b) if l in singular else b for l, (a, b) in pairs]


def make_singular(A: Tensor, B: Tensor, within: Tensor | None = None) -> Tensor:
    """Change B so that ``B^T A`` maps the first axis to its negative; move ``within`` a space."""
    first = A[:, 0] if within is None else within @ A[:, 0]
    change = B.mT @ A[:, 0]
    change[0] += 1
    return B - torch.outer(first / (first @ A[:, 0]), change)


def flat(factors: Factors) -> Tensor:
    return torch.cat([part.flatten() for pair in zip(*factors, strict=True) for part in pair])


def parted(numbers: Tensor, size: int, ranks: Sequence[int]) -> Factors:
    split = numbers.split([size * R for R in ranks for _ in "AB"])
    parts = [part.reshape(size, -1) if len(part) else part.reshape(size, 0) for part in split]
    return parts[::2], parts[1::2]


def frozen_layers(size: int, depth: int, seed: int) -> list[Tensor]:
    return [
        random_matrix(size, size, condition_number=3.0, seed=seed, purpose=f"layer {l}")
        for l in range(depth)
    ]


def behind_frozen(factors: Factors, merged: Sequence[Tensor]) -> Factors:
    """The factors at frozen layers, of which all products are given."""
    A, B = factors
    left = [P @ a for P, a in zip(merged[1:], A, strict=True)]
    return left, [torch.linalg.solve(P.mT, b) for P, b in zip(merged[:-1], B, strict=True)]


# --- One adapter in disguise ----------------------------------------------------------------------


def disguise(factors: Factors, pivot: int) -> tuple[Tensor, Tensor]:
    """The one adapter: columns seen from inputs before the pivot, from outputs behind it."""
    A, B = factors
    X, size = layers_of(factors), len(A[0])
    before = chain(size, X[:pivot])
    left, right = [], []
    for l, (a, b) in enumerate(zip(A, B, strict=True)):
        left.append(a if l < pivot else chain(size, X[l + 1 :]) @ a)
        right.append((chain(size, X[:l]) if l < pivot else before).mT @ b)
    return torch.cat(left, 1), torch.cat(right, 1)


def undisguise(left: Tensor, right: Tensor, ranks: Sequence[int], pivot: int) -> Factors:
    """The inverse: factors of layers before the pivot upwards, of those behind it downwards."""
    size, eye = len(left), torch.eye(len(left), dtype=left.dtype)
    A, B = ([part.clone() for part in side.split([*ranks], 1)] for side in (left, right))
    before = behind = eye
    for l in range(pivot):
        B[l] = torch.linalg.solve(before.mT, B[l])
        before = (eye + A[l] @ B[l].mT) @ before
    for l in range(len(ranks) - 1, pivot - 1, -1):
        B[l] = torch.linalg.solve(before.mT, B[l])
        A[l] = torch.linalg.solve(behind, A[l])
        behind = behind @ (eye + A[l] @ B[l].mT)
    assert behind.shape == (size, size)
    return A, B


@given(shapes, seeds, st.data())
def test_several_layers_are_one_adapter_in_disguise(
    shape: tuple[int, list[int]], seed: int, data: st.DataObject
) -> None:
    """Adapters of frozen layers become adapters of identities, and these one adapter, and back."""
    size, ranks = shape
    pivot = data.draw(st.integers(0, len(ranks) - 1))
    factors = drawn(size, ranks, seed, [pivot] if ranks[pivot] else [])
    W = frozen_layers(size, len(ranks), seed)
    merged = [chain(size, W[:l]) for l in range(len(ranks) + 1)]
    pairs = zip(W, *behind_frozen(factors, merged), strict=True)
    adapted = [w + a @ b.mT for w, a, b in pairs]
    left, right = disguise(factors, pivot)
    whole = torch.eye(size, dtype=torch.float64) + left @ right.mT
    torch.testing.assert_close(chain(size, layers_of(factors)), whole, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(chain(size, adapted), merged[-1] @ whole, rtol=1e-7, atol=1e-7)


def slopes_of_disguise(factors: Factors, pivot: int) -> Tensor:
    """The singular values of the map's Jacobian, as many as there are numbers."""
    A, _ = factors
    size, ranks = len(A[0]), [part.shape[1] for part in A]

    def both(numbers: Tensor) -> Tensor:
        return torch.cat([*disguise(parted(numbers, size, ranks), pivot)]).flatten()

    return torch.linalg.svdvals(jacobian(both, flat(factors), vectorize=True))


@pytest.mark.parametrize("ranks", [(2,), (1, 2, 1), (2, 0, 1, 1), (1, 1, 2)])
def test_it_changes_coordinates_where_at_most_one_layer_is_singular(ranks: tuple[int, ...]) -> None:
    carriers = [l for l, R in enumerate(ranks) if R]
    for size, seed in ((1, 0), (2, 1), (3, 2)):
        for pivot in carriers:
            values = slopes_of_disguise(drawn(size, ranks, seed, [pivot]), pivot)
            assert values[-1] > 1e-7 * values[0]
        for pair in combinations(carriers, 2):
            for pivot in range(len(ranks)):
                values = slopes_of_disguise(drawn(size, ranks, seed, pair), pivot)
                assert values[-1] < 1e-12 * values[0]


def squares(goal: Tensor, root: Tensor) -> Loss:
    return lambda made: ((goal - made) @ root).square().sum() / 2


def critical_losses(error: Tensor, root: Tensor, rank: int) -> Tensor:
    """The losses of the theorem, least first."""
    squared = torch.linalg.svdvals(error @ root).square()
    sets = [c for k in range(min(rank, len(squared)) + 1) for c in combinations(squared, k)]
    return torch.stack([(squared.sum() - sum(kept)) / 2 for kept in sets]).sort().values


@pytest.mark.parametrize("pivot", [None, 0, 1, 2])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (1, 0, 1), (2, 1, 0)])
def test_critical_points_and_their_curvature_correspond(
    ranks: tuple[int, ...], pivot: int | None
) -> None:
    """One adapter's critical points, one layer singular or none, and the signs of curvature."""
    if pivot is not None and not ranks[pivot]:
        return
    size, rank, eye = 3, sum(ranks), torch.eye(3, dtype=torch.float64)
    for seed in range(3):
        U, _ = torch.linalg.qr(normal(size, size, seed=seed))
        near = torch.linalg.svd(0.3 * normal(size, size, seed=seed + 50) - U)
        V = near.U @ near.Vh
        S = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
        kept = [0] if seed == 0 else [2] if seed == 1 else [0, 2]
        if pivot is not None:  # The product becomes singular, and one layer of it.
            S[kept[-1]] = 0
            partial = eye + (U[:, kept] * S[kept]) @ V[:, kept].mT
            S[kept[-1]] = -1 / (V[:, kept[-1]] @ torch.linalg.solve(partial, U[:, kept[-1]]))
        error = (U * S) @ V.mT
        loss = squares(eye + error, eye)
        mix = normal(rank, rank, seed=seed + 9)
        left = torch.cat([U[:, kept] * S[kept], U.new_zeros(size, rank - len(kept))], 1)
        right = torch.cat([V[:, kept], U.new_zeros(size, rank - len(kept))], 1)
        one = (left @ mix, torch.linalg.solve(mix, right.mT).mT)
        factors = undisguise(*one, ranks, 0 if pivot is None else pivot)
        least = [float(torch.linalg.svdvals(X)[-1]) for X in layers_of(factors)]
        assert [value < 1e-8 for value in least] == [l == pivot for l in range(len(ranks))]

        of_many = stacked(loss, [eye] * len(ranks), ranks)
        of_one = stacked(loss, [eye], [rank])
        numbers = flat(factors).requires_grad_()
        (slope,) = torch.autograd.grad(of_many(numbers), numbers)
        assert slope.abs().max() < 1e-8
        signs = []
        for of, at in ((of_many, flat(factors)), (of_one, flat(([one[0]], [one[1]])))):
            values = torch.linalg.eigvalsh(hessian(of, at))
            tiny = 1e-9 * values.abs().max()
            signs.append([int((values < -tiny).sum()), int((values > tiny).sum())])
        assert signs[0] == signs[1]
        assert signs[0][0] > 0 or of_many(numbers) < critical_losses(error, eye, rank)[0] + 1e-9


def stacked(g: Loss, W: Sequence[Tensor], ranks: Sequence[int]) -> Loss:
    """A loss of the product as a function of all factors."""

    def loss(numbers: Tensor) -> Tensor:
        pairs = zip(W, *parted(numbers, len(W[0]), ranks), strict=True)
        return g(chain(len(W[0]), [w + a @ b.mT for w, a, b in pairs]))

    return loss


def root_of_slope(loss: Loss, start: Tensor) -> tuple[Tensor, float, float]:
    """A point from which the slope vanishes, the slope there and the least curvature."""
    slope = torch.func.grad(loss)
    curvature = torch.func.jacrev(slope)
    end = scipy.optimize.least_squares(
        lambda numbers: slope(torch.from_numpy(numbers)).numpy(),
        start.numpy(),
        jac=lambda numbers: curvature(torch.from_numpy(numbers)).numpy(),
        method="lm",
        max_nfev=100,
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
    )
    point = torch.from_numpy(end.x)
    return point, float(np.abs(end.fun).max()), float(torch.linalg.eigvalsh(curvature(point))[0])


@pytest.mark.parametrize(
    ("size", "ranks", "missing"),
    [
        (2, (1,), 0),
        (1, (1, 1), 0),
        (3, (1, 1), 0),
        (3, (1, 1), 1),
        (3, (2, 1), 0),
        (2, (1, 0, 1), 1),
    ],
)
def test_critical_points_found_by_search_have_the_losses_of_one_adapter(
    size: int, ranks: tuple[int, ...], missing: int
) -> None:
    """Where at most one layer is singular, with singular moments of inputs too."""
    counted = 0
    for seed in range(8):
        W = [3**0.5 * weight for weight in frozen_layers(size, len(ranks), seed)]
        error = normal(size, size, seed=seed)
        root = random_matrix(size, size, condition_number=3.0, seed=seed, purpose="root")
        root[:, :missing] = 0
        loss = stacked(squares(chain(size, W) + error, root), W, ranks)
        start = 0.7 * normal(2 * size * sum(ranks), seed=1000 + seed)
        point, slope, curvature = root_of_slope(loss, start)
        pairs = zip(W, *parted(point, size, ranks), strict=True)
        singular = sum(float(torch.linalg.svdvals(w + a @ b.mT)[-1]) < 1e-4 for w, a, b in pairs)
        if slope > 1e-10 or singular > 1:
            continue
        counted += 1
        listed = critical_losses(error, root, sum(ranks))
        assert (listed - loss(point)).abs().min() < 1e-9
        assert loss(point) < listed[0] + 1e-9 or curvature < -1e-4
    assert counted > 2


def test_two_singular_layers_have_other_losses() -> None:
    """Two numbers that are both 0: critical, with the loss of a product that no adapter keeps."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    loss, numbers = squares(3 * ones, ones), flat(([ones, ones], [-ones, -ones])).requires_grad_()
    here = loss(chain(1, layers_of(parted(numbers, 1, (1, 1)))))
    (slope,) = torch.autograd.grad(here, numbers)
    assert not slope.any()
    assert (critical_losses(2 * ones, ones, 2) - here).abs().min() == 2.5


# --- Lines down -----------------------------------------------------------------------------------


def logistic(goal: Tensor, root: Tensor) -> Loss:
    """Cross-entropy on the columns as inputs, convex and not quadratic, least at the goal."""
    wanted = (goal @ root).sigmoid()
    return lambda made: (torch.nn.functional.softplus(made @ root) - wanted * (made @ root)).sum()


def with_slope(g: Loss, at: Tensor, Q: Tensor) -> Loss:
    """Add a linear function, so that the slope at a product is Q."""
    shift = Q - torch.func.grad(g)(at)
    return lambda made: g(made) + (shift * made).sum()


def curvature_along(loss: Loss, start: Tensor, move: Tensor) -> float:
    second = torch.func.grad(torch.func.grad(lambda t: loss(start + t * move)))
    return float(second(torch.zeros((), dtype=torch.float64)))


def critical_layers(
    size: int, ranks: Sequence[int], singular: Sequence[int], seed: int
) -> tuple[Factors, Tensor]:
    """Layers, singular where asked, and a slope to which all factors are orthogonal."""
    u, v = (part / part.norm() for part in normal(2, size, seed=seed))
    keep_u, keep_v = (torch.eye(size, dtype=u.dtype) - torch.outer(w, w) for w in (u, v))
    A, B = drawn(size, ranks, seed + 1)
    A, B = [keep_u @ a for a in A], [keep_v @ b for b in B]
    pairs = enumerate(zip(A, B, strict=True))
    B = [make_singular(a, b, keep_v) if l in singular else b for l, (a, b) in pairs]
    return (A, B), 2 * torch.outer(u, v)


def line_down(factors: Factors, Q: Tensor, tau: float) -> tuple[Factors, Tensor]:
    """The move of all factors, and what it does to the product to first order."""
    A, B = factors
    X, size, ranks = layers_of(factors), len(Q), [b.shape[1] for b in B]
    U, _, Vh = torch.linalg.svd(Q)
    seen = torch.cat([chain(size, X[:l]).mT @ b for l, b in enumerate(B)], 1)
    y, ends = torch.linalg.svd(seen).Vh[-1], np.cumsum([0, *ranks])
    T = torch.eye(len(y), dtype=y.dtype)
    for l, m in combinations(range(len(X)), 2):
        between = B[m].mT @ chain(size, X[l + 1 : m]) @ A[l]
        T[ends[m] : ends[m + 1], ends[l] : ends[l + 1]] = between
    z = torch.linalg.solve(T, y).split(ranks)
    heads = [-tau * chain(size, X[1 : l + 1]) @ U[:, 0] for l in range(len(X))]
    to_A = [torch.outer(head, part) for head, part in zip(heads, y.split(ranks), strict=True)]
    to_B = [torch.outer(Vh[0], part) for part in z]
    sides = [(chain(size, X[l + 1 :]) @ a, chain(size, X[:l])) for l, a in enumerate(A)]
    moves = [left @ move.mT @ right for move, (left, right) in zip(to_B, sides, strict=True)]
    return (to_A, to_B), torch.stack(moves).sum(0)


@given(shapes, seeds, st.sampled_from([squares, logistic]), st.data())
def test_lines_lead_down_from_singular_layers(
    shape: tuple[int, list[int]],
    seed: int,
    loss: Callable[[Tensor, Tensor], Loss],
    data: st.DataObject,
) -> None:
    """The curvature is the predicted one, with up to four singular layers and frozen layers."""
    size, ranks = shape
    ranks[-1] += max(0, size - sum(ranks))
    carriers = [l for l, R in enumerate(ranks) if R and size > 1]
    singular = data.draw(st.sets(st.sampled_from(carriers))) if carriers else set()
    factors, Q = critical_layers(size, ranks, sorted(singular), seed)
    least = [float(torch.linalg.svdvals(X)[-1]) for X in layers_of(factors)]
    assert all(least[l] < 1e-10 for l in singular)
    W = frozen_layers(size, len(ranks), seed)
    merged = [chain(size, W[:l]) for l in range(len(ranks) + 1)]
    made = merged[-1] @ chain(size, layers_of(factors))
    root = normal(size, size, seed=seed)
    root[:, : size // 2] = 0
    g = loss(normal(size, size, seed=seed), root)
    # Seen before all frozen layers the slope is Q.
    g = with_slope(g, made, torch.linalg.solve(merged[-1].mT, Q))
    tau = 3.0
    move, first = line_down(factors, Q, tau)
    start, along = (flat(behind_frozen(part, merged)) for part in (factors, move))
    bent = curvature_along(g, made, merged[-1] @ first)
    fall = 2 * tau * float(torch.linalg.matrix_norm(Q, 2))
    measured = curvature_along(stacked(g, W, ranks), start, along)
    assert measured == pytest.approx(bent - fall, abs=1e-8 * (bent + fall))


@given(st.integers(2, 4), st.integers(2, 4), seeds, st.data())
def test_a_move_keeps_the_product_and_changes_what_later_layers_see(
    size: int, depth: int, seed: int, data: st.DataObject
) -> None:
    """The first step of the proof, from each layer before the last singular one."""
    last = data.draw(st.integers(1, depth - 1))
    also = data.draw(st.sets(st.integers(0, depth - 1)))
    A, B = factors = drawn(size, [1] * depth, seed, [last, *also])
    X = layers_of(factors)
    for l in range(last):
        *_, row = torch.linalg.svd(chain(size, X[l + 1 :])).Vh
        lost = [(chain(size, X[l + 1 : k + 1]) @ row).norm() < 1e-7 for k in range(depth)]
        m = lost.index(True, l + 1)
        through = chain(size, X[l + 1 : m]) @ row
        assert (B[m].mT @ through).norm() > 1e-6
        y = normal(1, seed=seed)
        moved = [a + 0.5 * torch.outer(row, y) if k == l else a for k, a in enumerate(A)]
        after = layers_of((moved, B))
        torch.testing.assert_close(chain(size, after), chain(size, X), rtol=1e-6, atol=1e-6)
        change = 0.5 * torch.outer(through, B[l] @ y) @ chain(size, X[:l])
        torch.testing.assert_close(
            chain(size, after[:m]) - chain(size, X[:m]), change, rtol=1e-6, atol=1e-6
        )


# --- Descents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [squares, logistic])
@pytest.mark.parametrize(
    ("size", "ranks"),
    [(2, (1, 1)), (3, (2, 1)), (3, (1, 1, 1)), (4, (2, 0, 2)), (3, (2, 2)), (3, (1, 1))],
)
def test_descents_end_at_the_least_loss(
    loss: Callable[[Tensor, Tensor], Loss], size: int, ranks: tuple[int, ...]
) -> None:
    """From layers that are all singular or at random; below full rank if the loss is squared."""
    if sum(ranks) < size and loss is logistic:
        return
    ended = 0
    for seed in range(6):
        W = frozen_layers(size, len(ranks), seed)
        goal = normal(size, size, seed=seed)
        root = random_matrix(size, size, condition_number=3.0, seed=seed, purpose="root")
        if sum(ranks) >= size:
            root[:, 0] = 0
        g = loss(goal, root)
        least = float(g(goal))
        if sum(ranks) < size:
            least = float(critical_losses(goal - chain(size, W), root, sum(ranks))[0])
            assert least > 1e-4
        for singular in ((), [l for l, R in enumerate(ranks) if R]):
            end = settle(stacked(g, W, ranks), flat(drawn(size, ranks, 100 * seed, singular)))
            if end.slope < 1e-6:
                ended += 1
                assert abs(end.loss - least) < 1e-8
    assert ended >= 10


def test_a_singular_frozen_layer_makes_a_trap() -> None:
    """Ranks 2 on two layers of size 2, and a frozen layer of rank 1 between them."""
    eye = torch.eye(2, dtype=torch.float64)
    importance = torch.tensor([[2.0, 4.0], [4.0, 1.0]], dtype=torch.float64)
    loss = stacked(
        lambda made: (importance * (made - eye).square()).sum() / 2,
        [eye, torch.diag(eye[0]), eye],
        (2, 0, 2),
    )
    losses = []
    # Both layers are the identity, or swap the axes.
    for layer in (eye, eye.flip(0)):
        start = flat(([layer - eye, eye[:, :0], layer - eye], [eye, eye[:, :0], eye]))
        losses.append(settle(loss, start + 0.01 * normal(len(start))).loss)
    np.testing.assert_allclose(losses, [0.5, 1.0], rtol=1e-9)
