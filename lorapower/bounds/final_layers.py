"""Errors that tuning above the frozen first layer leaves [lem-final-layers].

Later layers only receive ``h(x) = ReLU(W_1 x + b_1)``: the value of an active unit, and that an
inactive one is not positive. Inputs that agree in this cannot be distinguished. Without ReLUs all
units are active.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from ..networks.layers import FNN

# Steps of hit-and-run from one input to the other.
_STEPS = 64


class _Floor(NamedTuple):
    mean_squared_error: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]


@torch.no_grad()
def colliding_inputs(
    frozen: FNN, x: Float[Tensor, "*#batch in samples"], *, reach: float = 1.0, seed: int = 0
) -> Float[Tensor, "*batch in samples"]:
    """Find for each input another one with the same outputs of the frozen first layer.

    It lies in a random direction orthogonal to the active units, as far as inactive units allow, at
    most ``reach`` away; it is ``x`` where there is no such direction. Source: [lem-final-layers].
    """
    x = frozen.as_inputs(x).double()
    lines = _Lines(frozen, x)
    generator = randomness.generator(seed, "colliding inputs")
    direction = lines.direction(generator)
    low, high = lines.interval(x, direction)
    step = torch.where(high >= -low, high.clamp(max=reach), low.clamp(min=-reach))
    return (x + step * direction).to(frozen.dtype)


@torch.no_grad()
def final_layers_floor(frozen: FNN, target: FNN, *, samples: int = 4096, seed: int = 0) -> _Floor:
    """Estimate the mean squared error that no tuning above the frozen first layer gets below.

    It is ``E‖f̄(x) − f̄(x')‖² / 2`` for ``x ~ N(0, I)``, with ``x'`` drawn like ``x`` given the
    first layer's outputs, by steps of hit-and-run: after any number of steps the mean estimate is
    **at most** the floor. Returns the ``mean_squared_error`` over samples and coordinates, and its
    ``standard_error``. Source: [prop-floor].

    Examples
    --------
    >>> from lorapower.bounds import final_layers_floor
    >>> from lorapower.networks import FNN
    >>> floor = final_layers_floor(FNN.random(4, 8), FNN.random(2, 8, seed=1), samples=500)
    >>> bool(floor.mean_squared_error > 3 * floor.standard_error)
    True
    """
    samples = _checks.integer("samples", samples, 2)
    _checks.like_frozen(target, frozen)
    generator = randomness.generator(seed, "floor for the final layers")
    shape = (*frozen.batch_shape, frozen.widths[0], samples)
    start = randomness.normal(generator, *shape, device=frozen.device)
    lines, x = _Lines(frozen, start), start
    for _ in range(_STEPS):
        direction = lines.direction(generator)
        low, high = lines.interval(x, direction)
        # The density along the line is centred where the line is nearest to the origin.
        offset = (x * direction).sum(-2, keepdim=True)
        x = x + (_restricted_normal(low + offset, high + offset, generator) - offset) * direction
    squares = (target(start) - target(x)).square().mean(-2) / 2
    mean = squares.mean(-1)
    # Not std, which warns of empty batches.
    variance = (squares - mean[..., None]).square().sum(-1) / (samples - 1)
    return _Floor(mean, (variance / samples).sqrt())


class _Lines:
    """Lines through inputs on which the first layer's outputs are constant, in float64."""

    def __init__(self, frozen: FNN, x: Tensor) -> None:
        self.weight, self.bias = frozen.weights[0].double(), frozen.biases[0].double()[..., None]
        before = self.weight @ x.double() + self.bias
        self.active = before > 0 if frozen.relus else torch.ones_like(before, dtype=torch.bool)
        rows = self.active.mT[..., None] * self.weight[..., None, :, :]
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        spanned = S > max(rows.shape[-2:]) * torch.finfo(S.dtype).eps * S[..., :1]
        self.active_rows = Vh * spanned[..., None]
        self.free = spanned.sum(-1) < x.shape[-2]

    def direction(self, generator: torch.Generator) -> Tensor:
        """Draw a direction of length 1, orthogonal to the active rows; 0 where these leave none."""
        rows = self.active_rows
        unit = randomness.normal(generator, *rows.shape[:-2], rows.shape[-1], 1, device=rows.device)
        # The second time removes the rounding of the first, which may leave little.
        for _ in range(2):
            unit = unit - rows.mT @ (rows @ unit)
            unit = unit / torch.linalg.vector_norm(unit, dim=-2, keepdim=True)
        return torch.where(self.free[..., None], unit[..., 0], 0).mT

    def interval(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Find between which ``t`` all of ``x + t · direction`` keeps inactive units inactive."""
        # Rounding may have moved a unit slightly beyond the limit.
        before = (self.weight @ x + self.bias).clamp(max=0)
        slope = torch.where(self.active, 0, self.weight @ direction)
        limit = -before / slope
        high = torch.where(slope > 0, limit, torch.inf).amin(-2, keepdim=True)
        low = torch.where(slope < 0, limit, -torch.inf).amax(-2, keepdim=True)
        return low, high


def _restricted_normal(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from ``N(0, 1)`` restricted to ``low … high``, by inverting its distribution."""
    # In the lower half the distribution function keeps its relative precision.
    flip = low + high > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    start, stop = torch.special.ndtr(a), torch.special.ndtr(b)
    drawn = randomness.uniform(generator, *a.shape, device=a.device)
    value = torch.special.ndtri(start + drawn * (stop - start)).clamp(a, b)
    return torch.where(flip, -value, value)
