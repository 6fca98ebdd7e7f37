"""Experiments on residual transformers: what adapters of one part of the blocks leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .._records import Record, Results
from ..adapters import Adapters, Tuned
from ..bounds.floors import attention_floor, far_error, feed_forward_floor
from ..networks.transformer import Activation, Part, Transformer
from ..regression import variance as variance_of
from ..training.descent import descend
from ..training.tuning import Fresh, Tuning
from . import study

# Vectors by what is tuned: those of the theorem on attention, all, or those that follow attention.
VECTORS = {
    "free": ("b_Q", "b_O", "b_2"),
    "all": ("b_Q", "b_O", "b_2", "b_1", "g_1", "s_1", "g_2", "s_2", "g_f", "s_f"),
    "mlp": ("b_O", "b_2", "b_1", "g_2", "s_2"),
}
FIT, SELECT, TEST, DIRECTIONS = 1000, 500, 5000, 5000
# How far out tokens are for what is said of the limit.
FAR = 1e4


class Problem(Record):
    """A frozen network and a target of one kind, with LayerNorms, and inputs ``N(0, c² I)``.

    ``width, hidden, heads, head_size, depth, tokens, size`` are ``D, F, H, d, L, N, c``; a head
    size of 0 is the width. Adam takes ``steps`` of ``samples`` sequences.
    """

    width: int = Field(8, ge=2)
    hidden: int = Field(16, ge=1)
    heads: int = Field(1, ge=1)
    head_size: int = Field(0, ge=0)
    depth: int = Field(1, ge=1)
    activation: Activation = "relu"
    tokens: int = Field(1, ge=1)
    size: float = Field(1.0, gt=0)
    steps: int = Field(2000, ge=1)
    samples: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)

    def networks(self) -> tuple[Transformer, Transformer]:
        """Draw the frozen network and the target."""
        frozen, target = (
            Transformer.random(
                self.depth,
                self.width,
                self.heads,
                head_size=self.head_size or self.width,
                hidden=self.hidden,
                activation=self.activation,
                norm="layer",
                residual=True,
                seed=self.seed,
                purpose=purpose,
            )
            for purpose in ("frozen", "target")
        )
        return frozen, target

    def data(self, target: Transformer, *purpose: str) -> Fresh:
        """Label inputs, others for each purpose."""
        options: Any = {"samples": self.samples, "scale": self.size, "seed": self.seed}
        return Fresh(target, (self.width, self.tokens), purpose=purpose, **options)


class Trained(Record):
    """Adapters of one rank on a part of the blocks, by Adam at a falling rate, then L-BFGS.

    ``W_V`` and ``W_O`` have ``more`` rank than the rest. Of the vectors ``"free"`` tunes
    ``b_Q, b_O, b_2``, ``"all"`` also ``b_1``, gains and shifts; ``"mlp"`` those that follow
    attention. L-BFGS takes ``iterations`` on fixed inputs.
    """

    kind: Literal["trained"] = "trained"
    part: Part = "attention"
    rank: int = Field(8, ge=0)
    more: int = Field(0, ge=0)
    vectors: Literal["free", "all", "mlp"] = "all"
    learning_rate: float = Field(1e-2, gt=0)
    iterations: int = Field(0, ge=0)


class Setting(Record):
    """One run."""

    problem: Problem = Problem()
    method: Trained = Trained()


class Remainder(Results):
    """Mean squared errors of a run over fresh inputs.

    ``relative`` is the error over the variance of what the target adds to its inputs, ``far_error``
    the error at sequences far out. ``floor`` is the `bounds.attention_floor` of the adapters' ranks
    at single tokens, or the `bounds.feed_forward_floor` if the part is ``"mlp"``. ``factors``
    counts the adapters' numbers.
    """

    error: float
    relative: float
    far_error: float
    far_standard_error: float
    floor: float
    floor_standard_error: float
    factors: int
    diverged: bool = False


def measure(settings: Sequence[Setting]) -> list[Remainder]:
    """Measure what each setting of one problem reaches; `InputError` for several problems."""
    problem: Problem = study.one_problem(settings)
    frozen, target = problem.networks()
    methods = [setting.method for setting in settings]

    def biases_of(method: Trained) -> tuple[bool, ...]:
        return tuple(name.split()[0] in VECTORS[method.vectors] for name in frozen.bias_names)

    def tuning(method: Trained) -> Tuning:
        return Tuning(
            ranks=_ranks(method, frozen),
            biases=biases_of(method),
            learning_rate=method.learning_rate,
            schedule="cosine",
        )

    def pair(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        x = problem.data(target, purpose).test(count)[0].to(target.dtype)
        return x, target(x)

    trained = study.train_each(
        methods,
        frozen,
        problem.data(target),
        tuning,
        steps=problem.steps,
        every=max(1, problem.steps // 40),
        seed=problem.seed,
    )
    fit, select = pair("fitting", FIT), pair("choosing", SELECT)
    x, y = (part.to(frozen.dtype) for part in problem.data(target).test(TEST))
    variance = float(variance_of(y - x))
    far = problem.data(target, "directions").test(DIRECTIONS)[0][..., 0].mT.to(frozen.dtype)
    found = []
    for method in methods:
        adapters = trained[method].adapters.to(frozen.dtype)
        if method.iterations:
            tuned = Tuned(torch.tensor(adapters.ranks), torch.tensor(biases_of(method)))
            start = Adapters(adapters.updates, adapters.bias_updates, tuned)
            adapters = descend(frozen, start, fit, select, method.iterations)
        network = adapters.merge(frozen)
        error = float((network(x) - y).square().mean())
        out, spread = far_error(network, target, far, FAR, problem.tokens)
        if method.part == "mlp":
            floor, floor_spread = feed_forward_floor(frozen, target, far, problem.tokens)
        else:
            floor, floor_spread, *_ = attention_floor(frozen, target, far, _ranks(method, frozen))
        found.append(
            Remainder(
                error=error,
                relative=error / variance,
                far_error=float(out),
                far_standard_error=float(spread),
                floor=float(floor),
                floor_standard_error=float(floor_spread),
                factors=sum(u.parameter_count for u in adapters.updates),
                diverged=trained[method].course["diverged"],
            )
        )
    return found


def _ranks(method: Trained, network: Transformer) -> tuple[int, ...]:
    """List the rank of each weight's adapter."""
    usual, more = (network.ranks(method.rank + add, method.part) for add in (0, method.more))
    each = zip(network.kind_of_weight, usual, more, strict=True)
    return tuple(b if kind in ("W_V", "W_O") else a for kind, a, b in each)
