"""Critical points of one adapted layer's loss; gradient flow: its course, invariants, duration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

from .. import _checks, lowrank
from ..adapters.core import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from ._free import Free, Pair, labelled, require_fit

Rates = tuple[float, float]
# Of the exponential, in double precision.
LARGEST_EXPONENT = 709.0


class Critical(NamedTuple):
    """A critical point of ``½ ‖(E − A Bᵀ) C^{1/2}‖²_F``.

    ``point`` holds ``A`` and ``B``, made of the singular triplets ``kept`` (counted from 0) of
    ``E C^{1/2}``; ``loss`` is ``½ Σ σ_d²`` over the others. Going ``t`` times ``direction``, which
    lowers the loss at a saddle, adds ``curvature · t²`` to it; a minimum has ``None`` and 0.
    """

    kept: tuple[int, ...]
    point: LowRank
    loss: float
    direction: LowRank | None
    curvature: float


@torch.no_grad()
def critical_points(
    error: Float[Tensor, "out in"],
    rank: int,
    *,
    covariance: Float[Tensor, "in in"] | None = None,
) -> Iterator[Critical]:
    """Critical points of one layer's loss over adapters of a rank, one of each kind.

    ``error`` is ``E``, the product that the factors should have, and ``covariance`` is ``C``, by
    default the identity. If the singular values of ``E C^{1/2}`` are distinct, each set of at most
    ``rank`` nonzero ones gives a kind, whose points share product and loss; equal values give
    further points with the same losses. All are minima or strict saddles [thm-landscape]. Raises
    `InputError` for a rank out of range and a covariance that is not positive definite.
    """
    E = _checks.real_tensor("error", error, min_dims=2)
    if E.ndim != 2:
        raise InputError("error", allowed="a single matrix", given=f"shape {tuple(E.shape)}")
    rank = _checks.integer("rank", rank, 0, min(E.shape), limit="the smaller side")
    root = torch.eye(E.shape[1], dtype=E.dtype, device=E.device)
    if covariance is not None:
        C = _checks.real_tensor("covariance", covariance, min_dims=2).to(E)
        if C.shape != root.shape or not torch.allclose(C, C.mT):
            allowed = f"a symmetric matrix of {E.shape[1]} rows"
            raise InputError("covariance", allowed=allowed, given=f"shape {tuple(C.shape)}")
        values, vectors = torch.linalg.eigh(C)
        if values.min() <= 0:
            allowed = "positive definite"
            raise InputError("covariance", allowed=allowed, given=f"eigenvalue {values.min():.3g}")
        root = (vectors * values.sqrt()) @ vectors.mT
    U, S, V = lowrank.svd(E @ root)
    count = int(lowrank.rank(E @ root))
    back = torch.linalg.inv(root)
    for size in range(min(rank, count) + 1):
        for kept in combinations(range(count), size):
            yield _critical(U, S, V, kept, rank, count, back)


class Flow(NamedTuple):
    """A course of gradient flow: the adapters at each time, as one batch, and the loss ``ℓ``."""

    times: Float[Tensor, " points"]
    adapters: Adapters
    losses: Float[Tensor, " points"]


@torch.no_grad()
@_checks.flushing()
def flow(
    network: Network,
    adapters: Adapters,
    samples: Pair,
    time: float,
    *,
    rates: Rates = (1.0, 1.0),
    points: int = 50,
    rtol: float = 1e-9,
) -> Flow:
    """Integrate gradient flow ``Ȧ = −η_A ∂ℓ/∂A``, ``Ḃ = −η_B ∂ℓ/∂B``, and of biases at rate 1.

    ``ℓ`` is half of the mean of ``‖f(x) − y‖²`` over ``samples``, inputs of the network and the
    outputs that it should give; ``rates`` are ``η_A`` and ``η_B``. The method is Runge–Kutta of
    order 8 (scipy's DOP853), in double precision, with relative error ``rtol`` of a step. Where a
    sample switches a ReLU the slope jumps and steps are short: ask for less precision there. The
    course has ``points`` equally spaced times, both ends included; [prop-conserved] is about it.

    Raises `InputError` for batches, for adapters and samples that do not fit, and for a time, rates
    or a tolerance that are not positive.
    """
    require_fit(network, adapters)
    time, rtol = _checks.positive("time", time), _checks.positive("rtol", rtol)
    eta_A, eta_B = _rates(rates)
    points = _checks.integer("points", points, 2)
    double = network.to(torch.float64)
    free = Free.of(double, adapters.to(torch.float64))
    x, y = labelled(double, "samples", samples)
    count = x.shape[0] if network.sequences else x.shape[-1]
    weights = len(network.weights)
    rate_of = [eta_A, eta_B] * weights + [1.0] * (len(free.start) - 2 * weights)

    def loss(parts: list[Tensor]) -> Tensor:
        return (free.merge(parts)(x) - y).square().sum() / (2 * count)

    def velocity(_: float, values: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            parts = [part.requires_grad_() for part in _apart(free, values)]
            slopes = torch.autograd.grad(loss(parts), parts, allow_unused=True)
        moved = [
            torch.zeros_like(part) if slope is None or not moves else -rate * slope
            for part, slope, moves, rate in zip(parts, slopes, free.moves, rate_of, strict=True)
        ]
        return torch.cat([part.flatten() for part in moved]).numpy()

    first = torch.cat([part.flatten() for part in free.start]).numpy()
    times = np.linspace(0.0, time, points)
    scale = max(1.0, float(np.abs(first).max(initial=0)))
    course = solve_ivp(
        velocity,
        (0.0, time),
        first,
        method="DOP853",
        t_eval=times,
        rtol=rtol,
        atol=rtol * scale * 1e-2,
    )
    if not course.success:
        raise InputError("time", allowed="one up to which the flow exists", given=time)
    each = [_apart(free, values) for values in course.y.T]
    stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    return Flow(
        torch.from_numpy(times),
        free.adapters_of(stacked),
        torch.stack([loss(parts) for parts in each]),
    )


def _apart(free: Free, values: np.ndarray) -> list[Tensor]:
    sizes = [part.numel() for part in free.start]
    parts = torch.from_numpy(values.copy()).split(sizes)
    return [part.reshape(like.shape) for part, like in zip(parts, free.start, strict=True)]


def conserved(
    adapters: Adapters, *, rates: Rates = (1.0, 1.0)
) -> list[Float[Tensor, "*batch rank rank"]]:
    """``AᵀA / η_A − BᵀB / η_B`` of each weight's adapter: what gradient flow never changes.

    Raises `InputError` for rates that are not positive. Source: [prop-conserved].
    """
    eta_A, eta_B = _rates(rates)
    return [u.left.mT @ u.left / eta_A - u.right.mT @ u.right / eta_B for u in adapters.updates]


def learned(sigma: float, beta: float, time: float, *, rates: Rates = (1.0, 1.0)) -> float:
    """What gradient flow has learned of a direction: ``a b`` at a time, from ``0 · β``.

    For one layer, inputs of covariance ``I``, and a ``B`` that starts aligned with the singular
    vectors of the error, each singular value ``σ`` is learned on its own:
    ``ab = (η_A/η_B)^{1/2} β² u/(1 − u²)`` with ``u = u_∞ (e^{Δt} − 1)/(e^{Δt} + u_∞²)``,
    ``Δ² = 4 η_A η_B σ² + η_A² β⁴`` and ``u_∞ = (Δ − η_A β²)/(2σ (η_A η_B)^{1/2})``. For inputs with
    ``C v = c v`` put ``c t`` for ``t``.

    Raises `InputError` for numbers that are not positive. Source: [prop-times].
    """
    sigma, beta = _checks.positive("sigma", sigma), _checks.positive("beta", beta)
    time = _checks.tolerance("time", time)
    eta_A, eta_B = _rates(rates)
    speed, last, _ = _course(sigma, beta, eta_A, eta_B)
    # 1 − u_∞² rounds to 0 for small β, but cancels with β². Of β only e^{−Δt}/β² is left, taken by
    # logarithms, since both may vanish.
    decay = math.exp(-speed * time)
    missing = math.log(4 * last * sigma * math.sqrt(eta_B / eta_A)) - speed * time
    still = math.exp(min(missing - 2 * math.log(beta), LARGEST_EXPONENT))
    grown = -math.expm1(-speed * time) * (1 + last**2 * decay)
    return sigma * grown / (1 - (last * decay) ** 2 + still)


def time_to(sigma: float, beta: float, part: float, *, rates: Rates = (1.0, 1.0)) -> float:
    """When gradient flow has learned a part of a direction, so that `learned` is ``part · σ``.

    ``t = Δ⁻¹ ln[u_∞ (1 + u u_∞)/(u_∞ − u)]``, with the letters of `learned`. Raises `InputError`
    for a part outside ``(0, 1)`` and numbers that are not positive. Source: [prop-times].
    """
    sigma, beta = _checks.positive("sigma", sigma), _checks.positive("beta", beta)
    part = _checks.positive("part", part)
    if part >= 1:
        raise InputError("part", allowed="below 1, which is never reached", given=part)
    eta_A, eta_B = _rates(rates)
    speed, last, size = _course(sigma, beta, eta_A, eta_B)
    here, end = math.hypot(size, 2 * part * sigma), math.hypot(size, 2 * sigma)
    u = 2 * part * sigma / (size + here)
    # u_∞ − u = (η_A/η_B)^{1/2} β² (u/part − u_∞)/(σ (u_∞ + u)), where nothing cancels.
    apart = 8 * sigma**2 * (1 - part) * (1 + part) / ((size + here) * (size + end) * (here + end))
    ratio = last * (1 + u * last) * (last + u) / apart
    return (math.log(ratio * math.sqrt(eta_B / eta_A)) - 2 * math.log(beta)) / speed


def _course(sigma: float, beta: float, eta_A: float, eta_B: float) -> tuple[float, float, float]:
    """``Δ``, ``u_∞`` and ``(η_A/η_B)^{1/2} β²``."""
    both = 2 * sigma * math.sqrt(eta_A * eta_B)
    speed = math.hypot(both, eta_A * beta**2)
    return speed, both / (speed + eta_A * beta**2), math.sqrt(eta_A / eta_B) * beta**2


def _rates(rates: Rates) -> Rates:
    if not isinstance(rates, tuple | list) or len(rates) != 2:
        raise InputError("rates", allowed="two numbers, of A and of B", value=rates)
    return _checks.positive("rates", rates[0]), _checks.positive("rates", rates[1])


def _no_less(S: Tensor, own: Sequence[int], missing: int) -> bool:
    """Whether what is missing is no larger than anything that is kept, but for rounding."""
    eps = torch.finfo(S.dtype).eps
    return not own or bool(S[missing] <= S[own[-1]] + 8 * len(S) * eps * S[0])


def _critical(
    U: Tensor, S: Tensor, V: Tensor, kept: tuple[int, ...], rank: int, count: int, back: Tensor
) -> Critical:
    own = [*kept]
    rest = [d for d in range(count) if d not in kept]
    roots = S[own].sqrt()
    A, B = U.new_zeros(len(U), rank), V.new_zeros(len(V), rank)
    A[:, : len(own)], B[:, : len(own)] = U[:, own] * roots, V[:, own] * roots
    loss = float(S[rest].square().sum()) / 2
    point = LowRank(A, back @ B)
    # The largest missing value, and the smallest one kept in its place.
    missing = rest[0] if rest else None
    to_A, to_B = torch.zeros_like(A), torch.zeros_like(B)
    # Among equal values any may be kept.
    least = missing is None or (len(own) == rank and _no_less(S, own, missing))
    if missing is None or least:
        return Critical(kept, point, loss, None, 0.0)
    if len(own) < rank:
        # A free column: growing it in both factors costs nothing to first order.
        to_A[:, len(own)], to_B[:, len(own)] = U[:, missing], V[:, missing]
        curvature = -float(S[missing])
    else:
        last = len(own) - 1
        to_A[:, last], to_B[:, last] = U[:, missing] / roots[-1], V[:, missing] / roots[-1]
        curvature = 1 - float(S[missing] / S[own[-1]])
    return Critical(kept, point, loss, LowRank(to_A, back @ to_B), curvature)
