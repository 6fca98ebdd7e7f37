"""Residual transformers, of which one part of the blocks is adapted."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from .._records import Record
from ..adapters import Adapters
from ..bounds.floors import attention_floor, far_error
from ..networks.transformer import Part, Transformer
from ..regression import variance as variance_of
from ..training.tuning import Fresh, Tuning
from .study import Bench, Course, Problem, Rank

# Vectors by what is tuned: those of the floor of attention, or all.
VECTORS = {
    "free": ("b_Q", "b_O", "b_2"),
    "all": ("b_Q", "b_O", "b_2", "b_1", "g_1", "s_1", "g_2", "s_2", "g_f", "s_f"),
}
TEST, DIRECTIONS = 5000, 5000
# How far out tokens are for what is said of the limit.
FAR = 1e4


class TrainedPart(Record):
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


class Residual(Problem):
    """Draw two networks of one ReLU block with LayerNorms, a frozen one and a target, and inputs.

    ``width, hidden, heads, tokens`` are ``D, F, H, N``, and ``d = D // H``. Inputs have entries of
    standard deviation ``size``. Adam takes ``steps`` of ``samples`` sequences.
    """

    methods: ClassVar[tuple[type[Record], ...]] = (TrainedPart,)

    width: int = Field(8, ge=2)
    hidden: int = Field(16, ge=1)
    heads: int = Field(1, ge=1)
    tokens: int = Field(1, ge=1)
    size: float = Field(1.0, gt=0)
    steps: int = Field(2000, ge=1)
    samples: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)

    def networks(self) -> tuple[Transformer, Transformer]:
        """Draw the frozen network and the target."""
        options: Any = self.model_dump(include={"hidden", "seed"})
        options |= {"head_size": self.width // self.heads, "norm": "layer", "residual": True}
        frozen, target = (
            Transformer.random(1, self.width, self.heads, purpose=purpose, **options)
            for purpose in ("frozen", "target")
        )
        return frozen, target

    def data(self, target: Transformer, *purpose: str) -> Fresh:
        """Label inputs, others for each purpose."""
        options: Any = {"samples": self.samples, "scale": self.size, "seed": self.seed}
        return Fresh(target, (self.width, self.tokens), purpose=purpose, **options)

    def bench(self) -> Bench:
        """Make the networks and the data."""
        return _Bench(self)


class Remainder(Course):
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


class _Bench(Bench):
    def __init__(self, problem: Residual) -> None:
        self.frozen, self.target = problem.networks()
        self.data = problem.data(self.target)
        self.course = {"steps": problem.steps, "every": max(1, problem.steps // 40)}
        self.course["seed"] = problem.seed
        self.tokens = problem.tokens
        self.pair = tuple(part.to(self.frozen.dtype) for part in self.data.test(TEST))
        far = problem.data(self.target, "directions").test(DIRECTIONS)[0][..., 0]
        self.far = far.mT.to(self.frozen.dtype)

    def tuning(self, method: Any) -> Tuning:
        """Make the settings of a training."""
        names = (name.split()[0] for name in self.frozen.bias_names)
        tuned = VECTORS[method.vectors]
        return Tuning(
            ranks=self._ranks(method),
            biases=tuple(name in tuned for name in names),
            learning_rate=method.learning_rate,
            schedule="cosine",
        )

    def _ranks(self, method: TrainedPart) -> tuple[int, ...]:
        """The rank of each weight's adapter."""
        each = method.ranks, method.ranks + method.more
        usual, more = (self.frozen.ranks(rank, method.part) for rank in each)
        pairs = zip(self.frozen.kind_of_weight, usual, more, strict=True)
        return tuple(b if kind in ("W_V", "W_O") else a for kind, a, b in pairs)

    def finish(self, method: Any, network: Any, adapters: Adapters) -> tuple[Any, dict[str, Any]]:
        """Compute the floor."""
        adapters = adapters.to(self.frozen.dtype)
        floor = math.nan
        if method.part == "attention":
            ranks = self._ranks(method)
            floor = float(attention_floor(self.frozen, self.target, self.far, ranks).value)
        factors = sum(u.parameter_count for u in adapters.updates)
        return adapters.merge(self.frozen), {"floor": floor, "factors": factors}

    def test(self, network: Any, **known: Any) -> Remainder:
        x, y = self.pair
        relative = float((network(x) - y).square().mean() / variance_of(y - x))
        far, _ = far_error(network, self.target, self.far, FAR, self.tokens)
        return Remainder(relative=relative, far_error=float(far), **known)
