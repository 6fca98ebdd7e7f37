"""Linear least squares of a given rank, in a metric of the inputs and one of the outputs.

Everything broadcasts over leading batch dimensions. No second moments are inverted or formed of
inputs: all is done on the data, which may be few or degenerate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks, _objects, lowrank
from .errors import InputError
from .lowrank import LowRank


@_objects.held
class Regression(NamedTuple):
    """The map ``z ↦ K z + a`` that was fitted.

    Attributes
    ----------
    change : LowRank
        ``K`` as its factors, of the rank that was asked for, or of as many columns as the metric
        has rows.
    intercept : Tensor
        ``a``; zeros where none was fitted.
    """

    change: LowRank
    intercept: Float[Tensor, "*batch out"]


@torch.no_grad()
def reduced_rank(
    wanted: Float[Tensor, "*#batch out samples"],
    inputs: Float[Tensor, "*#batch in samples"],
    rank: int,
    *,
    towards: Float[Tensor, "*#batch out in"] | None = None,
    shrinkage: float = 0.0,
    metric: Float[Tensor, "*#batch rows out"] | None = None,
    intercept: bool = True,
) -> Regression:
    """Of all ``K`` of rank at most ``r``, and all ``a``, the least ``E‖R(y − K z − a)‖²``.

    That is ``K = R⁺ U_r U_rᵀ R B``, with the least-squares coefficients ``B`` of ``y`` on ``z``
    about their means and the leading left singular vectors ``U_r`` of ``R B C^{1/2}``, ``C`` the
    covariance of ``z``. Where data leave ``B`` open it is the nearest to ``E``. With shrinkage
    ``λ`` the sum is ``E‖R(y − K z − a)‖² + λ c ‖R(K − E)‖²_F``, ``c`` the mean variance of a
    coordinate of ``z``; an infinite one takes ``B = E``, in the metric of ``z`` alone.

    Raises `InputError` for what is not finite or does not fit.

    Source: [thm-reduced-rank].

    Parameters
    ----------
    wanted, inputs : Tensor
        ``y`` and ``z``, columns of one number of samples.
    rank : int
        At most the smaller side of ``K``.
    towards : Tensor, optional
        ``E``; 0 by default.
    shrinkage : float
        ``λ``, at least 0.
    metric : Tensor, optional
        ``R``, ``[..., rows, out]``; the identity by default.
    intercept : bool
        Whether ``a`` is fitted, or else is 0 and the means stay where they are.
    """
    y = _checks.real_tensor("wanted", wanted, min_dims=2)
    z = _checks.real_tensor("inputs", inputs, min_dims=2)
    if (y.dtype, y.device) != (z.dtype, z.device):
        allowed = f"{z.dtype} on {z.device}, like the inputs"
        raise InputError("wanted", allowed=allowed, given=f"{y.dtype} on {y.device}")
    if y.shape[-1] != z.shape[-1]:
        raise InputError("wanted", allowed=f"{z.shape[-1]} columns", given=y.shape[-1])
    out, into = y.shape[-2], z.shape[-2]
    rank = _checks.integer("rank", rank, 0, min(out, into), limit="the smaller side")
    shrinkage = _checks.tolerance("shrinkage", shrinkage)
    intercept = _checks.flag("intercept", intercept)
    E = z.new_zeros(out, into)
    if towards is not None:
        E = _fitting("towards", towards, (out, into), z)
    R = None if metric is None else _fitting("metric", metric, (None, out), z)

    given = [part for part in (y, z, E, R) if part is not None]
    batch = _checks.common_shape("wanted and inputs", [tuple(p.shape[:-2]) for p in given])
    y, z, E = (part.expand(*batch, *part.shape[-2:]) for part in (y, z, E))
    means = [part.mean(-1, keepdim=True) * intercept for part in (y, z)]
    y, z = y - means[0], z - means[1]
    identity = torch.eye(into, dtype=z.dtype, device=z.device).expand(*batch, into, into)
    if 0 < shrinkage < torch.inf:
        level = z.square().mean((-2, -1), keepdim=True)
        ridge = (shrinkage * level * z.shape[-1]).sqrt() * identity
        y, z = torch.cat([y, E @ ridge], -1), torch.cat([z, ridge], -1)
    B = E
    if shrinkage < torch.inf:
        # A driver for inputs that do not span their space.
        B = E + torch.linalg.lstsq(z.mT, (y - E @ z).mT, driver="gelsd").solution.mT
    # A trace of every direction decides where the data say nothing.
    level = z.square().mean((-2, -1), keepdim=True) * z.shape[-1]
    trace = 16 * torch.finfo(z.dtype).eps * torch.where(level > 0, level, 1).sqrt()
    half = torch.linalg.qr(torch.cat([z, trace * identity], -1).mT, mode="r").R.mT
    seen = B if R is None else R @ B
    U = lowrank.svd(seen @ half).U[..., :rank]
    left = U if R is None else torch.linalg.pinv(R) @ U
    change = LowRank(left, seen.mT @ U)
    a = (means[0] - change.matrix() @ means[1])[..., 0]
    return Regression(change, a)


def second_moment_root(
    columns: Float[Tensor, "*batch width samples"], ridge: float = 0.0
) -> Float[Tensor, "*batch width width"]:
    """``R``, symmetric, with ``R² = E[g gᵀ] + ρ c I`` for columns ``g`` of mean square ``c``.

    ``ρ`` is the ridge, at least 0. Of columns that are all 0 it is the identity, since then no
    direction counts more than another.
    """
    g = _checks.real_tensor("columns", columns, min_dims=2)
    ridge = _checks.finite("ridge", ridge, 0)
    G = g @ g.mT / g.shape[-1]
    level = g.square().mean((-2, -1))[..., None, None]
    identity = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device)
    values, vectors = torch.linalg.eigh(
        torch.where(level > 0, G + ridge * level * identity, identity)
    )
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def _fitting(name: str, value: Any, shape: tuple[int | None, int], like: Tensor) -> Tensor:
    matrix = _checks.real_tensor(name, value, min_dims=2).to(like)
    rows, columns = matrix.shape[-2:]
    if columns != shape[1] or rows != (shape[0] or rows):
        words = " × ".join("rows" if side is None else str(side) for side in shape)
        raise InputError(name, allowed=f"of shape [..., {words}]", given=tuple(matrix.shape))
    return matrix
