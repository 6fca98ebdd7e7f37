"""Adapters of linear and ReLU networks fitted to inputs by closed forms, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..errors import InputError
from ..lowrank import LowRank, truncated_svd
from ..networks.layers import FNN, as_network
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
    best constant has 1. ``success`` says whether the fit was carried back to the frozen network
    acceptably.

    Attributes
    ----------
    error : Tensor
        On the test inputs, by which nothing was chosen.
    fused : Fused
        The networks with one matrix for each segment.
    fused_adapters : Adapters
        The fit itself, of the fused network; of a ReLU network it holds in the ``region``.
    """

    error: Float[Tensor, ""]
    fused: Fused
    fused_adapters: Adapters
    region: Region | None

    @classmethod
    def measure(
        cls,
        fused: Fused,
        adapters: Adapters,
        region: Region | None,
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
    frozen: Any,
    target: Any,
    ranks: Any,
    inputs: Any,
    held_out: Any,
    *,
    on: Any = None,
    throw: bool = True,
) -> FittedAdaptation:
    """Find the adapters and biases of the least error that closed forms reach on given inputs.

    Each segment ``P`` of the fused network (`~lorapower.constructions.fused.fuse`) becomes ``P +
    K``, with the ``K`` of the segment's rank and the bias of `regression.reduced_rank` on the
    adapted network's own activations, in the metric of the outputs. Half of the held-out inputs
    select, for each segment, among the theorem's splitting and several shrinkages of the fit, and
    keep the theorem's adapters where all fits are worse. The other half gives the error.

    Raises `InputError` for networks and ranks that do not fit, for inputs that are too
    few, of another width, not finite, or in both sets; with ``throw``, `PrecisionError` or
    `SingularError` where too many digits are lost. Source: [thm-reduced-rank], [lem-any-change].

    Parameters
    ----------
    frozen, target
        Two linear or two ReLU networks, or what `networks.as_network` takes.
    ranks
        One for all layers, or one for each.
    inputs, held_out
        Columns ``[width, samples]``, at least two and four. With less than a few times the width,
        the fit follows noise.
    on : Region or Tensor, optional
        For ReLU networks, where the carried-back fit holds, as in `adapt_relu`; by default in a
        ball about the mean of all inputs but those that test, 1.25 times as large as they need.

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
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    fused = fuse(frozen, target, ranks)
    data = fused.split(inputs, held_out)
    region = None
    if isinstance(frozen, FNN):
        if on is None:
            on = Ball.about(torch.cat([data.fit, data.select], -1), _REACH)
        region = as_region(on, data.fit.shape[-2], data.fit.dtype)
    elif on is not None:
        raise InputError("on", allowed="left out but for ReLU networks", given=f"one for {frozen}")
    adapters = _fit(fused, data.fit, data.select)
    return FittedAdaptation.measure(fused, adapters, region, data, throw=throw)


def _fit(fused: Fused, inputs: Tensor, select: Tensor) -> Adapters:
    """Find the adapters of the fused network that err least on ``select``; see `adapt_fitted`."""
    network, target = fused.network, fused.fused_target
    pairs = zip(network.weights, target.weights, fused.fused_ranks, strict=True)
    updates = tuple(truncated_svd(W_target - W, rank) for W, W_target, rank in pairs)
    biases = tuple(b - a for a, b in zip(network.biases, target.biases, strict=True))
    outputs = target(select)
    return min(
        Adapters(updates, biases),
        _fit_in_turn(fused, updates, inputs, select),
        key=lambda adapters: float((adapters.merge(network)(select) - outputs).square().mean()),
    )


def nearest(fused: Fused, inputs: Float[Tensor, "in samples"]) -> Adapters:
    """Bring each layer of a fused ReLU network as near as possible to the target's.

    Layer ``i`` becomes ``P_i + U Uᵀ E_i``: ``U`` are the principal directions of ``E_i z̄_{i−1}``
    about its mean, at the target's activations; the bias adds the mean of the other directions.
    With enough rank the network is the target on all inputs. Source: [thm-reduced-rank].
    """
    network, target = fused.network, fused.fused_target
    assert isinstance(target, FNN)
    z, updates, biases = target.as_inputs(inputs, "inputs"), [], []
    for l, (W, rank) in enumerate(zip(network.weights, fused.fused_ranks, strict=True)):
        E = target.weights[l] - W
        fitted = reduced_rank(E @ z, z, rank, towards=E, shrinkage=inf)
        updates.append(fitted.update)
        biases.append(target.biases[l] + fitted.intercept - network.biases[l])
        z = target.layers(slice(l, l + 1))(z)
    return Adapters(tuple(updates), tuple(biases))


def _fit_in_turn(
    fused: Fused, theorem: Sequence[LowRank], inputs: Tensor, select: Tensor
) -> Adapters:
    """Fit layer after layer on the adapted network's own activations."""
    network, target = fused.network, fused.fused_target
    metrics = _metrics(target, inputs) if isinstance(target, FNN) else [None]
    updates, biases = [], []
    adapted, wanted = [inputs, select], [inputs, select]
    # A fused linear network has one layer, and no bias.
    own_biases = network.biases or [inputs.new_zeros(len(network.weights[0]))]
    goal_biases = target.biases or own_biases
    for l, (W, W_target) in enumerate(zip(network.weights, target.weights, strict=True)):
        wanted = [W_target @ z + goal_biases[l][:, None] for z in wanted]
        missing = [y - W @ z for y, z in zip(wanted, adapted, strict=True)]
        found = _fit_layer(
            Regression(theorem[l], goal_biases[l]),
            missing,
            adapted,
            fused.fused_ranks[l],
            towards=W_target - W,
            metric=metrics[l],
            intercept=bool(target.biases),
        )
        updates.append(found.update)
        biases.append(found.intercept - own_biases[l])
        M = W + found.update.matrix()
        adapted = [(M @ z + found.intercept[:, None]).relu() for z in adapted]
        wanted = [z.relu() for z in wanted]
    return Adapters(tuple(updates), tuple(biases) if target.biases else ())


def _fit_layer(
    theorem: Regression,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    rank: int,
    *,
    metric: Tensor | None,
    **options: Any,
) -> Regression:
    """Fit by the first data with each shrinkage; keep what errs least on the second data."""
    data = outputs[0], inputs[0]
    fits = [
        reduced_rank(*data, rank, shrinkage=size, metric=metric, **options) for size in _SHRINKAGES
    ]

    def error(found: Regression) -> float:
        missed = outputs[1] - found.update.matrix() @ inputs[1] - found.intercept[:, None]
        return float((missed if metric is None else metric @ missed).square().mean())

    return min((*fits, theorem), key=error)


def _metrics(target: FNN, x: Tensor) -> list[Tensor]:
    """Find the root of what small errors of each layer's pre-activations cost at the outputs."""
    *inner, last = target.preactivations(x)
    slope = torch.eye(len(last)).to(x)[..., None].expand(-1, -1, x.shape[-1])
    slopes = [slope if target.linear_last else slope * (last > 0)]
    for W, before in zip(target.weights[:0:-1], inner[::-1], strict=True):
        slopes.append(torch.einsum("opn,pq->oqn", slopes[-1], W) * (before > 0))
    return [second_moment_root(slope.movedim(0, 1).flatten(1), _RIDGE) for slope in slopes[::-1]]
