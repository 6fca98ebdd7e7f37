"""Least squares of limited rank: the best map between data, and the best for a matrix.

Samples are columns; leading batch dimensions broadcast. No second moment is inverted, so data may
be few or degenerate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks, lowrank
from .errors import InputError
from .lowrank import LowRank


class Regression(NamedTuple):
    """Hold the map ``z ↦ K z + a`` of a fit: ``update`` is ``K``, and ``intercept`` is ``a``.

    ``K`` has the given rank, or as many columns as the metric has rows.
    """

    update: LowRank
    intercept: Float[Tensor, "*batch out"]


@torch.no_grad()
def reduced_rank(
    outputs: Float[Tensor, "*#batch out samples"],
    inputs: Float[Tensor, "*#batch in samples"],
    rank: int,
    *,
    towards: Float[Tensor, "*#batch out in"] | None = None,
    shrinkage: float = 0.0,
    metric: Float[Tensor, "*#batch rows out"] | None = None,
    intercept: bool = True,
) -> Regression:
    """Fit outputs ``y`` by ``K z + a`` with a matrix ``K`` of limited rank [thm-reduced-rank].

    ``K`` and ``a`` minimize ``E‖R(y − K z − a)‖² + λ c ‖R(K − E)‖²_F``, where ``c`` is the mean
    variance of a coordinate of ``z``: ``K = R⁺ U_r U_rᵀ R B`` with the coefficients ``B`` of the
    fit of any rank and the leading left singular vectors ``U_r`` of ``R B C^{1/2}``, ``C`` the
    covariance of ``z``. ``towards`` is ``E``, 0 by default, to which ``B`` is the nearest where
    data leave it open; ``shrinkage`` is ``λ``, with ``B = E`` for an infinite one; ``metric`` is
    ``R``, by default the identity. Without ``intercept``, ``a = 0`` and second moments replace
    covariances.

    Examples
    --------
    >>> import torch
    >>> from lorapower.regression import reduced_rank
    >>> z = torch.randn(3, 50, dtype=torch.float64)
    >>> y = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)) @ z + 5
    >>> fit = reduced_rank(y, z, rank=2)
    >>> torch.allclose(fit.update.matrix() @ z + fit.intercept[:, None], y)
    True
    """
    y = _checks.real_tensor("outputs", outputs, min_dims=2)
    z = _checks.real_tensor("inputs", inputs, min_dims=2)
    out, into = y.shape[-2], z.shape[-2]
    rank = _checks.integer("rank", rank, 0, min(out, into), limit="the smaller side")
    shrinkage = _checks.number("shrinkage", shrinkage, 0, torch.inf)
    E = z.new_zeros(out, into) if towards is None else towards
    parts = [y, z, E] if metric is None else [y, z, E, metric]
    batch = _checks.common_shape("outputs and inputs", [tuple(p.shape[:-2]) for p in parts])
    y, z, E = (part.expand(*batch, *part.shape[-2:]) for part in (y, z, E))
    mean_y, mean_z = (part.mean(-1, keepdim=True) for part in (y, z))
    if not intercept:
        mean_y, mean_z = torch.zeros_like(mean_y), torch.zeros_like(mean_z)
    y, z = y - mean_y, z - mean_z
    B, root = _coefficients(y - E @ z, z, shrinkage)
    update = truncate(E + B, rank, inputs=root, metric=metric)
    return Regression(update, (mean_y - update.matrix() @ mean_z)[..., 0])


def _coefficients(y: Tensor, z: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Regress ``y`` on ``z``, shrinking to 0; also returns a square root of ``z zᵀ``."""
    into, samples = z.shape[-2:]
    eps = torch.finfo(z.dtype).eps
    identity = torch.eye(into, dtype=z.dtype, device=z.device).expand(*z.shape[:-2], into, into)
    if shrinkage < torch.inf:
        variation = z.square().sum((-2, -1), keepdim=True) / into
        # Without variation only the second term is left, whatever its weight.
        penalty = shrinkage * torch.where(variation > 0, variation, 1) * identity
        if shrinkage > into * eps**0.5:
            root = torch.linalg.cholesky(z @ z.mT + penalty)
            return torch.cholesky_solve(z @ y.mT, root).mT, root
        y, z = torch.nn.functional.pad(y, (0, into)), torch.cat([z, penalty.sqrt()], -1)
    triangle = torch.linalg.qr(torch.cat([z, y], -2).mT, mode="r").R
    root, right = triangle[..., :into, :into], triangle[..., :into, into:]
    if shrinkage < torch.inf:
        # A driver for inputs that do not span their space.
        rcond = eps * max(into, samples)
        B = torch.linalg.lstsq(root, right, rcond=rcond, driver="gelsd").solution.mT
    else:
        B = z.new_zeros(*z.shape[:-2], y.shape[-2], into)
    # A trace of every direction decides where the data say nothing.
    size = z.square().sum((-2, -1), keepdim=True) / into
    trace = 16 * eps * torch.where(size > 0, size, 1).sqrt() * identity
    return B, torch.linalg.qr(torch.cat([root, trace], -2), mode="r").R.mT


def truncate(
    matrix: Float[Tensor, "*#batch out in"],
    rank: int,
    *,
    inputs: Float[Tensor, "*#batch in samples"] | None = None,
    metric: Float[Tensor, "*#batch rows out"] | None = None,
) -> LowRank:
    """Find the matrix of rank at most ``r`` that is nearest in metrics of inputs and outputs.

    ``K = R⁺ U_r U_rᵀ R M`` minimizes ``‖R (M − K) Z‖_F``; ``U_r`` are the leading left singular
    vectors of ``R M Z``. The first ``s`` columns of its factors are the nearest matrix of rank
    ``s``. ``M`` is the ``matrix``, ``r`` at most its smaller side; ``Z`` are ``inputs``, or other
    columns of the same second moment, and ``R`` is the ``metric`` (see `second_moment_root`), both
    by default identities. Source: [prop-two-metrics].

    Examples
    --------
    >>> import torch
    >>> from lorapower.regression import truncate
    >>> M, seldom = torch.diag(torch.tensor([3.0, 2.0])), torch.diag(torch.tensor([0.1, 1.0]))
    >>> truncate(M, 1).matrix(), truncate(M, 1, inputs=seldom).matrix()
    (tensor([[3., 0.],
            [0., 0.]]), tensor([[0., 0.],
            [0., 2.]]))
    """
    M = _checks.real_tensor("matrix", matrix, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(M.shape[-2:]), limit="the smaller side")
    weighted = M if metric is None else metric @ M
    product = weighted
    if inputs is not None:
        wide = inputs.shape[-1] > inputs.shape[-2]
        product = weighted @ (torch.linalg.qr(inputs.mT, mode="r").R.mT if wide else inputs)
    U = lowrank.svd(product).U[..., :rank]
    return LowRank(U if metric is None else _apply_inverse(metric, U), weighted.mT @ U)


def _apply_inverse(metric: Tensor, columns: Tensor) -> Tensor:
    """Compute ``R⁺ U``, by substitution where ``R`` is triangular and far from singular."""
    if metric.shape[-2] == metric.shape[-1] and metric.equal(metric.triu()):
        least, largest = metric.diagonal(dim1=-2, dim2=-1).abs().aminmax(dim=-1)
        if (least > torch.finfo(metric.dtype).eps ** 0.5 * largest).all():
            return torch.linalg.solve_triangular(metric, columns, upper=True)
    return torch.linalg.pinv(metric) @ columns


def second_moment_root(
    columns: Float[Tensor, "*batch width samples"], ridge: float = 0.0
) -> Float[Tensor, "*batch width width"]:
    """Find ``R``, upper triangular, with ``RᵀR = E[g gᵀ] + ρ c I`` for columns ``g``.

    ``c`` is the mean square of an entry and ``ρ ≥ 0`` the ridge. For columns that are all 0 ``R``
    is the identity: no direction counts more than another.
    """
    g = _checks.real_tensor("columns", columns, min_dims=2)
    ridge = _checks.number("ridge", ridge, 0)
    width, samples = g.shape[-2:]
    identity = torch.eye(width, dtype=g.dtype, device=g.device).expand(*g.shape[:-2], -1, -1)
    level = g.square().mean((-2, -1), keepdim=True)
    if ridge > 10 * width * torch.finfo(g.dtype).eps:
        # Far enough from singular to take the moments themselves.
        added = torch.where(level > 0, ridge * level, 1) * identity
        return torch.linalg.cholesky(g @ g.mT / samples + added, upper=True)
    rows = torch.cat([g / samples**0.5, (ridge * level).sqrt() * identity], -1).mT
    return torch.where(level > 0, torch.linalg.qr(rows, mode="r").R, identity)


def variance(outputs: Float[Tensor, "*samples out n"]) -> Float[Tensor, ""]:
    """Average the variance over samples and tokens of all outputs; `InputError` if not finite."""
    y = _checks.real_tensor("outputs", outputs, min_dims=2)
    return y.movedim(-2, 0).flatten(1).var(-1, correction=0).mean()


def relative_error(
    outputs: Float[Tensor, "*samples more n"], wanted: Float[Tensor, "*samples out n"]
) -> Float[Tensor, ""]:
    """Divide the mean squared error by the `variance` of what is wanted.

    The best constant has 1. Only as many coordinates of the outputs count as are wanted. Raises
    `InputError` where the wanted outputs are equal for all inputs.
    """
    size = variance(wanted)
    if not size > 0:
        allowed = "different from input to input, as errors are relative to their variance"
        raise InputError("outputs of the target", allowed=allowed, given="equal ones")
    return (outputs[..., : wanted.shape[-2], :] - wanted).square().mean() / size
