"""Gradient flow: its course, what it keeps, where it ends, and how long it takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from ._free import Free, Pair, labelled, require_fit

Rates = tuple[float, float]
# Of the exponential, in double precision.
LARGEST_EXPONENT = 709.0
# What is so much smaller than the start counts as 0.
NEGLIGIBLE = 1e-12


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


class Limit(NamedTuple):
    """Where gradient flow from LoRA's start ends, and how fast.

    ``product`` is ``Σ σ_d u_d v_dᵀ`` over the singular triplets ``kept`` of the error, counted from
    0; ``A Bᵀ`` comes near it like ``e^{−rate·t}``.
    """

    kept: tuple[int, ...]
    product: Float[Tensor, "out in"]
    rate: float


@torch.no_grad()
def course(
    error: Float[Tensor, "out in"],
    right: Float[Tensor, "in rank"],
    times: Float[Tensor, " times"],
    *,
    rates: Rates = (1.0, 1.0),
) -> LowRank:
    """Gradient flow of one layer from ``A = 0`` and ``B₀`` in closed form: a batch, one of a time.

    The loss is ``½ ‖E − A Bᵀ‖²_F`` and ``right`` is ``B₀``, whose columns are orthogonal and of one
    length ``β``, along the singular vectors of ``E`` or not. The factors are those of the flow but
    for a rotation of their columns, so that ``A Bᵀ``, ``A Aᵀ`` and ``B Bᵀ`` are the flow's. The
    method keeps its precision for all times and lengths.

    Raises `InputError` for other columns, and for times that are negative. Source: [thm-flow].
    """
    start = _start(error, right, rates)
    times = _checks.real_tensor("times", times, min_dims=1).to(start.eigenvalues)
    if (times < 0).any():
        raise InputError("times", allowed="not negative", given=f"{float(times.min()):.3g}")
    values, t = start.eigenvalues, times[:, None]
    fading, growing = -2 * values.abs() * t, values.clamp(min=0) * t
    # Squared, what the integral of e^{2λs} and the start come to, over e^{2λt} if λ > 0.
    size = torch.exp(-2 * growing) / start.beta**2 + torch.expm1(fading) / (-2 * values.abs())
    logs = growing + size.log() / 2
    first = logs[:, start.pivots]
    # No exponent is positive where the echelon form is not 0.
    scaled = start.echelon * torch.exp((logs[:, :, None] - first[:, None, :]).clamp(max=0))
    basis, _ = torch.linalg.qr(scaled)
    S = (values.clamp(max=0) * t - size.log() / 2).exp()[..., None] * basis
    eta_A, eta_B = _rates(rates)
    return LowRank(start.left @ S / math.sqrt(eta_B), start.right @ S / math.sqrt(eta_A))


@torch.no_grad()
def limit(
    error: Float[Tensor, "out in"],
    right: Float[Tensor, "in rank"],
    *,
    rates: Rates = (1.0, 1.0),
) -> Limit:
    """Where the flow of `course` ends: at the best product of the rank, for almost every start.

    ``kept`` are the ``d`` for which ``v_dᵀ B₀`` is no combination of the earlier ones. Raises
    `InputError` as `course` does. Source: [thm-flow].
    """
    start = _start(error, right, rates)
    # Rows of the directions of E, largest first, come before all others.
    U, S, Vh = torch.linalg.svd(error.to(start.eigenvalues), full_matrices=False)
    count = int((S > S[0] * NEGLIGIBLE).sum())
    kept = tuple(p for p in start.pivots if p < count)
    values = start.eigenvalues
    speeds = [2 * values[p] for p in kept]
    for column, p in enumerate(start.pivots):
        met = (start.echelon[:, column].abs() > NEGLIGIBLE * start.beta) & (values < values[p])
        met[list(start.pivots)] = False
        if p >= count:
            # Among directions that E does not have nothing is learned.
            met[count : len(right)] = False
        speeds += [values[p] - value for value in values[met]]
    product = (U[:, list(kept)] * S[list(kept)]) @ Vh[list(kept)]
    return Limit(kept, product, float(min(speeds, default=torch.tensor(math.inf))))


class _Start(NamedTuple):
    """LoRA's start in the eigenvectors of the flow, largest eigenvalue ``λ`` first.

    ``left`` and ``right`` are the eigenvectors' parts for ``A`` and ``B``. ``echelon`` are the
    start's coordinates after a rotation of columns: column ``j`` is 0 before row ``pivots[j]``.
    """

    eigenvalues: Tensor
    left: Tensor
    right: Tensor
    echelon: Tensor
    pivots: tuple[int, ...]
    beta: float


def _start(error: Tensor, right: Tensor, rates: Rates) -> _Start:
    E, B = (
        _checks.real_tensor(name, value, min_dims=2).to(torch.float64)
        for name, value in (("error", error), ("right", right))
    )
    if E.ndim != 2:
        raise InputError("error", allowed="a single matrix", given=f"shape {tuple(E.shape)}")
    rank = B.shape[-1]
    if B.shape != (E.shape[1], rank) or not 0 < rank <= E.shape[1]:
        allowed = f"of {E.shape[1]} rows and at least a column, but no more columns than rows"
        raise InputError("right", allowed=allowed, given=f"shape {tuple(B.shape)}")
    gram = B.mT @ B
    square = float(gram.diagonal().mean())
    eye = torch.eye(rank, dtype=B.dtype, device=B.device)
    if not 0 < square or (gram / square - eye).abs().max() > 1e-8:
        raise InputError("right", allowed="of orthogonal columns of one length", given="others")
    eta_A, eta_B = _rates(rates)
    # At rates 1 the same flow has √η_B A and √η_A B, and √(η_A η_B) E.
    beta = math.sqrt(eta_A * square)
    U, sigma, Vh = torch.linalg.svd(E * math.sqrt(eta_A * eta_B))
    least, into, b = len(sigma), E.shape[1], beta**2 / 2
    sigma = torch.cat([sigma, sigma.new_zeros(into - least)])
    values = torch.hypot(sigma, sigma.new_tensor(b))
    to_A, to_B = sigma, values + b
    length = torch.hypot(to_A, to_B)
    cos, sin = to_A / length, to_B / length
    # Eigenvectors (cos u_d; sin v_d) of λ_d, then (−sin u_d; cos v_d) of −λ_d, least λ_d first.
    # Those of A alone have no part in the start.
    back = torch.arange(least - 1, -1, -1)
    left = torch.cat([U[:, :least] * cos[:least], U.new_zeros(len(U), into - least)], 1)
    left = torch.cat([left, -U[:, back] * sin[back]], 1)
    turned = torch.cat([Vh.mT * sin, Vh.mT[:, back] * cos[back]], 1)
    echelon, pivots = _echelon(turned.mT @ B * math.sqrt(eta_A))
    return _Start(torch.cat([values, -values[back]]), left, turned, echelon, pivots, beta)


def _echelon(rows: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A matrix after the rotation of its columns that makes its first rows triangular."""
    axes: list[Tensor] = []
    pivots: list[int] = []
    for index, row in enumerate(rows):
        if len(axes) == rows.shape[1]:
            break
        rest = row
        for _ in range(2):
            rest = rest - sum((axis * (axis @ rest) for axis in axes), torch.zeros_like(rest))
        norm = torch.linalg.vector_norm(rest)
        if norm > NEGLIGIBLE * torch.linalg.matrix_norm(rows, 2):
            axes.append(rest / norm)
            pivots.append(index)
    found = rows @ torch.stack(axes, 1)
    for column, pivot in enumerate(pivots):
        found[:pivot, column] = 0
    return found, tuple(pivots)


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
    speed, last, _ = _constants(sigma, beta, eta_A, eta_B)
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
    speed, last, size = _constants(sigma, beta, eta_A, eta_B)
    here, end = math.hypot(size, 2 * part * sigma), math.hypot(size, 2 * sigma)
    u = 2 * part * sigma / (size + here)
    # u_∞ − u = (η_A/η_B)^{1/2} β² (u/part − u_∞)/(σ (u_∞ + u)), where nothing cancels.
    apart = 8 * sigma**2 * (1 - part) * (1 + part) / ((size + here) * (size + end) * (here + end))
    ratio = last * (1 + u * last) * (last + u) / apart
    return (math.log(ratio * math.sqrt(eta_B / eta_A)) - 2 * math.log(beta)) / speed


def _constants(sigma: float, beta: float, eta_A: float, eta_B: float) -> tuple[float, float, float]:
    """``Δ``, ``u_∞`` and ``(η_A/η_B)^{1/2} β²``."""
    both = 2 * sigma * math.sqrt(eta_A * eta_B)
    speed = math.hypot(both, eta_A * beta**2)
    return speed, both / (speed + eta_A * beta**2), math.sqrt(eta_A / eta_B) * beta**2


def _rates(rates: Rates) -> Rates:
    if not isinstance(rates, tuple | list) or len(rates) != 2:
        raise InputError("rates", allowed="two numbers, of A and of B", value=rates)
    return _checks.positive("rates", rates[0]), _checks.positive("rates", rates[1])
