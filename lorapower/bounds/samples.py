"""Choose the total rank of a linear network's adapters from noisy samples, or shrink directions.

``X`` has ``n`` fixed inputs as columns, and rank ``q``. Outputs are ``Y = W̄ X + Ξ``, with normal
noise of standard deviation ``σ``. Adapters add ``K`` to the product ``P`` of a frozen network. The
risk ``‖(P + K − W̄) X‖²_F / n`` is estimated from the singular values ``y`` of ``(Y − P X) Π_X /
n^{1/2}``, where ``Π_X`` projects on the rows of ``X``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..lowrank import SVD, LowRank
from ..networks.layers import LinearNetwork

Spectrum = Float[Tensor, "*#batch k"]
Risks = Float[Tensor, "*batch ranks"]
# Exponents of shrinking, from soft to nearly hard, and how many limits are tried with each.
_EXPONENTS, _LIMITS = (1, 2, 4, 8), 60


@dataclass(frozen=True)
class Design:
    """Describe ``n`` samples of ``D_out`` outputs, inputs of rank ``q`` and noise ``σ``.

    Methods estimate risks from observed spectra, ``k = min(D_out, q)`` singular values in falling
    order, ``[..., k]``. Raises `InputError` for a span ``q`` that is not from 1 to ``n``, noise
    that is negative or not finite and, in methods, another number of singular values.
    """

    samples: int
    outputs: int
    span: int
    noise: float

    def __post_init__(self) -> None:
        _checks.integer("span", self.span, 1, self.samples, limit="the samples")
        _checks.number("noise", self.noise, 0)

    @property
    def variance(self) -> float:
        """Compute ``σ²/n``."""
        return self.noise**2 / self.samples

    @property
    def edge(self) -> float:
        """Compute the ``f²`` from which a single direction pays in large matrices [prop-edge].

        ``(D_out + q + (D_out² + 14 D_out q + q²)^{1/2}) σ²/2n``.
        """
        a, b = self.outputs, self.span
        return (a + b + math.sqrt(a**2 + 14 * a * b + b**2)) * self.variance / 2

    def divergence(self, y: Spectrum) -> Risks:
        """Compute the degrees of freedom of least squares of each rank from 0 to ``k`` [thm-risk].

        ``div_r = r (r + |D_out − q|) + 2 Σ_{i≤r<j} y_i² / (y_i² − y_j²)``, which is infinite where
        ``y_r = y_{r+1}``.
        """
        y = self._read(y)
        k, squares = y.shape[-1], y.square()
        gap = squares[..., :, None] - squares[..., None, :]
        # The approximation jumps where two values are equal, be they 0.
        equal = 8 * k * torch.finfo(y.dtype).eps * squares.amax(-1)[..., None, None]
        pairs = torch.where(gap > equal, squares[..., :, None] / gap, torch.inf)
        shared = [2 * pairs[..., :r, r:].sum((-2, -1)) for r in range(k + 1)]
        r = torch.arange(k + 1, dtype=y.dtype)
        return r * (r + abs(self.outputs - self.span)) + torch.stack(shared, -1)

    def sure(self, y: Spectrum) -> Risks:
        """Estimate the risk of least squares of each rank, without bias [thm-risk].

        ``Σ_{d>r} y_d² − D_out q σ²/n + 2 (σ²/n) div_r(y)``, Stein's unbiased risk estimate.
        """
        y = self._read(y)[..., None, :]
        kept = torch.ones(y.shape[-1] + 1, y.shape[-1], dtype=y.dtype).tril(-1)
        return self._estimate(y, kept * y, self.divergence(y[..., 0, :]))

    def shrunk_risk(
        self, y: Spectrum, limit: Float[Tensor, "*#batch"], exponent: float
    ) -> Float[Tensor, "*batch"]:
        """Estimate the risk of ``φ(y) = y max(0, 1 − (λ/y)^g)`` without bias [thm-shrink].

        ``Σ_d (φ(y_d) − y_d)² − D_out q σ²/n + 2 (σ²/n) div φ`` with ``div φ = Σ_d [φ'(y_d) +
        |D_out − q| φ(y_d)/y_d] + 2 Σ_{i<j} (y_i φ(y_i) − y_j φ(y_j))/(y_i² − y_j²)``.
        """
        y = self._read(y)
        phi, slope = _shrunk(y, limit[..., None], exponent)
        ratio, square = torch.where(y > 0, phi / y, slope), y.square()
        gap = square[..., :, None] - square[..., None, :]
        # Where two values agree, the derivative takes the quotient's place.
        agree = gap.abs() <= 1e-9 * square[..., None, :]
        others = torch.where(agree, 0, 1 / gap).sum(-1)
        shared = 2 * y * phi * others + (agree.sum(-1) - 1) * (ratio + slope) / 2
        freedom = slope + abs(self.outputs - self.span) * ratio + shared
        return self._estimate(y, phi, freedom.sum(-1))

    def shrink_values(self, y: Spectrum) -> tuple[Spectrum, Float[Tensor, "*batch"]]:
        """Shrink singular values by the ``λ`` and ``g`` of least `shrunk_risk`; return it too."""
        y = self._read(y)
        # From all directions to none.
        limits = y[..., :1] * torch.linspace(0, 1, _LIMITS, dtype=y.dtype)
        risks = [self.shrunk_risk(y[..., None, :], limits, g) for g in _EXPONENTS]
        best, place = torch.stack(risks, -2).flatten(-2).min(-1)
        limit = limits.gather(-1, place[..., None] % _LIMITS)
        exponents = torch.tensor(_EXPONENTS, dtype=y.dtype)[place // _LIMITS]
        return _shrunk(y, limit, exponents[..., None])[0], best

    def _estimate(self, y: Tensor, phi: Tensor, freedom: Tensor) -> Tensor:
        risk = (phi - y).square().sum(-1) - self.outputs * self.span * self.variance
        # Without noise, degrees of freedom cost nothing even where they are infinite.
        return risk + 2 * self.variance * freedom if self.noise else risk

    def _read(self, spectrum: Tensor) -> Tensor:
        values = _checks.real_tensor("spectrum", spectrum, min_dims=1).double()
        count = min(self.outputs, self.span)
        if values.shape[-1] != count:
            allowed = f"{count} values, the smaller of outputs and span"
            raise InputError("spectrum", allowed=allowed, given=f"shape {tuple(values.shape)}")
        return values


class _Fit(NamedTuple):
    rank: int
    risks: Risks
    update: LowRank
    risk: float
    observed: Spectrum
    kept: Spectrum
    design: Design


def fit(
    frozen: LinearNetwork,
    inputs: Float[Tensor, "in samples"],
    outputs: Float[Tensor, "out samples"],
    *,
    noise: float | None = None,
) -> _Fit:
    """Find the total rank of adapters of least estimated risk, and a change with less, shrunk.

    No statement bounds how far they are from the best. Raises `InputError` for layers of less rank
    than inputs and outputs, inputs that are all 0, and unknown noise with ``n = q``.

    Parameters
    ----------
    frozen : LinearNetwork
        Its product is ``P``.
    inputs, outputs
        ``X`` and ``Y``. The rank of ``X`` is taken in the coarser type of inputs and network.
    noise
        ``σ``. By default it is estimated from what no linear map explains:
        ``σ̂² = ‖(Y − P X)(I − Π_X)‖²_F / (D_out (n − q))``.

    Returns
    -------
    rank, risks
        The lowest rank of least `Design.sure` but for rounding, and those of all ranks [thm-risk].
    update, risk
        The change ``K`` with singular values shrunk, and its estimated risk [thm-shrink]. With
        noise 0 it keeps rounding errors too, so its rank can be above ``rank``.
    observed, kept, design
        The singular values ``y``, what `Design.shrink_values` leaves of them, and the data.

    Examples
    --------
    The change has rank 2, and one noisy direction more has the least estimated risk.

    >>> import torch
    >>> from lorapower import randomness
    >>> from lorapower.bounds import samples
    >>> from lorapower.networks import LinearNetwork
    >>> draw, frozen = randomness.generator(0, "example"), LinearNetwork.random(2, 16)
    >>> A, B = randomness.normal(draw, 2, 16, 2)
    >>> x, noise = randomness.normal(draw, 2, 16, 400)
    >>> samples.fit(frozen, x, frozen(x) + A @ B.mT @ x + noise).rank
    2
    """
    found, whitened, design = _observe(frozen, inputs, outputs, noise)
    risks = design.sure(found.S).nan_to_num(torch.inf, torch.inf)
    rounding = 8 * len(risks) * torch.finfo(risks.dtype).eps * found.S.square().sum()
    rank = int((risks <= risks.min() + rounding).int().argmax())
    kept, risk = design.shrink_values(found.S)
    used = int((kept > 0).sum())
    left = found.U[:, :used] * kept[:used] * math.sqrt(design.samples)
    update = LowRank(left, whitened @ found.V[:, :used])
    return _Fit(rank, risks, update, float(risk), found.S, kept, design)


def _shrunk(y: Tensor, limit: Tensor, exponent: Tensor | float) -> tuple[Tensor, Tensor]:
    """Compute ``φ(y)`` and ``φ'(y)``; both are 0 up to the limit."""
    part = (limit / torch.where(y > 0, y, 1)) ** exponent
    above = y > limit
    slope = 1 + (exponent - 1) * part
    return torch.where(above, y * (1 - part), 0), torch.where(above, slope, 0)


def _observe(
    frozen: LinearNetwork, inputs: Tensor, outputs: Tensor, noise: float | None
) -> tuple[SVD, Tensor, Design]:
    """Compute ``(Y − P X) Π_X / n^{1/2}`` in the basis of the rows of ``X``, and ``X⁺`` there."""
    _checks.kind(LinearNetwork, frozen=frozen)
    _checks.single(frozen=frozen)
    if min(int(lowrank.rank(W)) for W in frozen.weights) < min(frozen.widths[0], frozen.widths[-1]):
        allowed = "a network with no layer of less rank than inputs and outputs"
        raise InputError("frozen", allowed=allowed, given=frozen)
    x = frozen.as_inputs(inputs, "inputs").double()
    y = _checks.real_tensor("outputs", outputs, min_dims=2).to(x)
    shape = (frozen.widths[-1], x.shape[-1])
    if x.ndim != 2 or tuple(y.shape) != shape:
        raise InputError("outputs", allowed=f"of shape {shape}", given=tuple(y.shape))
    coarse = min(torch.as_tensor(inputs).dtype, frozen.dtype, key=lambda t: torch.finfo(t).bits)
    samples, span = x.shape[1], int(lowrank.rank(x.to(coarse)))
    missing = y - frozen.product().double() @ x
    left, sizes, rows = (part[..., :span] for part in lowrank.svd(x))
    explained = missing @ rows
    if noise is None:
        if samples <= span:
            allowed = f"given where there are no more than {span} samples, which inputs span"
            raise InputError("noise", allowed=allowed, given=f"none with {samples}")
        rest = (missing - explained @ rows.mT).square().sum()
        noise = math.sqrt(float(rest) / (len(y) * (samples - span)))
    design = Design(samples, len(y), span, noise)
    return lowrank.svd(explained / math.sqrt(samples)), left / sizes, design
