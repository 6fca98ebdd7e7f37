"""Critical points of a loss of a product of adapted layers, and lines down from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev, vmap

from .. import _checks, lowrank
from ..adapters import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from ..networks.layers import product
from ._free import require_fit

# A singular value of factors counts as 0 from so much below their size or the root of the slope's.
FLAT = 1e-6
# First damping of the search, and its factors after steps that lower the slope and others.
DAMPING, EASIER, HARDER = 1.0, 0.2, 4.0


class _Critical(NamedTuple):
    """A critical point, as `critical_points` describes it."""

    kept: tuple[int, ...]
    point: LowRank
    loss: float
    direction: LowRank | None
    curvature: float


class _Line(NamedTuple):
    """A line through a critical point, as `escape` describes it."""

    directions: tuple[LowRank, ...]
    change: Float[Tensor, "out in"]
    fall: float


@torch.no_grad()
def critical_points(
    error: Float[Tensor, "out in"],
    rank: int,
    *,
    covariance: Float[Tensor, "in in"] | None = None,
) -> Iterator[_Critical]:
    """Yield critical points of ``½ ‖(E − A Bᵀ) C^{1/2}‖²_F`` over adapters of a rank.

    ``error`` is ``E``, the product that the factors should have, and ``covariance`` is ``C``, by
    default the identity. If the nonzero singular values of ``E C^{1/2}`` are distinct, each set of
    at most ``rank`` of them gives a kind, whose points share ``A Bᵀ C^{1/2}`` and loss; equal
    values give further points with the same losses. One point of each kind is yielded; all are
    minima or strict saddles [thm-landscape]. Raises `InputError` for a rank out of range and a
    covariance that is not positive semi-definite.

    Each has a ``point``, the factors ``A`` and ``B``; ``kept``, the singular triplets in it,
    counted from 0; a ``loss``, ``½ Σ σ_d²`` over the other triplets; and, at a saddle, a
    ``direction``: a step ``t`` along it adds ``curvature · t²`` to the loss. A minimum has the
    direction ``None`` and the curvature 0.
    """
    E = _checks.real_tensor("error", error, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(E.shape), limit="the smaller side")
    root = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
    if covariance is not None:
        C = _checks.real_tensor("covariance", covariance, min_dims=2).to(E)
        if C.shape != root.shape or not torch.allclose(C, C.mT):
            allowed = f"a symmetric matrix of {E.shape[1]} rows"
            raise InputError("covariance", allowed=allowed, given=f"shape {tuple(C.shape)}")
        values, vectors = torch.linalg.eigh(C)
        rounding = 8 * len(C) * torch.finfo(C.dtype).eps * values.abs().max()
        if values.min() < -rounding:
            allowed = "positive semi-definite"
            raise InputError("covariance", allowed=allowed, given=f"eigenvalue {values.min():.3g}")
        # What is 0 but for rounding must not become its root.
        root = (vectors * values.where(values > rounding, 0).sqrt()) @ vectors.mT
    found = lowrank.svd(E @ root)
    count = int(lowrank.rank(E @ root))
    back = torch.linalg.pinv(root, hermitian=True)
    for size in range(min(rank, count) + 1):
        for kept in combinations(range(count), size):
            yield _critical(found, kept, rank, count, back)


@torch.no_grad()
def escape(network: Network, adapters: Adapters, slope: Float[Tensor, "out in"]) -> _Line:
    """Find the line by which the proofs leave a critical point of a loss of an adapted product.

    Its points are the adapters ``A_l + t·left_l``, ``B_l + t·right_l``, with the pairs in
    ``directions``. The product changes by ``t · change`` to first order, and a loss ``g`` of it to
    second order by ``t² (½ ∇²g[change, change] + fall)``, where ``fall`` is negative.

    ``slope`` is ``∇g`` at the product, not 0, and ``∇²g`` is at most 1. Where the ranks
    add up to the width or more and the adapted layers are square and not singular, ``g``
    falls at least like ``−‖∇g‖₂ t²`` [thm-split]. So it does for a single layer where ``A Bᵀ`` has
    rank to spare. Where it has none, the line swaps the weakest fitted direction for the steepest:
    ``fall`` is ``−‖∇g‖₂/σ_R(A Bᵀ)``, ``change`` of norm ``√2`` [thm-landscape] [thm-below].

    Raises `InputError` for batches, adapters that do not fit the network, a slope of 0, and ranks
    and layers of which nothing is proved.
    """
    require_fit(network, adapters)
    if not slope.any():
        raise InputError("slope", allowed="other than 0, which a minimum has", given="zeros")
    layers = list(adapters.merge(network).weights)
    shape = (layers[-1].shape[0], layers[0].shape[1])
    if slope.shape != shape:
        raise InputError("slope", allowed=f"of shape {shape}", given=tuple(slope.shape))
    A, B = ([getattr(u, side) for u in adapters.updates] for side in ("left", "right"))
    deep = len(layers) > 1
    if sum(adapters.ranks) < (min(slope.shape) if deep else 1):
        allowed = "of ranks that add up to the width, or of one layer"
        raise InputError("adapters", allowed=allowed, given=adapters)
    if deep and any(int(lowrank.rank(m)) < max(m.shape) for m in layers):
        raise InputError("adapters", allowed="such that no layer is singular", given=adapters)
    # The same proof holds for the transposed product.
    turned = [m.mT for m in reversed(layers)]
    scale = float(torch.linalg.matrix_norm(slope, 2)) ** 0.5
    y, size = _flattest(layers, B, scale)
    y_turned, size_turned = _flattest(turned, A[::-1], scale)
    if not deep and min(size, size_turned) > FLAT:
        return _swap(A[0], B[0], slope)
    if size <= size_turned:
        return _grow(layers, A, B, y, slope)
    line = _grow(turned, B[::-1], A[::-1], y_turned, slope.mT)
    flipped = tuple(LowRank(d.right, d.left) for d in reversed(line.directions))
    return _Line(flipped, line.change.mT, line.fall)


@torch.no_grad()
def find_critical(
    network: Network,
    loss: Callable[[Tensor], Tensor],
    starts: Adapters,
    *,
    iterations: int = 100,
    tolerance: float = 1e-9,
) -> tuple[Adapters, Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Search for critical points, of any kind, of a loss of a network's adapted product.

    From each of a batch of ``starts`` damped Newton steps lower the norm of the loss's slope in all
    factors. ``loss`` takes the product ``[out, in]`` of the adapted layers, and is twice
    differentiable with torch. Starts from which the slope does not get below ``tolerance`` are left
    out, and biases count for nothing. Returns the points as a batch of adapters, their losses, and
    the least eigenvalues of the second derivatives in all factors.
    """
    starts.merge(network)  # refuses what does not fit
    factors = [factor for u in starts.updates for factor in (u.left, u.right)]

    def parts_of(flat: Tensor) -> list[Tensor]:
        each = flat.split([factor.shape[-2:].numel() for factor in factors], -1)
        shapes = [(*flat.shape[:-1], *factor.shape[-2:]) for factor in factors]
        return [part.reshape(shape) for part, shape in zip(each, shapes, strict=True)]

    def value(flat: Tensor) -> Tensor:
        parts = parts_of(flat)
        triples = zip(network.weights, parts[::2], parts[1::2], strict=True)
        return loss(product([W + A @ B.mT for W, A, B in triples]))

    slope_of, second = vmap(grad(value)), vmap(jacrev(grad(value)))
    at = torch.cat([factor.flatten(-2) for factor in factors], -1)
    slope = slope_of(at)
    size = slope.square().sum(-1)
    damping = torch.full_like(size, DAMPING)
    for _ in range(iterations):
        if (size <= (tolerance / 10) ** 2).all():
            break
        values, vectors = torch.linalg.eigh(second(at))
        along = (vectors.mT @ slope[..., None])[..., 0]
        step = values * along / (values.square() + damping[:, None])
        trial = at - (vectors @ step[..., None])[..., 0]
        moved = slope_of(trial)
        better = moved.square().sum(-1) < size
        at = torch.where(better[:, None], trial, at)
        slope = torch.where(better[:, None], moved, slope)
        size = slope.square().sum(-1)
        damping = (damping * torch.where(better, EASIER, HARDER)).clamp(1e-30, 1e30)
    at = at[size.sqrt() <= tolerance]
    parts = parts_of(at)
    curvatures = torch.linalg.eigvalsh(second(at))[:, 0]
    return Adapters(tuple(map(LowRank, parts[::2], parts[1::2]))), vmap(value)(at), curvatures


def _before(layers: Sequence[Tensor]) -> list[Tensor]:
    """Return the product of the layers before each one."""
    eye = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    return [*accumulate(layers[:-1], lambda product, layer: layer @ product, initial=eye)]


def _flattest(layers: Sequence[Tensor], B: Sequence[Tensor], scale: float) -> tuple[Tensor, float]:
    """Find the unit vector of which the columns ``H_lᵀ B_l`` make least, and that relative size."""
    columns = [H.mT @ b for H, b in zip(_before(layers), B, strict=True)]
    _, S, Vh = torch.linalg.svd(torch.cat(columns, 1))
    return Vh[-1], 0.0 if len(S) < len(Vh) else float(S[-1]) / max(float(S[0]), scale)


def _grow(
    layers: list[Tensor], A: list[Tensor], B: list[Tensor], y: Tensor, slope: Tensor
) -> _Line:
    """Draw the line of the proof of [thm-split]; ``y`` says which columns ``H_lᵀ B_l`` cancel."""
    before = _before(layers)
    after = [m.mT for m in reversed(_before([m.mT for m in reversed(layers)]))]
    ranks = [b.shape[1] for b in B]
    # I + T, whose block of m and l < m is B_mᵀ (product between) A_l.
    coupling = torch.eye(sum(ranks), dtype=slope.dtype, device=slope.device)
    starts = [sum(ranks[:l]) for l in range(len(ranks))]
    for l, start in enumerate(starts):
        moved = A[l]
        for m in range(l + 1, len(layers)):
            rows = slice(starts[m], starts[m] + ranks[m])
            coupling[rows, start : start + ranks[l]] = B[m].mT @ moved
            moved = layers[m] @ moved
    z = torch.linalg.solve(coupling, y)
    U, S, V = lowrank.svd(-slope)
    w, v, steepest = U[:, 0], V[:, 0], float(S[0])
    ys, zs = y.split(ranks), z.split(ranks)
    reached = sum((G @ a @ part for G, a, part in zip(after, A, zs, strict=True)), w * 0)
    change = torch.outer(reached, v)
    tau = 1 + float(change.square().sum()) / (2 * steepest)
    directions = tuple(
        LowRank(
            tau * torch.outer(torch.linalg.solve(G, w), y_l),
            torch.outer(torch.linalg.solve(H.mT, v), z_l),
        )
        for G, H, y_l, z_l in zip(after, before, ys, zs, strict=True)
    )
    return _Line(directions, change, -tau * steepest)


def _swap(A: Tensor, B: Tensor, slope: Tensor) -> _Line:
    """Draw the line of the proof of [thm-landscape] for a product of full rank."""
    U, S, V = lowrank.svd(A @ B.mT)
    weakest = A.shape[1] - 1
    u, sigma, v = U[:, weakest], float(S[weakest]), V[:, weakest]
    out, steepness, into = lowrank.svd(-slope)
    w, z = out[:, 0], into[:, 0]
    direction = LowRank(
        torch.outer(w, torch.linalg.pinv(B) @ v), torch.outer(z, torch.linalg.pinv(A) @ u)
    )
    return _Line((direction,), torch.outer(w, v) + torch.outer(u, z), -float(steepness[0]) / sigma)


def _critical(
    parts: lowrank.SVD, kept: tuple[int, ...], rank: int, count: int, back: Tensor
) -> _Critical:
    U, S, V = parts
    own, spare = [*kept], rank - len(kept)
    rest = [d for d in range(count) if d not in kept]
    A, B = (torch.nn.functional.pad(m[:, own] * S[own].sqrt(), (0, spare)) for m in (U, V))
    loss = float(S[rest].square().sum()) / 2
    point = LowRank(A, back @ B)
    # What is missing may be as large as what is kept: among equal values any are least.
    rounding = 8 * len(S) * torch.finfo(S.dtype).eps * S[0]
    if not rest or (not spare and (not own or S[rest[0]] <= S[own[-1]] + rounding)):
        return _Critical(kept, point, loss, None, 0.0)
    slope = -(U[:, rest] * S[rest]) @ V[:, rest].mT
    free = torch.eye(rank).to(A)[len(own) :]
    line = _grow([slope], [A], [B], free[0], slope) if spare else _swap(A, B, slope)
    (direction,) = line.directions
    curvature = line.fall + float(line.change.square().sum()) / 2
    return _Critical(kept, point, loss, LowRank(direction.left, back @ direction.right), curvature)
