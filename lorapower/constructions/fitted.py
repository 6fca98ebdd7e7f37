"""Adapters of ReLU networks fitted to inputs by closed forms, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..lowrank import truncated_svd
from ..networks.layers import FNN
from ..regions import Ball, Region, as_region
from ..regression import Regression, reduced_rank, relative_error, second_moment_root
from .fused import Fused, _Split, fuse
from .linear import Adaptation

# The package offers the rest.
__all__ = ["nearest"]

# Shrinkages towards the error matrix, in mean variances of an input.
_SHRINKAGES = (0.0, 0.01, 0.1, 1.0, inf)
# Share of the identity in an output metric: errors that inputs never reach must cost something.
_RIDGE = 1e-3
# The region of a ReLU network: a ball as large as all inputs, times this.
_REACH = 1.25


@dataclass(frozen=True, eq=False, repr=False)
class FittedAdaptation(Adaptation):
    """Hold adapters fitted to inputs, and the evidence for them.

    Errors are mean squared differences of outputs from the target's over the variance of these: the
    best constant has 1. The ``error`` is that on the test inputs, by which nothing was chosen.
    ``fused_adapters`` are the fit itself, of the ``fused`` network; ``success`` says whether it was
    carried back to the frozen network acceptably, where it holds in the ``region``.
    """

    error: Float[Tensor, ""]
    fused: Fused
    fused_adapters: Adapters
    region: Region

    @classmethod
    def measure(
        cls,
        fused: Fused,
        adapters: Adapters,
        region: Region,
        data: _Split,
        *,
        throw: bool = True,
    ) -> FittedAdaptation:
        """Carry adapters of a fused network back, and measure them on the test inputs."""
        carried = fused.split_among_layers(adapters, region, throw=throw)
        merged = carried.adapters.merge(fused.frozen)
        outputs = merged(merged.fill(data.test))
        error = relative_error(outputs, fused.target(data.test))
        return cls(carried.adapters, carried.success, error, fused, adapters, region)


@torch.no_grad()
@_checks.flushing()
def adapt_fitted(
    frozen: FNN | Any,
    target: FNN | Any,
    ranks: _checks.Ranks,
    inputs: Any,
    held_out: Any,
    *,
    on: Any = None,
    throw: bool = True,
) -> FittedAdaptation:
    """Find the adapters and biases of the least error that closed forms reach on given inputs.

    Each block's product ``P`` (`~lorapower.constructions.fused.fuse`) becomes ``P + K``, with the
    ``K`` of the block's rank and the bias of `regression.reduced_rank` on the adapted network's own
    activations, in the metric of the outputs. Half of the held-out inputs select, for each block,
    among the theorem's splitting and several shrinkages of the fit, and keep the theorem's adapters
    where all fits are worse. The other half gives the error.

    Raises what `adapt_relu` raises, and `InputError` for batches and for inputs that are too few or
    in both sets. Source: [thm-reduced-rank], [lem-any-change].

    Parameters
    ----------
    inputs, held_out
        Columns ``[width, samples]``, at least two and four. With less than a few times the width,
        the fit follows noise.
    on : Region or Tensor, optional
        Where the carried-back fit holds; by default in a ball about the mean of all inputs but
        those that test, 1.25 times as large as they need.
    frozen, target, ranks, throw
        See `adapt_relu`.

    Examples
    --------
    >>> import torch
    >>> from lorapower.constructions import adapt_fitted, adapt_relu
    >>> from lorapower.networks import FNN
    >>> from lorapower.regions import Ball
    >>> from lorapower.regression import relative_error
    >>> frozen, target = FNN.random(4, 8), FNN.random(2, 8, seed=1)
    >>> x, held_out = Ball(3.0).fit(8, frozen.dtype).sample(3000).split([1000, 2000], dim=-1)
    >>> blind = adapt_relu(frozen, target, 2, on=Ball(3.0)).adapters.merge(frozen)
    >>> fitted = adapt_fitted(frozen, target, 2, x, held_out)
    >>> float(fitted.error) < float(relative_error(blind(held_out), target(held_out)))
    True
    """
    frozen, target = FNN.of(frozen, "frozen"), FNN.of(target, "target")
    fused = fuse(frozen, target, ranks)
    data = fused.split(inputs, held_out)
    if on is None:
        on = Ball.about(torch.cat([data.fit, data.select], -1), _REACH)
    region = as_region(on, target.widths[0], target.dtype)
    pairs = zip(fused.network.weights, target.weights, fused.fused_ranks, strict=True)
    updates = tuple(truncated_svd(W_target - P, rank) for P, W_target, rank in pairs)
    theorem = Adapters(updates, tuple(torch.zeros_like(b) for b in target.biases))

    def error(adapters: Adapters) -> float:
        outputs = adapters.merge(fused.network)(data.select)
        return float((outputs - target(data.select)).square().mean())

    adapters = min(theorem, _fit_in_turn(fused, target, theorem, data), key=error)
    return FittedAdaptation.measure(fused, adapters, region, data, throw=throw)


def nearest(fused: Fused, inputs: Float[Tensor, "in samples"]) -> Adapters:
    """Bring each layer of a fused ReLU network as near as possible to the target's.

    Layer ``i`` becomes ``P_i + U Uᵀ E_i``: ``U`` are the principal directions of ``E_i z̄_{i−1}``
    about its mean, at the target's activations; the bias adds the mean of the other directions.
    With enough rank the network is the target on all inputs. Source: [thm-reduced-rank].
    """
    network, target = fused.network, FNN.of(fused.target)
    z, updates, biases = target.as_inputs(inputs, "inputs"), [], []
    for l, (P, rank) in enumerate(zip(network.weights, fused.fused_ranks, strict=True)):
        E = target.weights[l] - P
        fitted = reduced_rank(E @ z, z, rank, towards=E, shrinkage=inf)
        updates.append(fitted.update)
        biases.append(target.biases[l] + fitted.intercept - network.biases[l])
        z = target.layers(slice(l, l + 1))(z)
    return Adapters(tuple(updates), tuple(biases))


def _fit_in_turn(fused: Fused, target: FNN, theorem: Adapters, data: _Split) -> Adapters:
    """Fit layer after layer on the adapted network's own activations."""
    updates, biases = [], []
    adapted = wanted = [data.fit, data.select]
    targets = zip(target.weights, target.biases, _metrics(target, data.fit), strict=True)
    for l, (W, bias, metric) in enumerate(targets):
        P, rank = fused.network.weights[l], fused.fused_ranks[l]
        wanted = [W @ z + bias[:, None] for z in wanted]
        missing = [y - P @ z for y, z in zip(wanted, adapted, strict=True)]
        options: Any = {"towards": W - P, "metric": metric}
        fits = [
            reduced_rank(missing[0], adapted[0], rank, shrinkage=size, **options)
            for size in _SHRINKAGES
        ]
        fits.append(Regression(theorem.updates[l], bias))
        best = _least_error(fits, missing[1], adapted[1], metric)
        updates.append(best.update)
        biases.append(best.intercept - bias)
        M = P + best.update.matrix()
        adapted = [(M @ z + best.intercept[:, None]).relu() for z in adapted]
        wanted = [z.relu() for z in wanted]
    return Adapters(tuple(updates), tuple(biases))


def _least_error(
    fits: list[Regression], outputs: Tensor, inputs: Tensor, metric: Tensor
) -> Regression:
    def error(fit: Regression) -> float:
        missed = outputs - fit.update.matrix() @ inputs - fit.intercept[:, None]
        return float((metric @ missed).square().mean())

    return min(fits, key=error)


def _metrics(target: FNN, x: Tensor) -> list[Tensor]:
    """Find the root of what small errors of each layer's pre-activations cost at the outputs."""
    *inner, last = target.preactivations(x)
    slope = torch.eye(len(last)).to(x)[..., None].expand(-1, -1, x.shape[-1])
    slopes = [slope if target.linear_last else slope * (last > 0)]
    for W, before in zip(target.weights[:0:-1], inner[::-1], strict=True):
        slopes.append(torch.einsum("opn,pq->oqn", slopes[-1], W) * (before > 0))
    return [second_moment_root(slope.movedim(0, 1).flatten(1), _RIDGE) for slope in slopes[::-1]]
