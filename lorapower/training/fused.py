"""Training without the detours of adapters: of one matrix for each segment, carried back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from .._subnormal import flushing
from ..adapters.core import Adapters
from ..constructions.fused import Fused, fuse
from ..constructions.linear import Adaptation
from ..errors import InputError, brief
from ..networks.fnn import FNN
from ..networks.linear import LinearNetwork
from ..networks.partition import Partition
from ..networks.residual.network import ResidualTransformer
from ..networks.transformer import Transformer
from ..regions import Ball, Region
from .data import Data
from .engine import train
from .tuning import Training, Tuning

# A ball holds the validation inputs and those of the first batches; adapters hold in one so much
# larger.
MARGIN = 1.5


@dataclass(frozen=True, eq=False, repr=False)
class FusedTraining:
    """Adapters that were trained in the fused network, with how that went.

    Attributes
    ----------
    adaptation : Adaptation
        Adapters of the frozen network, with the evidence of the construction that carried them
        back.
    fused : Fused
        The network that was trained.
    training : Training
        All runs: for each rate (first dimension) and each start.
    chosen : tuple
        Rate and start of the least validation loss.
    """

    adaptation: Adaptation
    fused: Fused
    training: Training[Any]
    chosen: tuple[int, int]

    @property
    def adapters(self) -> Adapters:
        """Those of the frozen network."""
        return self.adaptation.adapters

    @property
    def validation_loss(self) -> Float[Tensor, "rates starts"]:
        """The least one of each run."""
        return self.training.best_loss

    def __repr__(self) -> str:
        rate, start = self.chosen
        return f"FusedTraining({self.adapters}, rate {rate}, start {start})"


@torch.no_grad()
@flushing()
def train_fused(
    frozen: LinearNetwork | FNN | Transformer | ResidualTransformer,
    ranks: Any,
    data: Data,
    *,
    partition: Partition | None = None,
    region: Region | None = None,
    starts: int = 4,
    learning_rates: Sequence[float] = (1e-2,),
    steps: int = 5000,
    every: int = 10,
    seed: int = 0,
    threads: int | None = None,
    throw: bool = True,
) -> FusedTraining:
    """Adapters from data alone: train one matrix for each segment, then split it exactly.

    Adapters of ranks ``R_l`` on a segment of square non-singular layers reach ``P + K`` for every
    ``K`` of rank at most ``Σ R_l`` [lem-any-change]. So ``K = A Bᵀ`` is trained in their place, the
    segment's product ``P`` frozen, by Adam with a falling rate from several draws of ``B``. The run
    of least validation loss is kept and its changes are split among the layers. The loss is
    one-sided [def-one-sided] where the network ends with a ReLU.

    Source: [thm-fused-training].

    Parameters
    ----------
    frozen : LinearNetwork or FNN or Transformer or ResidualTransformer
        A single network.
    ranks
        As the construction for its kind takes them.
    data : Data
        To train on; outputs of at least 0 for a network that ends with a ReLU.
    partition : Partition, optional
        Of a ReLU network, into as many blocks as layers are to be imitated; by default one block,
        whose inner ReLUs idle.
    region : Region, optional
        Of a ReLU network, where its inner ReLUs are to idle, outside of which the adapted network
        is another than was trained; by default a ball half as large again as one that holds the
        validation inputs and those of the first batches.
    starts, learning_rates
        All pairs of them are run.
    steps, every, seed, threads
        Of `train`.
    throw : bool
        Of the construction.

    Raises
    ------
    InputError
        Batches, ranks and data that do not fit, a partition for what is no ReLU network, and layers
        so narrow between wider ones that their ranks reach nothing.
    SingularError
        The changes cannot be split among the layers.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, ResidualTransformer, frozen=frozen)
    _checks.kind(Data, data=data)
    starts = _checks.integer("starts", starts, 1)
    rates = _checks.items("learning_rates", learning_rates, what="rates, such as [1e-2]")
    if not rates:
        raise InputError("learning_rates", allowed="at least one", given="none")
    if region is not None:
        _checks.kind(Region, region=region)
    relu = isinstance(frozen, FNN)
    if not relu and (partition is not None or region is not None):
        name = "region" if partition is None else "partition"
        raise InputError(name, allowed="none, but for ReLU networks", given=f"one for {frozen}")
    goal: Any = frozen
    if isinstance(frozen, FNN):
        partition = Partition([frozen.depth]) if partition is None else partition
        goal = frozen.linearize(partition.slices)
        region = _about(data) if region is None else region
    pair = fuse(frozen, goal, ranks, partition)
    if not any(pair.fused_ranks) and np.any(ranks):
        raise InputError(
            "ranks",
            allowed="of segments whose layers are no narrower than their ends",
            given=f"{brief(ranks)} for {frozen}, which reach no change",
        )
    loss = "one-sided" if isinstance(frozen, FNN) and not frozen.linear_last else "squared"
    runs = train(
        pair.network.map(lambda values: values.expand(starts, *values.shape)),
        [
            Tuning(pair.fused_ranks, learning_rate=rate, schedule="cosine", loss=loss)  # type: ignore[arg-type]
            for rate in rates
        ],
        data,
        steps=steps,
        every=every,
        # Not the factors that `train` draws from this seed.
        seed=[randomness.number(seed, "fused training", k) for k in range(starts)],
        threads=threads,
    )
    best = int(runs.best_loss.nan_to_num(torch.inf).argmin())
    chosen = divmod(best, starts)
    found = runs.adapters[chosen].to(frozen.dtype)
    return FusedTraining(pair.carry_back(found, region, throw=throw), pair, runs, chosen)


def _about(data: Data) -> Ball:
    first = torch.as_tensor(data.block(0)[0]).double().movedim(0, -1).flatten(1)
    x = torch.cat([torch.as_tensor(data.validation[0]).double(), first], -1)
    return Ball.about(x, MARGIN)
