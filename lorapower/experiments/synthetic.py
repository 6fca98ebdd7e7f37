"""Random networks that are adapted to random targets."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..adapters import Adapters
from ..constructions import fitted
from ..constructions.fitted import FittedAdaptation
from ..networks.layers import FNN, LinearNetwork
from ..regions import Ball
from ..regression import variance as variance_of
from ..training.engine import train
from ..training.fused import polish
from ..training.tuning import Fresh, Tuning
from .study import Bench, Course, Fitted, Problem

# The parts of the initial loss at which pretraining stops: of none, and of the study's.
RANDOM, PRETRAINED = 1.0, 1 / 3
TEST_SAMPLES = 5000
# Inputs by which candidates of a fit are compared.
CHOOSING = 1000


class Synthetic(Problem):
    """Draw a frozen network, a target, and what there is to train on.

    ``width``, ``target_depth`` and ``depth`` are ``D``, ``L̄`` and ``L``. ``pretraining`` trains the
    frozen network in full on the target, until its loss is this part of the first or for 1000
    steps. ``samples`` are in each fresh batch. Raises `InputError` for values that do not fit each
    other.
    """

    model: Literal["linear", "fnn"] = "fnn"
    width: int = Field(16, ge=1)
    target_depth: int = Field(1, ge=1)
    depth: int = Field(2, ge=1)
    pretraining: float = Field(RANDOM, gt=0)
    samples: int = Field(256, ge=1)
    steps: int = Field(5000, ge=1)
    every: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.require("depth", self.depth >= self.target_depth, "at least target_depth")
        return self

    def networks(self) -> tuple[Any, Any]:
        """Draw the frozen network and the target, in double precision."""
        kind = LinearNetwork if self.model == "linear" else FNN
        frozen, target = (
            kind.random(depth, self.width, seed=self.seed, purpose=purpose)
            for depth, purpose in ((self.depth, "frozen"), (self.target_depth, "target"))
        )
        return frozen, target

    def start(self) -> tuple[Any, Any]:
        """Draw the frozen network, pretrained if the problem says so, and the target."""
        frozen, target = self.networks()
        if self.pretraining < 1:
            data = self.data(target, "pretraining")
            tuning = Tuning(final=self.depth, learning_rate=1e-3)
            options: Any = {"until": self.pretraining, "seed": self.seed}
            trained = train(frozen, [tuning], data, steps=1000, **options)
            frozen = trained.network[0].to(torch.float64)
        return frozen, target

    def data(self, target: Any, *purpose: str) -> Fresh:
        """Draw inputs to train and to test on, others for each purpose."""
        options: Any = {"samples": self.samples, "seed": self.seed, "purpose": purpose}
        return Fresh(target, (self.width,), **options)

    def bench(self) -> Bench:
        """Make the networks and the data."""
        return _Bench(self)


class Errors(Course):
    """Hold what a run reaches on 5000 test inputs.

    ``error`` is the mean squared error, ``variance`` that of the target's outputs about the mean of
    each.
    """

    error: float
    variance: float


class _Bench(Bench):
    def __init__(self, problem: Synthetic) -> None:
        self.problem = problem
        self.frozen, self.target = problem.start()
        self.data = problem.data(self.target)
        self.course = problem.model_dump(include={"steps", "every", "seed"})
        # Nearly all of the normal inputs are inside.
        self.region = Ball(problem.width**0.5 + 4)
        self.fits: dict[Fitted, FittedAdaptation] = {}
        self.x = self.data.test(TEST_SAMPLES)[0].to(torch.float64)
        self.y = self.target(self.x)

    def adapt(self, method: Any) -> Adapters:
        """Make adapters by a method without gradients; polished ones start at a fit."""
        if not isinstance(method, Fitted):
            return super().adapt(method)
        x = self._sample("calibration", method.inputs), self._sample("choosing", 2 * CHOOSING)
        plain = Fitted(ranks=method.ranks, inputs=method.inputs)
        if plain not in self.fits:
            region = self.region if isinstance(self.frozen, FNN) else None
            pair = self.frozen, self.target
            found = fitted.adapt(*pair, method.ranks, *x, region=region, throw=False)
            self.fits[plain] = found
        fit = self.fits[plain]
        if method.polished:
            fit = polish(fit, *x, iterations=method.iterations, throw=False)
        return fit.adapters

    def _sample(self, purpose: str, count: int) -> Tensor:
        """Inputs that are drawn for one purpose."""
        return self.problem.data(self.target, purpose).test(count)[0].to(torch.float64)

    def test(self, network: Any, **known: Any) -> Errors:
        error = (network(self.x) - self.y).square().mean()
        return Errors(error=float(error), variance=float(variance_of(self.y)), **known)
