"""What training runs are told, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters, N
from ..errors import InputError, brief
from ..networks.base import Network
from ..networks.fnn import FNN

LARGEST = torch.finfo(torch.float32).max
Schedule = Literal["constant", "cosine"]
Loss = Literal["squared", "one-sided"]
Start = Literal["study", "linearized", "spectral"]


@dataclass(frozen=True)
class Tuning:
    """What one run tunes, and how fast.

    Raises `InputError` for a value that has no meaning for any network.

    Attributes
    ----------
    ranks : int or tuple of int
        Of the adapters: one for all weights, of which none takes more than its smaller side, or one
        for each in the order of the network's ``weights``. One number gives a transformer the
        adapters of the theorem [thm-transformer]: on its attention, ``W_2`` of the last block, and
        ``W_out``; a residual one all (``ResidualTransformer.ranks`` gives those of a part).
    final : int
        Tune, instead of adapters, the last so many ``weights`` in full, biases beside them.
    biases : bool or tuple of bool
        Whether biases are tuned: all of them beside adapters, or those that are named by a tuple of
        True and False in the order of the network's ``biases``.
    learning_rate, weight_decay : float
        Of Adam; the decay is its L2 penalty.
    schedule : Schedule
        The rate stays ``"constant"``, or falls to 0 over all steps as half a ``"cosine"``.
    ratio : float
        Of the rate of ``A`` to that of all else [prop-scaling]: 1 as usual, more as in LoRA+.
    loss : Loss
        ``"squared"``, or ``"one-sided"`` [def-one-sided] for networks that end with a ReLU and
        outputs of at least 0. The best parameters are chosen by the squared error either way.
    start : Start or Adapters
        ``"study"``: ``A = 0`` and ``B ~ N(0, 0.25²)``. ``"linearized"`` [prop-linearized]: the
        same, and biases with which ReLU networks are ``blocks`` layers deep on a ball that holds
        the validation inputs and those of the first batches. ``"spectral"``: ``A`` and ``B`` from
        the leading singular vectors of the gradient on the first batch. Or adapters, of at most
        these ranks; further columns are drawn as in the study's start.
    blocks : int
        Of start ``"linearized"``, all of as many layers, but that the last takes what is left over;
        the depth of the target, if known.
    """

    ranks: int | tuple[int, ...] = 0
    final: int = 0
    biases: bool | tuple[bool, ...] = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    ratio: float = 1.0
    loss: Loss = "squared"
    start: Start | Adapters = "study"
    blocks: int = 1

    def __post_init__(self) -> None:
        several = isinstance(self.ranks, Sequence) and not isinstance(self.ranks, str)
        each = tuple(
            _checks.integer("ranks", rank, 0)
            for rank in (self.ranks if several else (self.ranks,))  # type: ignore[union-attr]
        )
        object.__setattr__(self, "ranks", each if several else each[0])
        _checks.integer("final", self.final, 0)
        if self.final and any(each):
            raise InputError(
                "final",
                allowed="0 where adapters have a rank",
                given=f"{self.final} with ranks {self.ranks}",
            )
        words = self.biases if isinstance(self.biases, tuple) else (self.biases,)
        if not all(isinstance(word, bool) for word in words):
            raise InputError("biases", allowed="True or False", given=brief(self.biases))
        _checks.choice("schedule", self.schedule, get_args(Schedule))
        _checks.choice("loss", self.loss, get_args(Loss))
        if not isinstance(self.start, Adapters):
            _checks.choice("start", self.start, get_args(Start), remedy="or give adapters")
        if self.final and self.start != "study":
            raise InputError("start", allowed="'study' for layers in full", given=brief(self.start))
        _checks.integer("blocks", self.blocks, 1)
        if self.blocks > 1 and self.start != "linearized":
            raise InputError("blocks", allowed="1, but for start 'linearized'", given=self.blocks)
        _checks.positive("learning_rate", self.learning_rate)
        _checks.positive("ratio", self.ratio)
        _checks.tolerance("weight_decay", self.weight_decay)
        for name in ("learning_rate", "weight_decay", "ratio"):
            if getattr(self, name) > LARGEST:
                raise InputError(
                    name, allowed="a number of single precision", given=getattr(self, name)
                )


def require_relu_end(network: Network, classes: Sequence[int] = ()) -> None:
    """Refuse a one-sided loss of outputs that are no ReLU's, or that vote for classes."""
    if not isinstance(network, FNN) or network.linear_last or len(classes):
        given = "classes" if len(classes) else brief(network)
        raise InputError(
            "loss",
            allowed="'squared', but for ReLU networks that end with a ReLU and a squared error",
            given=f"'one-sided' for {given}",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Training(Generic[N]):
    """Trained networks: one for each `Tuning` (first dimension) and each frozen network.

    Attributes
    ----------
    network
        At each run's least validation loss, batch shape ``[tunings, *batch]``.
    adapters : Adapters
        Its updates and bias updates; as one batch they are padded with zeros to the largest rank,
        ``adapters[i]`` has the ranks of its own `Tuning`. Of a weight that was tuned in full there
        is no adapter, and the run's adapters do not count it.
    parameter_count : Tensor
        How many numbers each run tuned: of adapters, of weights in full, of biases.
    steps : Tensor
        Those at which the losses below were taken; 0 is before the first step.
    training_loss : Tensor
        Of the batch of each of these steps; NaN at step 0.
    validation_loss : Tensor
        After each of these steps; NaN after a run has ended.
    best_loss, best_step : Tensor
        The least validation loss and when it was reached.
    diverged : Tensor
        Whether a loss was no finite number, at which a run ends.
    """

    network: N
    adapters: Adapters
    parameter_count: Int[Tensor, " tunings *batch"]
    steps: Int[Tensor, " points"]
    training_loss: Float[Tensor, "tunings *batch points"]
    validation_loss: Float[Tensor, "tunings *batch points"]
    best_loss: Float[Tensor, " tunings *batch"]
    best_step: Int[Tensor, " tunings *batch"]
    diverged: Bool[Tensor, " tunings *batch"]

    def __repr__(self) -> str:
        kind, batch = type(self.network).__name__, list(self.best_loss.shape)
        return f"Training({kind}, batch {batch}, {int(self.steps[-1])} steps)"
