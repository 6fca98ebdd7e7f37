"""Training from data in the fused network, with one matrix for each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _checks, randomness
from ..adapters import Adapters
from ..constructions.fused import Fused, fuse
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN
from ..networks.partition import Partition
from ..regions import Ball
from .engine import train
from .tuning import Data, Training, Tuning

# By how much balls in which inner ReLUs idle are larger than one around the inputs seen so far.
MARGIN = 1.5


class _FusedTraining(NamedTuple):
    """Hold the frozen network's ``adapters``, and what they were found by.

    The ``fused`` network's ``training`` has all runs, of batch shape ``[rates, starts]``;
    ``chosen`` has the indices of the rate and the start with the least validation loss.
    """

    adapters: Adapters
    chosen: tuple[int, int]
    fused: Fused
    training: Training[Any]


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

    Raises `InputError` for batches, for a partition of anything but a ReLU network, and for layers
    so narrow between wider ones that their ranks reach nothing; `SingularError` where the changes
    cannot be split among the layers. Source: [thm-fused-training].

    Parameters
    ----------
    partition : Partition, optional
        Of a ReLU network, into as many blocks as layers are imitated; by default one block, whose
        inner ReLUs idle.
    """
    starts = _checks.integer("starts", starts, 1)
    target: Any = frozen
    region, loss = None, "squared"
    if isinstance(frozen, FNN):
        partition = partition or Partition([frozen.depth])
        target = frozen.linearize(partition.slices)
        first = data.block(0)[0].movedim(0, -1).flatten(1)
        region = Ball.about(torch.cat([data.validation[0], first], -1).double(), MARGIN)
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
    return _FusedTraining(split.adapters, chosen, fused, runs)
