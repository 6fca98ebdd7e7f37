"""Gradient flow of adapters: what it keeps, and the closed form of its course for one layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor

from .. import _checks
from .._subnormal import flushing
from ..adapters.core import Adapters
from ..errors import InputError, brief
from ..networks.base import Network
from .descent import Pair
from .free import Free, labelled

Rates = tuple[float, float]
# Of e, in double precision.
LARGEST_EXPONENT = 709.0


class Flow(NamedTuple):
    """A course of gradient flow.

    Attributes
    ----------
    times : Tensor
        When it was looked at, from 0 on.
    adapters : Adapters
        At each of them; as one batch.
    losses : Tensor
        Half of the mean over samples of the summed squared errors.
    """

    times: Float[Tensor, " points"]
    adapters: Adapters
    losses: Float[Tensor, " points"]


@torch.no_grad()
@flushing()
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
    """Gradient flow ``Ȧ = −η_A ∂ℓ/∂A``, ``Ḃ = −η_B ∂ℓ/∂B`` and of biases at rate 1, integrated.

    ``ℓ`` is half of the mean over samples of ``‖f(x) − y‖²``. By a Runge–Kutta method of order 8
    (scipy's DOP853), in double precision. Where a ReLU of some sample switches the slope jumps, and
    steps are short: ask for less precision there.

    Raises `InputError` for batches, adapters and samples that do not fit, and a time, rates or a
    tolerance that are not positive.

    Source: [prop-conserved] is about it.

    Parameters
    ----------
    network, adapters
        A single network, and where the flow starts.
    samples : Pair
        Inputs as the network takes them, with the outputs that are wanted.
    time : float
        How long it flows.
    rates : Rates
        ``η_A`` and ``η_B``.
    points : int
        When to look, equally spaced, both ends included.
    rtol : float
        Relative error of a step that is accepted.
    """
    _checks.kind(Network, network=network)
    _checks.kind(Adapters, adapters=adapters)
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
        return (free.merged(parts)(x) - y).square().sum() / (2 * count)

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
    _checks.kind(Adapters, adapters=adapters)
    eta_A, eta_B = _rates(rates)
    return [u.left.mT @ u.left / eta_A - u.right.mT @ u.right / eta_B for u in adapters.updates]


def learned(sigma: float, beta: float, time: float, *, rates: Rates = (1.0, 1.0)) -> float:
    """How much of a direction gradient flow has learned: ``a b`` at a time, from ``0 · β``.

    One layer, inputs of covariance ``I``, and ``B`` at the start aligned with the singular vectors
    of the error: then each singular value ``σ`` is learned on its own, as
    ``ab = (η_A/η_B)^{1/2} β² u/(1 − u²)`` with ``u = u_∞ (e^{Δt} − 1)/(e^{Δt} + u_∞²)``,
    ``Δ² = 4 η_A η_B σ² + η_A² β⁴`` and ``u_∞ = (Δ − η_A β²)/(2σ (η_A η_B)^{1/2})``. For inputs with
    ``C v = c v`` put ``c t`` for ``t``.

    Raises `InputError` for numbers that are not positive. Source: [prop-times].
    """
    sigma, beta = _checks.positive("sigma", sigma), _checks.positive("beta", beta)
    time = _checks.tolerance("time", time)
    eta_A, eta_B = _rates(rates)
    speed, last, _ = _course(sigma, beta, eta_A, eta_B)
    # 1 − u_∞², which rounds to 0 for small β, cancels with β². What is left of β is e^{−Δt}/β², by
    # logarithms, since both may vanish.
    decay = math.exp(-speed * time)
    missing = math.log(4 * last * sigma * math.sqrt(eta_B / eta_A)) - speed * time
    still = math.exp(min(missing - 2 * math.log(beta), LARGEST_EXPONENT))
    grown = -math.expm1(-speed * time) * (1 + last**2 * decay)
    return sigma * grown / (1 - (last * decay) ** 2 + still)


def time_to(sigma: float, beta: float, part: float, *, rates: Rates = (1.0, 1.0)) -> float:
    """When gradient flow has learned a part of a direction: `learned` is ``part · σ`` then.

    ``t = Δ⁻¹ ln[u_∞ (1 + u u_∞)/(u_∞ − u)]`` with `learned`'s letters.

    Raises `InputError` for a part outside ``(0, 1)`` and numbers that are not positive. Source:
    [prop-times].
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
        raise InputError("rates", allowed="two numbers, of A and of B", given=brief(rates))
    return _checks.positive("rates", rates[0]), _checks.positive("rates", rates[1])
