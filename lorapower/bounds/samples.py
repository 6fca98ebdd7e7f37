"""What rank so many samples pay for: risks of least squares of a given rank, and bounds by codes.

Fixed inputs ``X`` (``n`` columns of rank ``q``), outputs ``Y = W̄ X + Ξ`` with independent normal
noise of standard deviation ``σ``, and a frozen linear network of product ``P = W̄ − E``. By least
squares over adapters of total rank ``r`` its product becomes ``P + K̂_r``. The risk is ``‖(K̂_r −
E) X‖²_F / n``; ``f_d`` are the singular values of ``E Σ̂^{1/2}``, those of ``E X / n^{1/2}``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.linear import LinearNetwork


@dataclass(frozen=True)
class Design:
    """What a risk depends on beside the spectrum.

    Raises `InputError` for counts below 1, a span above ``n``, and negative noise.

    Attributes
    ----------
    samples : int
        ``n``.
    outputs : int
        ``D_out``.
    span : int
        ``q``, the rank of the inputs.
    noise : float
        ``σ``.
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


def divergence(spectrum: Float[Tensor, " k"], design: Design) -> Float[Tensor, " ranks"]:
    """Degrees of freedom of least squares of each rank from 0 to ``k = min(D_out, q)``.

    ``div_r = r (r + |D_out − q|) + 2 Σ_{i≤r<j} f_i² / (f_i² − f_j²)``, the divergence of the best
    approximation of rank ``r`` at a matrix of these singular values; infinite where ``f_r =
    f_{r+1}``. Raises `InputError` for another number of values. Source: [thm-risk].
    """
    f, r = _values(spectrum, design), torch.arange(len(spectrum) + 1)
    squares = f.square()
    gap = squares[:, None] - squares[None, :]
    # The approximation jumps where two values are equal, be they 0.
    equal = 8 * len(f) * torch.finfo(f.dtype).eps * squares.max()
    pairs = torch.where(gap > equal, squares[:, None] / gap, torch.inf)
    shared = torch.stack([2 * pairs[:i, i:].sum() for i in r.tolist()])
    return r * (r + abs(design.outputs - design.span)) + shared


def expected_risk(spectrum: Float[Tensor, " k"], design: Design) -> Float[Tensor, " ranks"]:
    """``τ_r² + (σ²/n) div_r``: the mean risk of each rank, up to terms in ``σ⁴``.

    ``τ_r² = Σ_{d>r} f_d²``. Source: [thm-risk].
    """
    variance = _variance(design)
    freedom = divergence(spectrum, design)
    return _missed(spectrum) + (variance * freedom if variance else 0)


def simple_risk(spectrum: Float[Tensor, " k"], design: Design) -> Float[Tensor, " ranks"]:
    """``τ_r² + σ² r (D_out + q − r)/n``: `expected_risk` with ``div_r`` at its lower bound.

    That is the number of parameters of a matrix of rank ``r``; ``div_r`` is near it where singular
    values are well apart. Source: [thm-risk].
    """
    f = _values(spectrum, design)
    r = torch.arange(len(f) + 1, dtype=f.dtype)
    return _missed(f) + _variance(design) * r * (design.outputs + design.span - r)


def sure(observed: Float[Tensor, " k"], design: Design) -> Float[Tensor, " ranks"]:
    """An unbiased estimate of the risk of each rank from what was observed (Stein).

    ``Σ_{d>r} y_d² − D_out q σ²/n + 2 (σ²/n) div_r(y)``, ``y`` the singular values of
    ``(Y − P X) Π_X / n^{1/2}``, ``Π_X`` the projection on the rows of ``X``. Source: [thm-risk].
    """
    variance = _variance(design)
    freedom = divergence(observed, design)
    noise = design.outputs * design.span * variance
    return _missed(observed) - noise + (2 * variance * freedom if variance else 0)


def oracle_bound(spectrum: Float[Tensor, " k"], design: Design) -> Float[Tensor, " ranks"]:
    """``2 τ_r² + 16 r σ² [(D_out^{1/2} + q^{1/2})² + 1]/n``, which no mean risk exceeds.

    Source: [thm-oracle].
    """
    f = _values(spectrum, design)
    r = torch.arange(len(f) + 1, dtype=f.dtype)
    size = (math.sqrt(design.outputs) + math.sqrt(design.span)) ** 2 + 1
    return 2 * _missed(f) + 16 * r * _variance(design) * size


class PaidRank(NamedTuple):
    """The total rank that samples pay for.

    Attributes
    ----------
    rank : int
        Of the least estimated risk.
    risks : Tensor
        `sure` of each rank from 0 on.
    observed : Tensor
        Singular values of ``(Y − P X) Π_X / n^{1/2}``.
    design : Design
        With the noise that was given or estimated.
    """

    rank: int
    risks: Float[Tensor, " ranks"]
    observed: Float[Tensor, " k"]
    design: Design


def paid_rank(
    frozen: LinearNetwork,
    inputs: Float[Tensor, "in samples"],
    outputs: Float[Tensor, "out samples"],
    *,
    noise: float | None = None,
) -> PaidRank:
    """From data alone: the total rank of adapters with the least estimated risk, by `sure`.

    Of ranks whose estimates differ by rounding alone it is the least.

    Raises `InputError` for data that do not fit, for layers narrower than inputs and outputs, for
    inputs that are all 0, and where the noise is to be estimated from no more samples than the
    inputs span.

    Source: [thm-risk].

    Parameters
    ----------
    frozen : LinearNetwork
        A linear network, of square non-singular layers for what is said of its adapters to hold;
        its product is ``P``.
    inputs, outputs : Tensor
        ``X`` and ``Y``. Their rank is taken in the coarser of the types of inputs and network.
    noise : float, optional
        ``σ``; by default estimated from what no linear map explains, ``σ̂² = ‖(Y − P X)(I −
        Π_X)‖²_F / (D_out (n − q))``.
    """
    _checks.kind(LinearNetwork, frozen=frozen)
    if frozen.batch_shape:
        raise InputError("frozen", allowed="a single network", given=frozen)
    x = frozen.as_inputs(inputs, "inputs").double()
    y = _checks.real_tensor("outputs", outputs, min_dims=2).to(x)
    wanted = (frozen.widths[-1], x.shape[-1])
    if x.ndim != 2 or tuple(y.shape) != wanted:
        raise InputError("outputs", allowed=f"of shape {wanted}", given=tuple(y.shape))
    if min(frozen.widths) < min(frozen.widths[0], frozen.widths[-1]):
        allowed = "a network with no layer narrower than inputs and outputs"
        raise InputError("frozen", allowed=allowed, given=frozen)
    coarse = min((torch.as_tensor(inputs).dtype, frozen.dtype), key=lambda t: torch.finfo(t).bits)
    samples, span = x.shape[1], int(lowrank.rank(x.to(coarse)))
    if not span:
        raise InputError("inputs", allowed="not all 0", given="zeros")
    missing = y - frozen.product().double() @ x
    rows = lowrank.svd(x).V[:, :span]
    explained = missing @ rows
    if noise is None:
        if samples <= span:
            raise InputError(
                "noise",
                allowed=f"given where there are no more than {span} samples, which inputs span",
                given=f"none with {samples}",
            )
        rest = (missing - explained @ rows.mT).square().sum()
        noise = math.sqrt(float(rest) / (len(y) * (samples - span)))
    made = Design(samples, len(y), span, noise)
    observed = lowrank.spectrum(explained) / math.sqrt(samples)
    risks = sure(observed, made)
    rounding = 8 * len(risks) * torch.finfo(risks.dtype).eps * observed.square().sum()
    least = risks.nan_to_num(torch.inf, torch.inf)
    paid = int((least <= least.min() + rounding).int().argmax())
    return PaidRank(paid, risks, observed, made)


def occam_bound(error: float, bits: float, samples: int, delta: float = 0.05) -> float:
    """``err ≤ êrr + ((|h| ln 2 + ln 1/δ) / 2n)^{1/2}`` for a network written in ``|h|`` bits.

    Holds with probability ``1 − δ`` over ``n`` samples for all networks of a code at once that was
    fixed before these samples were seen; ``êrr`` is the share of errors on them.

    Raises `InputError` for a share outside [0, 1], negative bits, no samples and ``δ`` outside
    (0, 1). Source: [thm-occam].
    """
    return _checked_share(error) + math.sqrt(_cost(bits, samples, delta) / 2)


def kl_bound(error: float, bits: float, samples: int, delta: float = 0.05) -> float:
    """The largest ``err`` with ``kl(êrr ‖ err) ≤ (|h| ln 2 + ln 1/δ)/n``: at most `occam_bound`.

    ``kl(a ‖ b) = a ln(a/b) + (1 − a) ln((1 − a)/(1 − b))``. Arguments, what it says and what it
    raises are those of `occam_bound`: the share of errors on so many samples, the number of bits of
    the network's code, ``δ``.
    """
    share, cost = _checked_share(error), _cost(bits, samples, delta)

    def beyond(b: float) -> float:
        terms = [a * math.log(a / b) if a else 0.0 for a, b in ((share, b), (1 - share, 1 - b))]
        return sum(terms) - cost

    top = 1 - 1e-15
    if share >= top or beyond(top) <= 0:
        return 1.0
    return float(brentq(beyond, max(share, 1e-300), top, xtol=1e-12))


def _values(spectrum: Tensor, design: Design) -> Tensor:
    values = _checks.real_tensor("spectrum", spectrum, min_dims=1).double()
    count = min(design.outputs, design.span)
    if values.shape != (count,):
        raise InputError(
            "spectrum",
            allowed=f"{count} values, the smaller of outputs and span",
            given=f"shape {tuple(values.shape)}",
        )
    return values


def _missed(spectrum: Tensor) -> Tensor:
    """``τ_r²`` for each rank from 0 on."""
    squares = spectrum.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def _variance(design: Design) -> float:
    return design.noise**2 / design.samples


def _checked_share(error: float) -> float:
    share = _checks.tolerance("error", error)
    if share > 1:
        raise InputError("error", allowed="a share from 0 to 1", given=error)
    return share


def _cost(bits: float, samples: int, delta: float) -> float:
    """``(|h| ln 2 + ln 1/δ)/n``."""
    bits, samples = _checks.tolerance("bits", bits), _checks.integer("samples", samples, 1)
    delta = _checks.positive("delta", delta)
    if delta >= 1:
        raise InputError("delta", allowed="between 0 and 1", given=delta)
    return (bits * math.log(2) - math.log(delta)) / samples
