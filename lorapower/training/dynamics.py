"""Gradient flow of one layer in closed form: its course, and where it ends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..lowrank import LowRank

Rates = tuple[float, float]
# What is so much smaller than the start counts as 0.
NEGLIGIBLE = 1e-12


@torch.no_grad()
def course(
    error: Float[Tensor, "out in"],
    right: Float[Tensor, "in rank"],
    times: Float[Tensor, " times"],
    *,
    rates: Rates = (1.0, 1.0),
) -> LowRank:
    """Follow gradient flow of one layer from ``A = 0`` and ``B₀`` in closed form, at given times.

    The loss is ``½ ‖E − A Bᵀ‖²_F`` and ``right`` is ``B₀``, whose columns are orthogonal and of one
    length ``β``, along the singular vectors of ``E`` or not. The factors are those of the flow but
    for a rotation of their columns, so that ``A Bᵀ``, ``A Aᵀ`` and ``B Bᵀ`` are the flow's. The
    method keeps its precision for all times and lengths.

    Raises `InputError` for other columns. Source: [thm-flow].
    """
    start = _start(error, right, rates)
    values, t = start.eigenvalues, times.to(start.eigenvalues)[:, None]
    fading, growing = -2 * values.abs() * t, values.clamp(min=0) * t
    # Squared, what the integral of e^{2λs} and the start come to, over e^{2λt} if λ > 0.
    size = torch.exp(-2 * growing) / start.beta**2 + torch.expm1(fading) / (-2 * values.abs())
    logs = growing + size.log() / 2
    first = logs[:, start.pivots]
    # No exponent is positive where the echelon form is not 0.
    scaled = start.echelon * torch.exp((logs[:, :, None] - first[:, None, :]).clamp(max=0))
    basis, _ = torch.linalg.qr(scaled)
    S = (values.clamp(max=0) * t - size.log() / 2).exp()[..., None] * basis
    eta_A, eta_B = rates
    return LowRank(start.left @ S / math.sqrt(eta_B), start.right @ S / math.sqrt(eta_A))


@torch.no_grad()
def limit(
    error: Float[Tensor, "out in"],
    right: Float[Tensor, "in rank"],
    *,
    rates: Rates = (1.0, 1.0),
) -> tuple[tuple[int, ...], Float[Tensor, "out in"], float]:
    """Say where the flow of `course` ends: for almost every start at the best product of the rank.

    Returns the singular triplets ``d`` of the error that are learned, counted from 0: those for
    which ``v_dᵀ B₀`` is no combination of the earlier ones; their ``Σ σ_d u_d v_dᵀ``; and the rate:
    ``A Bᵀ`` comes near that product like ``e^{−rate·t}``. Raises `InputError` as `course` does.
    Source: [thm-flow].
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
    return kept, product, float(min(speeds, default=torch.tensor(math.inf)))


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
    E, B = error.to(torch.float64), right.to(torch.float64)
    rank = B.shape[-1]
    if B.shape != (E.shape[1], rank) or not 0 < rank <= E.shape[1]:
        allowed = f"of {E.shape[1]} rows and at least a column, but no more columns than rows"
        raise InputError("right", allowed=allowed, given=f"shape {tuple(B.shape)}")
    gram = B.mT @ B
    square = float(gram.diagonal().mean())
    eye = torch.eye(rank, dtype=B.dtype, device=B.device)
    if not 0 < square or (gram / square - eye).abs().max() > 1e-8:
        raise InputError("right", allowed="of orthogonal columns of one length", given="others")
    eta_A, eta_B = rates
    # At rates 1 the same flow has √η_B A and √η_A B, and √(η_A η_B) E.
    beta = math.sqrt(eta_A * square)
    U, sigma, Vh = torch.linalg.svd(E * math.sqrt(eta_A * eta_B))
    least, into, b = len(sigma), E.shape[1], beta**2 / 2
    sigma = torch.cat([sigma, sigma.new_zeros(into - least)])
    values = torch.hypot(sigma, sigma.new_tensor(b))
    length = torch.hypot(sigma, values + b)
    cos, sin = sigma / length, (values + b) / length
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
