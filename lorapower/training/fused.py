"""Training in the fused network, with one matrix for each segment: from data, or from a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from ..adapters import Adapters
from ..constructions.fitted import FittedAdaptation
from ..constructions.fused import Fused, fuse
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN
from ..networks.partition import Partition
from ..regions import Ball
from .descent import descend
from .engine import train
from .tuning import Data, Training, Tuning

# By how much balls in which inner ReLUs idle are larger than one around the inputs seen so far.
MARGIN = 1.5


class _FusedTraining(NamedTuple):
    """What `train_fused` returns."""

    adapters: Adapters
    validation_loss: Float[Tensor, "rates starts"]
    chosen: tuple[int, int]
    fused: Fused
    training: Training[Any]


def _seen(data: Data) -> Ball:
    """Return a ball that is larger than one around the validation inputs and the first batches."""
    first = data.block(0)[0].movedim(0, -1).flatten(1)
    return Ball.about(torch.cat([data.validation[0], first], -1).double(), MARGIN)


@torch.no_grad()
@_checks.flushing()
def train_fused(
    frozen: Network,
    ranks: Any,
    data: Data,
    *,
    partition: Partition | None = None,
    starts: int = 4,
    learning_rates: Sequence[float] = (1e-2,),
    steps: int = 5000,
    every: int = 10,
    seed: int = 0,
    throw: bool = True,
) -> _FusedTraining:
    """Find adapters from data alone: train one matrix for each segment, then split it exactly.

    Adapters of ranks ``R_l`` on a segment of square non-singular layers reach ``P + K`` for every
    ``K`` of rank at most ``Σ R_l`` [lem-any-change]. So ``K = A Bᵀ`` is trained in their place, the
    segment's product ``P`` frozen, by Adam with a falling rate from several draws of ``B``. All
    pairs of ``starts`` and ``learning_rates`` run, and the changes of the run of least validation
    loss are split among the layers. The inner ReLUs of a ReLU network are idle in a ball 1.5 times
    as large as one that holds the validation inputs and those of the first batches; outside it the
    adapted network differs from the trained one. The loss is one-sided [def-one-sided] where the
    network ends with a ReLU; outputs of its data must then be at least 0. ``ranks`` and further
    options are those of the construction for the network's kind and of `train`.

    Raises `InputError` for batches, for ranks and data that do not fit, for a partition of anything
    but a ReLU network, and for layers so narrow between wider ones that their ranks reach nothing;
    `SingularError` where the changes cannot be split among the layers. Source:
    [thm-fused-training].

    Parameters
    ----------
    partition : Partition, optional
        Of a ReLU network, into as many blocks as layers are imitated; by default one block, whose
        inner ReLUs idle.

    Returns
    -------
    adapters : Adapters
        The frozen network's.
    validation_loss : Tensor
        The least of each run, ``[rates, starts]``.
    chosen : tuple of int
        Indices of the rate and the start with the least validation loss.
    fused : Fused
        The fused network.
    training : Training
        All runs, of batch shape ``[rates, starts]``.
    """
    starts = _checks.integer("starts", starts, 1)
    target: Any = frozen
    region: Ball | None = None
    loss: Literal["squared", "one-sided"] = "squared"
    if isinstance(frozen, FNN):
        partition = partition or Partition([frozen.depth])
        target = frozen.linearize(partition.slices)
        region = _seen(data)
        loss = "squared" if frozen.linear_last else "one-sided"
    elif partition is not None:
        given = f"one for {frozen}"
        raise InputError("partition", allowed="none, but for ReLU networks", given=given)
    fused = fuse(frozen, target, ranks, partition)
    if not any(fused.fused_ranks) and np.any(ranks):
        allowed = "of segments whose layers are no narrower than their ends"
        given = f"{ranks} for {frozen}, which reach no change"
        raise InputError("ranks", allowed=allowed, given=given)
    options: Any = {"schedule": "cosine", "loss": loss}
    runs: Training[Any] = train(
        fused.network.map(lambda values: values.expand(starts, *values.shape)),
        [Tuning(fused.fused_ranks, learning_rate=rate, **options) for rate in learning_rates],
        data,
        steps=steps,
        every=every,
        # Other factors than `train` draws from this seed.
        seed=[randomness.number(seed, "fused training", k) for k in range(starts)],
    )
    chosen = divmod(int(runs.best_loss.nan_to_num(torch.inf).argmin()), starts)
    split = fused.split_among_layers(runs.adapters[chosen].to(frozen.dtype), region, throw=throw)
    return _FusedTraining(split.adapters, runs.best_loss, chosen, fused, runs)


@torch.no_grad()
@_checks.flushing()
def polish(
    fitted: FittedAdaptation,
    inputs: Tensor,
    held_out: Tensor,
    *,
    iterations: int = 300,
    throw: bool = True,
) -> FittedAdaptation:
    """Minimize the error of all segments of a fit together; return the best, or the fit itself.

    All factors and biases of the fused network take at most ``iterations`` of L-BFGS, none of which
    raises the error on ``inputs``. Adapters of least error on the first half of ``held_out`` are
    kept; the other half gives the error that is returned. ``fitted`` is what
    `constructions.adapt_fitted` returned for the same ``inputs`` and ``held_out``.

    Raises `InputError` for unusable numbers. Source: the adapters are [def-adapter]'s; nothing is
    promised but what is measured.
    """
    iterations = _checks.integer("iterations", iterations, 0)
    problem = fitted.fused
    parts = problem.split(inputs, held_out)
    seen, unseen = ((x, problem.target(x)) for x in (parts.fit, parts.select))
    adapters = descend(problem.network, fitted.fused_adapters, seen, unseen, iterations)
    return FittedAdaptation.measure(problem, adapters, fitted.region, parts, throw=throw)
