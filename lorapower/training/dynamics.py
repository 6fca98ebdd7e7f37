"""Gradient flow of one adapted linear layer in closed form."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..lowrank import LowRank

# What is so much smaller than the initialization counts as 0.
NEGLIGIBLE = 1e-12


@torch.no_grad()
def flow(
    error: Float[Tensor, "out in"],
    right: Float[Tensor, "in rank"],
    times: Float[Tensor, " times"],
    *,
    rates: tuple[float, float] = (1.0, 1.0),
) -> LowRank:
    """Follow gradient flow of one layer from ``A = 0`` and ``B₀`` in closed form, at given times.

    The loss is ``½ ‖E − A Bᵀ‖²_F`` and ``right`` is ``B₀``, whose columns are orthogonal and of one
    length ``β``, along the singular vectors of ``E`` or not. The factors are those of the flow but
    for a rotation of their columns, so that ``A Bᵀ``, ``A Aᵀ`` and ``B Bᵀ`` are the flow's. The
    method keeps its precision for all times and lengths.

    Raises `InputError` for other columns. Source: [thm-flow].
    """
    E, B = error.to(torch.float64), right.to(torch.float64)
    gram = B.mT @ B
    length = math.sqrt(float(gram.diagonal().mean()))
    if not (gram / gram.diagonal().mean() - torch.eye(len(gram)).to(B)).abs().max() <= 1e-8:
        raise InputError("right", allowed="of orthogonal columns of one length", given="others")
    # At rates 1 the same flow has √η_B A and √η_A B, and √(η_A η_B) E.
    root_A, root_B = (math.sqrt(rate) for rate in rates)
    beta = root_A * length
    values, left, into = _eigenvectors(root_A * root_B * E, beta**2 / 2)
    echelon, pivots = _echelon(into.mT @ B * root_A)
    t = times.to(values)[:, None]
    fading, growing = -2 * values.abs() * t, values.clamp(min=0) * t
    # Squared, what the integral of e^{2λs} and the start come to, over e^{2λt} if λ > 0.
    size = torch.exp(-2 * growing) / beta**2 + torch.expm1(fading) / (-2 * values.abs())
    logs = growing + size.log() / 2
    # No exponent is positive where the echelon form is not 0.
    scaled = echelon * torch.exp((logs[:, :, None] - logs[:, None, pivots]).clamp(max=0))
    basis, _ = torch.linalg.qr(scaled)
    S = (values.clamp(max=0) * t - size.log() / 2).exp()[..., None] * basis
    return LowRank(left @ S / root_B, into @ S / root_A)


def _eigenvectors(E: Tensor, half: float) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonalize ``((−h I, E), (Eᵀ, h I))`` but for eigenvectors that have no part for ``B``.

    Returns the eigenvalues, largest first, and the parts of their eigenvectors for ``A`` and ``B``.
    """
    U, sigma, Vh = torch.linalg.svd(E)
    least, into = len(sigma), E.shape[1]
    sigma = torch.cat([sigma, sigma.new_zeros(into - least)])
    values = torch.hypot(sigma, sigma.new_tensor(half))
    length = torch.hypot(sigma, values + half)
    cos, sin = sigma / length, (values + half) / length
    # Eigenvectors (cos u_d; sin v_d) of λ_d, then (−sin u_d; cos v_d) of −λ_d, least λ_d first.
    back = torch.arange(least - 1, -1, -1)
    ahead = torch.cat([U[:, :least] * cos[:least], U.new_zeros(len(U), into - least)], 1)
    left = torch.cat([ahead, -U[:, back] * sin[back]], 1)
    right = torch.cat([Vh.mT * sin, Vh.mT[:, back] * cos[back]], 1)
    return torch.cat([values, -values[back]]), left, right


def _echelon(rows: Tensor) -> tuple[Tensor, list[int]]:
    """Rotate columns so that column ``j`` is 0 before row ``pivots[j]``."""
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
    return found, pivots
