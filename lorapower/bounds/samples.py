"""Which rank samples pay for: least squares of limited rank, shrunk or not.

Fixed inputs ``X`` (``n`` columns of rank ``q``) have outputs ``Y = W̄ X + Ξ`` with independent
normal noise of standard deviation ``σ``. Least squares over adapters of total rank ``r`` turn a
frozen linear network's product ``P = W̄ − E`` into ``P + K̂_r``, of risk ``‖(K̂_r − E) X‖²_F / n``.
``f_d`` are the singular values of ``E X / n^{1/2}``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..errors import InputError
from ..lowrank import SVD, LowRank
from ..networks.layers import LinearNetwork

Spectrum = Float[Tensor, "*#batch k"]
Risks = Float[Tensor, "*batch ranks"]
# Exponents of `shrink`, from soft to nearly hard, and how many limits it tries with each.
_EXPONENTS, _LIMITS = (1, 2, 4, 8), 60


@dataclass(frozen=True)
class _Observed:
    """Hold observations of a change ``F``, in the rows of the inputs; see `Design.observe`."""

    design: Design
    change: Float[Tensor, "out span"]
    seen: SVD

    @cached_property
    def risks(self) -> Float[Tensor, "draws ranks"]:
        """Risks of least squares of each rank, from 0."""
        k = self.seen.S.shape[-1]
        kept = torch.ones(k + 1, k, dtype=self.change.dtype).tril(-1)
        return torch.stack([self.risk(self.seen.S * part) for part in kept], -1)

    def risk(self, values: Float[Tensor, "draws k"]) -> Float[Tensor, " draws"]:
        """Compute the risk of replacing the observed singular values by these."""
        found = (self.seen.U * values[..., None, :]) @ self.seen.V.mT
        return (found - self.change).square().sum((-2, -1))


@dataclass(frozen=True)
class Design:
    """Describe data: ``n`` samples, ``D_out`` outputs, the inputs' rank ``q`` and the noise ``σ``.

    A spectrum is ``k = min(D_out, q)`` singular values ``[..., k]``: ``f`` of the change, or ``y``
    observed. Risks are of ranks 0 to ``k``, ``[..., k + 1]``. Raises `InputError` for counts below
    1, a span above ``n``, negative noise and, in its methods, another number of singular values.
    """

    samples: int
    outputs: int
    span: int
    noise: float

    def __post_init__(self) -> None:
        _checks.integer("samples", self.samples, 1)
        _checks.integer("outputs", self.outputs, 1)
        _checks.integer("span", self.span, 1, self.samples, limit="the samples")
        _checks.tolerance("noise", self.noise)

    @property
    def variance(self) -> float:
        """``σ²/n``."""
        return self.noise**2 / self.samples

    @property
    def edge(self) -> float:
        """The ``f²`` from which a direction by itself pays, large sides [prop-edge].

        ``(D_out + q + (D_out² + 14 D_out q + q²)^{1/2}) σ²/2n``.
        """
        a, b = self.outputs, self.span
        return (a + b + math.sqrt(a**2 + 14 * a * b + b**2)) * self.variance / 2

    def observe(self, change: Float[Tensor, "out span"], draws: int, seed: int) -> _Observed:
        """See a change ``F = E X / n^{1/2}``, in the rows of ``X``, with draws of the noise.

        ``seen`` decomposes each ``F + Ξ``, ``risks`` are those of least squares of each rank, and
        ``risk`` is of other singular values. Source: [thm-risk].
        """
        draw = randomness.generator(seed, f"noise {self.noise}", self.samples)
        noise = self.variance**0.5 * randomness.normal(draw, draws, *change.shape)
        return _Observed(self, change, lowrank.svd(change + noise))

    def divergence(self, f: Spectrum) -> Risks:
        """Compute the degrees of freedom of least squares of each rank [thm-risk].

        ``div_r = r (r + |D_out − q|) + 2 Σ_{i≤r<j} f_i² / (f_i² − f_j²)``; infinite where ``f_r =
        f_{r+1}``.
        """
        f = self._read(f)
        squares, r = f.square(), _ranks(f)
        gap = squares[..., :, None] - squares[..., None, :]
        # The approximation jumps where two values are equal, be they 0.
        equal = 8 * f.shape[-1] * torch.finfo(f.dtype).eps * squares.amax(-1)
        pairs = torch.where(gap > equal[..., None, None], squares[..., :, None] / gap, torch.inf)
        shared = [2 * pairs[..., :i, i:].sum((-2, -1)) for i in range(len(r))]
        return r * (r + abs(self.outputs - self.span)) + torch.stack(shared, -1)

    def expected_risk(self, f: Spectrum) -> Risks:
        """Compute ``τ_r² + (σ²/n) div_r``, ``τ_r² = Σ_{d>r} f_d²``, to order ``σ²`` [thm-risk]."""
        return _missed(self._read(f)) + self._freedom(f)

    def simple_risk(self, f: Spectrum) -> Risks:
        """Compute ``τ_r² + σ² r (D_out + q − r)/n``, by the number of parameters [thm-risk]."""
        f = self._read(f)
        r = _ranks(f)
        return _missed(f) + self.variance * r * (self.outputs + self.span - r)

    def sure(self, y: Spectrum) -> Risks:
        """Estimate each rank's risk from observed singular values, without bias [thm-risk].

        ``Σ_{d>r} y_d² − D_out q σ²/n + 2 (σ²/n) div_r(y)`` (Stein), where ``y`` are of ``(Y − P X)
        Π_X / n^{1/2}`` and ``Π_X`` projects on the rows of ``X``.
        """
        return _missed(self._read(y)) - self._noise + 2 * self._freedom(y)

    def shrunk_risk(
        self, y: Spectrum, limit: Float[Tensor, "*#batch"], exponent: float
    ) -> Float[Tensor, "*batch"]:
        """Estimate the risk of ``φ(y) = y max(0, 1 − (λ/y)^g)`` without bias [thm-shrink].

        ``Σ_d (φ(y_d) − y_d)² − D_out q σ²/n + 2 (σ²/n) div φ`` with ``div φ = Σ_d [φ'(y_d) +
        |D_out − q| φ(y_d)/y_d] + 2 Σ_{i≠j} y_i φ(y_i)/(y_i² − y_j²)``.
        """
        y = self._read(y)
        phi, slope = _shrunk(y, limit[..., None], exponent)
        ratio = torch.where(y > 0, phi / y, slope)
        gap = y[..., :, None].square() - y[..., None, :].square()
        # Where two values agree, the derivative takes the quotient's place.
        agree = gap.abs() <= 1e-9 * y[..., None, :].square()
        others = torch.where(agree, 0, 1 / gap).sum(-1)
        equal = agree.sum(-1) - 1
        shared = 2 * y * phi * others + equal * (ratio + slope) / 2
        freedom = (slope + abs(self.outputs - self.span) * ratio + shared).sum(-1)
        return (phi - y).square().sum(-1) - self._noise + 2 * self.variance * freedom

    def shrink_values(self, y: Spectrum) -> tuple[Spectrum, Float[Tensor, "*batch"]]:
        """Shrink observed singular values as `shrink` does; also return the estimated risk."""
        y = self._read(y)
        # From all directions to none.
        limits = y[..., :1] * torch.linspace(0, 1, _LIMITS, dtype=y.dtype)
        risks = [self.shrunk_risk(y[..., None, :], limits, g) for g in _EXPONENTS]
        best, place = torch.stack(risks, -2).flatten(-2).min(-1)
        limit = limits.gather(-1, place[..., None] % _LIMITS)
        exponents = torch.tensor(_EXPONENTS, dtype=y.dtype)[place // _LIMITS]
        return _shrunk(y, limit, exponents[..., None])[0], best

    @property
    def _noise(self) -> float:
        """``D_out q σ²/n``, the mean square of the noise in the rows of ``X``."""
        return self.outputs * self.span * self.variance

    def _freedom(self, f: Tensor) -> Tensor | float:
        """Compute ``(σ²/n) div_r``, 0 without noise even where ``div_r`` is infinite."""
        return self.variance * self.divergence(f) if self.noise else 0.0

    def _read(self, spectrum: Tensor) -> Tensor:
        values = _checks.real_tensor("spectrum", spectrum, min_dims=1).double()
        count = min(self.outputs, self.span)
        if values.shape[-1] != count:
            allowed = f"{count} values, the smaller of outputs and span"
            raise InputError("spectrum", allowed=allowed, given=f"shape {tuple(values.shape)}")
        return values


class _PaidRank(NamedTuple):
    rank: int
    risks: Risks
    observed: Spectrum
    design: Design


def paid_rank(
    frozen: LinearNetwork,
    inputs: Float[Tensor, "in samples"],
    outputs: Float[Tensor, "out samples"],
    *,
    noise: float | None = None,
) -> _PaidRank:
    """Find the total rank of adapters of least estimated risk, from data [thm-risk].

    Returns the ``rank`` of the least of ``risks``, `Design.sure` of each rank from 0 (of ranks that
    differ only by rounding the lowest), the ``observed`` singular values, and the ``design`` with
    the noise given or estimated. No statement bounds how far this rank is from the best. ``inputs``
    are ``X``, whose rank is taken in the coarser of both types, and ``outputs`` ``Y``. By default
    ``σ̂² = ‖(Y − P X)(I − Π_X)‖²_F / (D_out (n − q))``, the part that no linear map explains.

    Raises `InputError` for data that do not fit, for layers narrower than inputs and outputs, for
    inputs that are all 0, and for unknown noise with ``n = q``.
    """
    found, _, design = _observe(frozen, inputs, outputs, noise)
    risks = design.sure(found.S)
    rounding = 8 * len(risks) * torch.finfo(risks.dtype).eps * found.S.square().sum()
    finite = risks.nan_to_num(torch.inf, torch.inf)
    rank = int((finite <= finite.min() + rounding).int().argmax())
    return _PaidRank(rank, risks, found.S, design)


class _Shrunk(NamedTuple):
    update: LowRank
    risk: float
    kept: Spectrum
    design: Design


def shrink(
    frozen: LinearNetwork,
    inputs: Float[Tensor, "in samples"],
    outputs: Float[Tensor, "out samples"],
    *,
    noise: float | None = None,
) -> _Shrunk:
    """Find the update of least estimated risk with directions shrunk, weak ones more [thm-shrink].

    ``λ ≥ 0`` and ``g`` in 1, 2, 4, 8 have the least `Design.shrunk_risk`. Returns the ``update``
    ``K`` of the frozen network's product, its estimated ``risk``, what is ``kept`` of each observed
    singular value, and the ``design``. Parameters and errors are those of `paid_rank`.
    """
    found, whitened, design = _observe(frozen, inputs, outputs, noise)
    kept, risk = design.shrink_values(found.S)
    rank = int((kept > 0).sum())
    left = found.U[:, :rank] * kept[:rank] * math.sqrt(design.samples)
    return _Shrunk(LowRank(left, whitened @ found.V[:, :rank]), float(risk), kept, design)


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
    if min(frozen.widths) < min(frozen.widths[0], frozen.widths[-1]):
        allowed = "a network with no layer narrower than inputs and outputs"
        raise InputError("frozen", allowed=allowed, given=frozen)
    x = frozen.as_inputs(inputs, "inputs").double()
    y = _checks.real_tensor("outputs", outputs, min_dims=2).to(x)
    shape = (frozen.widths[-1], x.shape[-1])
    if x.ndim != 2 or tuple(y.shape) != shape:
        raise InputError("outputs", allowed=f"of shape {shape}", given=tuple(y.shape))
    coarse = min(torch.as_tensor(inputs).dtype, frozen.dtype, key=lambda t: torch.finfo(t).bits)
    samples, span = x.shape[1], int(lowrank.rank(x.to(coarse)))
    if not span:
        raise InputError("inputs", allowed="not all 0", given="zeros")
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


def _ranks(spectrum: Tensor) -> Tensor:
    return torch.arange(spectrum.shape[-1] + 1, dtype=spectrum.dtype)


def _missed(spectrum: Tensor) -> Tensor:
    """Compute ``τ_r²`` for each rank from 0 on."""
    squares = spectrum.square()
    return torch.nn.functional.pad(squares.flip(-1).cumsum(-1).flip(-1), (0, 1))
