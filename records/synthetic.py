"""Random networks that are adapted to random targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorapower.adapters import Adapters
from lorapower.book.values import Values
from lorapower.constructions import adapt_fitted
from lorapower.constructions.fitted import FittedAdaptation
from lorapower.networks.layers import FNN, LinearNetwork
from lorapower.regions import Ball
from lorapower.regression import variance as variance_of
from lorapower.training.descent import polish
from lorapower.training.engine import train
from lorapower.training.tuning import Fresh, Tuning
from records.methods import AnyRun, Fitted, Method, TrainingResults, adapt_by, measure_on

# The parts of the initial loss at which pretraining stops: of none, and of the study's.
RANDOM, PRETRAINED = 1.0, 1 / 3
TEST_SAMPLES = 5000
# Inputs by which candidates of a fit are compared.
CHOOSING = 1000


class Synthetic(Values):
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


class Run(AnyRun):
    """Say which method is to solve which problem; raise `InputError` if they do not fit."""

    problem: Synthetic
    method: Method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        fits = self.problem.model == "fnn" or not isinstance(self.method, Fitted)
        self.problem.require("model", fits, "fnn, the networks that are fitted")
        return self


class Errors(TrainingResults):
    """Hold what a run reaches on 5000 test inputs.

    ``error`` is the mean squared error, ``variance`` that of the target's outputs about the mean of
    each.
    """

    error: float
    variance: float


def measure(runs: Sequence[Run]) -> list[Errors]:
    """Measure what each run of one problem reaches."""
    (problem,) = {run.problem for run in runs}
    frozen, target = problem.start()
    data = problem.data(target)
    x = data.test(TEST_SAMPLES)[0].to(torch.float64)
    y = target(x)
    variance = float(variance_of(y))
    # Nearly all of the normal inputs are inside.
    region = Ball(problem.width**0.5 + 4) if isinstance(frozen, FNN) else None

    def samples(inputs: int) -> Iterator[Tensor]:
        for purpose, count in (("calibration", inputs), ("choosing", 2 * CHOOSING)):
            yield problem.data(target, purpose).test(count)[0].to(torch.float64)

    @cache
    def fit_plainly(ranks: int, inputs: int) -> FittedAdaptation:
        options: Any = {"on": region, "throw": False}
        return adapt_fitted(frozen, target, ranks, *samples(inputs), **options)

    def fit(method: Fitted) -> Adapters:
        adaptation = fit_plainly(method.ranks, method.inputs)
        if method.polished:
            options: Any = {"iterations": method.iterations, "steps": 0, "throw": False}
            adaptation = polish(adaptation, *samples(method.inputs), **options)
        return adaptation.adapters

    methods = [run.method for run in runs]
    options: Any = problem.model_dump(include={"steps", "every", "seed"})
    adapted = adapt_by(methods, frozen, target, data, region=region, fit=fit, **options)
    return [
        Errors(error=measure_on(network, x, y), variance=variance, **curve)
        for network, curve in adapted
    ]
