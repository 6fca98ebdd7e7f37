"""Methods that adapt a network to a target, and what all problems measure of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorapower.adapters import Adapters
from lorapower.book.values import Values
from lorapower.constructions import adapt
from lorapower.regions import Region
from lorapower.training.engine import train
from lorapower.training.tuning import LARGEST, Data, Loss, Schedule, Tuning
from records.runs import Results

Rank = Annotated[int, Field(ge=0)]


class Construction(Values):
    """Adapt by the theorems' construction, ReLU networks on the problem's region."""

    kind: Literal["construction"] = "construction"
    ranks: Rank = 0


class Fitted(Values):
    """Adapt by a fit to ``inputs`` of them, perhaps polished by ``iterations`` of L-BFGS.

    Source: `constructions.fitted` and `training.polish`.
    """

    kind: Literal["fitted"] = "fitted"
    ranks: Rank = 0
    inputs: int = Field(4000, ge=2)
    polished: bool = False
    iterations: int = Field(400, ge=0)


class Trained(Values):
    """Train adapters, or the ``final`` weights in full, by Adam.

    The fields are those of `training.Tuning`. Raises `InputError` as it does.
    """

    kind: Literal["trained"] = "trained"
    ranks: Rank = 0
    final: int = Field(0, ge=0)
    biases: bool = True
    learning_rate: float = Field(1e-3, gt=0, le=LARGEST)
    weight_decay: float = Field(0.0, ge=0, le=LARGEST)
    schedule: Schedule = "constant"
    loss: Loss = "squared"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.tuning()
        return self

    def tuning(self) -> Tuning:
        """Make the settings that `training.train` takes."""
        return Tuning(**self.model_dump(exclude={"kind"}))


Method = Annotated[Construction | Fitted | Trained, Field(discriminator="kind")]


class AnyRun(Values):
    """Say which method is to solve which problem; raise `InputError` for ranks above the width."""

    problem: Any
    method: Any

    @model_validator(mode="after")
    def _fits_width(self) -> Self:
        width = self.problem.width
        self.method.require("ranks", self.method.ranks <= width, f"at most {width} (the width)")
        return self


class TrainingResults(Results):
    """Hold the least validation loss of a training, at ``best_step``; NaN and −1 without one."""

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False


def train_together(
    frozen: Any, tunings: Sequence[Tuning], data: Data, **options: Any
) -> Iterator[tuple[Any, Adapters, dict[str, Any]]]:
    """Train by several settings at once, each as it would be alone.

    Yields networks in double precision, adapters, and fields of `TrainingResults`.
    """
    if not tunings:
        return
    runs = train(frozen, tunings, data, **options)
    columns = (values.tolist() for values in (runs.best_loss, runs.best_step, runs.diverged))
    for network, adapters, *values in zip(runs.network, runs.adapters, *columns, strict=True):
        curve = dict(zip(TrainingResults.model_fields, values, strict=True))
        yield network.to(torch.float64), adapters, curve


def adapt_by(
    methods: Sequence[Construction | Fitted | Trained],
    frozen: Any,
    target: Any,
    data: Data,
    *,
    region: Region | None,
    fit: Callable[[Fitted], Adapters],
    **options: Any,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Adapt by each method; yield the networks, with fields of `TrainingResults`.

    ReLU networks are adapted on the ``region``; ``options`` are those of `training.train`.
    """
    tunings = [method.tuning() for method in methods if isinstance(method, Trained)]
    trained = train_together(frozen, tunings, data, **options)
    for method in methods:
        match method:
            case Trained():
                network, _, curve = next(trained)
                yield network, curve
            case Construction():
                adapted = adapt(frozen, target, method.ranks, region, throw=False)
                yield adapted.adapters.merge(frozen), {}
            case Fitted():
                yield fit(method).merge(frozen), {}


def measure_on(network: Any, x: Tensor, y: Tensor) -> float:
    """Compute the mean squared error of a network on inputs and outputs."""
    return float((network(x) - y).square().mean())
