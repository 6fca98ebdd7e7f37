"""Residual transformers, of which one part of the blocks is adapted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from lorapower.book.values import Values
from lorapower.bounds.floors import attention_floor, far_error
from lorapower.networks.attention import Part
from lorapower.networks.decoder import Decoder
from lorapower.regression import variance as variance_of
from lorapower.training.tuning import Fresh, Tuning
from records.methods import AnyRun, Rank, TrainingResults, measure_on, train_together

# Vectors by what is tuned: those of the floor of attention, or all.
VECTORS = {
    "free": ("b_Q", "b_O", "b_2"),
    "all": ("b_Q", "b_O", "b_2", "b_1", "g_1", "s_1", "g_2", "s_2", "g_f", "s_f"),
}
TEST, DIRECTIONS = 5000, 5000
# How far out tokens are for what is said of the limit.
FAR = 1e4


class TrainedPart(Values):
    """Train adapters of one rank on a part of the blocks, by Adam at a falling rate.

    ``W_V`` and ``W_O`` have ``more`` rank than the rest. Of the vectors ``"free"`` tunes
    ``b_Q, b_O, b_2``, ``"all"`` also ``b_1``, gains and shifts.
    """

    kind: Literal["part"] = "part"
    part: Part = "attention"
    ranks: Rank = 8
    more: int = Field(0, ge=0)
    vectors: Literal["free", "all"] = "all"
    learning_rate: float = Field(1e-2, gt=0)

    def ranks_in(self, network: Decoder) -> tuple[int, ...]:
        """List the rank of each weight's adapter."""
        each = self.ranks, self.ranks + self.more
        usual, more = (network.ranks(rank, self.part) for rank in each)
        pairs = zip(network.kind_of_weight, usual, more, strict=True)
        return tuple(b if kind in ("W_V", "W_O") else a for kind, a, b in pairs)

    def tuning(self, network: Decoder) -> Tuning:
        """Make the settings that `training.train` takes."""
        tuned = VECTORS[self.vectors]
        return Tuning(
            ranks=self.ranks_in(network),
            biases=tuple(name.split()[0] in tuned for name in network.bias_names),
            learning_rate=self.learning_rate,
            schedule="cosine",
        )


class Residual(Values):
    """Draw two networks of one ReLU block with LayerNorms, a frozen one and a target, and inputs.

    ``width, hidden, heads, tokens`` are ``D, F, H, N``, and ``d = D // H``. Inputs have entries of
    standard deviation ``size``. Adam takes ``steps`` of ``samples`` sequences.
    """

    width: int = Field(8, ge=2)
    hidden: int = Field(16, ge=1)
    heads: int = Field(1, ge=1)
    tokens: int = Field(1, ge=1)
    size: float = Field(1.0, gt=0)
    steps: int = Field(2000, ge=1)
    samples: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)

    def networks(self) -> tuple[Decoder, Decoder]:
        """Draw the frozen network and the target."""
        options: Any = self.model_dump(include={"hidden", "seed"})
        options |= {"head_size": self.width // self.heads, "norm": "layer", "residual": True}
        frozen, target = (
            Decoder.random(1, self.width, self.heads, purpose=purpose, **options)
            for purpose in ("frozen", "target")
        )
        return frozen, target

    def data(self, target: Decoder, *purpose: str) -> Fresh:
        """Label inputs, others for each purpose."""
        options: Any = {"samples": self.samples, "scale": self.size, "seed": self.seed}
        return Fresh(target, (self.width, self.tokens), purpose=purpose, **options)


class Run(AnyRun):
    """Say what is adapted in which problem."""

    problem: Residual
    method: TrainedPart


class Remainder(TrainingResults):
    """Hold mean squared errors of a run over fresh inputs.

    ``relative`` is the error over the variance of what the target adds to its inputs, ``far_error``
    the error at sequences far out. ``floor`` is the `bounds.attention_floor` of the adapters' ranks
    at single tokens, NaN unless attention alone is adapted. ``factors`` counts the adapters'
    numbers.
    """

    relative: float
    far_error: float
    floor: float
    factors: int


def measure(runs: Sequence[Run]) -> list[Remainder]:
    """Measure what each run of one problem reaches."""
    (problem,) = {run.problem for run in runs}
    frozen, target = problem.networks()
    data = problem.data(target)
    x, y = (part.to(frozen.dtype) for part in data.test(TEST))
    added = float(variance_of(y - x))
    far = problem.data(target, "directions").test(DIRECTIONS)[0][..., 0]
    far = far.mT.to(frozen.dtype)
    options = {"steps": problem.steps, "every": max(1, problem.steps // 40), "seed": problem.seed}
    tunings = [run.method.tuning(frozen) for run in runs]
    trained = train_together(frozen, tunings, data, **options)
    remainders = []
    for method, (_, adapters, curve) in zip((run.method for run in runs), trained, strict=True):
        floor = math.nan
        if method.part == "attention":
            ranks = method.ranks_in(frozen)
            floor = float(attention_floor(frozen, target, far, ranks).value)
        adapters = adapters.to(frozen.dtype)
        network = adapters.merge(frozen)
        remainder = Remainder(
            relative=measure_on(network, x, y) / added,
            far_error=float(far_error(network, target, far, FAR, problem.tokens)[0]),
            floor=floor,
            factors=sum(update.parameter_count for update in adapters.updates),
            **curve,
        )
        remainders.append(remainder)
    return remainders
