"""Methods that adapt a network to a target, and what all problems measure of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorapower.adapters import Adapters
from lorapower.book.values import Values
from lorapower.constructions import adapt
from lorapower.errors import InputError
from lorapower.regions import Region
from lorapower.training.engine import train
from lorapower.training.tuning import LARGEST, Data, Loss, Schedule, Tuning
from records.runs import Results

M = TypeVar("M", bound=Hashable)
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


class TrainingResults(Results):
    """Hold the least validation loss of a training, at ``best_step``; NaN and −1 without one."""

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False


def train_together(
    frozen: Any, tunings: Mapping[M, Tuning], data: Data, **options: Any
) -> Iterator[tuple[M, Any, Adapters, dict[str, Any]]]:
    """Train by several settings at once, each as it would be alone.

    Yields their keys, networks in double precision, adapters, and fields of `TrainingResults`.
    """
    if not tunings:
        return
    runs = train(frozen, [*tunings.values()], data, **options)
    columns = (values.tolist() for values in (runs.best_loss, runs.best_step, runs.diverged))
    rows = zip(tunings, runs.network, runs.adapters, *columns, strict=True)
    for key, network, adapters, *values in rows:
        curve = dict(zip(TrainingResults.model_fields, values, strict=True))
        yield key, network.to(torch.float64), adapters, curve


def adapt_by(
    methods: Iterable[Construction | Fitted | Trained],
    frozen: Any,
    target: Any,
    data: Data,
    *,
    region: Region | None,
    fit: Callable[[Fitted], Adapters],
    **options: Any,
) -> Iterator[tuple[Construction | Fitted | Trained, Any, dict[str, Any]]]:
    """Adapt by each method once; yield it, the network, and fields of `TrainingResults`.

    ReLU networks are adapted on the ``region``; ``options`` are those of `training.train`.
    """
    tunings = {}
    for method in dict.fromkeys(methods):
        match method:
            case Trained():
                tunings[method] = method.tuning()
            case Construction():
                adapted = adapt(frozen, target, method.ranks, region, throw=False)
                yield method, adapted.adapters.merge(frozen), {}
            case Fitted():
                yield method, fit(method).merge(frozen), {}
    for trained, network, _, curve in train_together(frozen, tunings, data, **options):
        yield trained, network, curve


def measure_on(network: Any, x: Tensor, y: Tensor) -> float:
    """Compute the mean squared error of a network on inputs and outputs."""
    return float((network(x) - y).square().mean())


def fits_width(run: Any, width: int) -> None:
    """Raise `InputError` if a run adapts by more ranks than a weight can have."""
    run.method.require("ranks", run.method.ranks <= width, f"at most {width} (the width)")


def only_problem(runs: Sequence[Any]) -> Any:
    """Give the problem of runs; raise `InputError` if they have several, or there are none."""
    problems = {run.problem for run in runs}
    if len(problems) != 1:
        raise InputError("settings", allowed="of one problem", given=f"{len(problems)} problems")
    return problems.pop()
