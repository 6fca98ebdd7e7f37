"""The frame of all experiments: problems, methods and their measurement.

A kind of problem is a module with a `Problem`, its `Bench`, and what a run reaches, a `Course`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from .._records import Record, Results
from ..adapters import Adapters
from ..constructions.general import adapt
from ..errors import InputError
from ..networks.layers import FNN
from ..regions import Region
from ..training.engine import train
from ..training.tuning import LARGEST, Data, Loss, Schedule, Tuning

Rank = Annotated[int, Field(ge=0)]


class Construction(Record):
    """Adapt by the theorems' construction, ReLU networks on the problem's region."""

    kind: Literal["construction"] = "construction"
    ranks: Rank = 0


class Fitted(Record):
    """Adapt by a fit to ``inputs`` of them, perhaps polished by ``iterations`` of L-BFGS.

    Source: `constructions.fitted` and `training.polish`.
    """

    kind: Literal["fitted"] = "fitted"
    ranks: Rank = 0
    inputs: int = Field(4000, ge=2)
    polished: bool = False
    iterations: int = Field(400, ge=0)


class Trained(Record):
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


class Problem(Record, ABC):
    """Describe a frozen network, a target, and what there is to adapt with.

    ``methods`` are the classes of methods that take such a problem; no rank exceeds ``width``.
    """

    methods: ClassVar[tuple[type[Record], ...]] = Construction, Fitted, Trained

    @abstractmethod
    def bench(self) -> Bench:
        """Make the networks and the data."""

    def require_fit(self: Any, method: Any) -> None:
        """Raise `InputError` unless the method can solve the problem."""
        if not isinstance(method, self.methods):
            kinds = " or ".join(kind.__name__ for kind in self.methods)
            raise InputError("method", allowed=f"a {kinds}", value=method)
        method.require("ranks", method.ranks <= self.width, f"at most {self.width} (the width)")


class Setting(Record):
    """Say which method is to solve which problem; raise `InputError` if they do not fit."""

    problem: Problem
    method: Record

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.problem.require_fit(self.method)
        return self


class Course(Results):
    """Hold the least validation loss of a training, at ``best_step``; NaN and −1 without one."""

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False


class Bench(ABC):
    """Hold the networks and data of a problem, adapt by its methods, and test the outcome.

    ``course`` are further arguments of `training.train`. ReLU networks are adapted on the
    ``region``.
    """

    frozen: Any
    target: Any
    data: Data
    course: dict[str, Any]
    region: Region

    def tuning(self, method: Any) -> Tuning | None:
        """Make the settings of a training; None for methods without gradients."""
        return method.tuning() if isinstance(method, Trained) else None

    def adapt(self, method: Any) -> Adapters:
        """Make adapters by a method without gradients."""
        region = self.region if isinstance(self.frozen, FNN) else None
        return adapt(self.frozen, self.target, method.ranks, region, throw=False).adapters

    def finish(self, method: Any, network: Any, adapters: Adapters) -> tuple[Any, dict[str, Any]]:
        """Make the outcome of a training, in double precision."""
        return network.to(torch.float64), {}

    @abstractmethod
    def test(self, network: Any, **known: Any) -> Course:
        """Measure what a network reaches on new inputs, and add what is known."""


def measure(settings: Sequence[Setting]) -> list[Course]:
    """Measure what each setting reaches; raise `InputError` if they have several problems."""
    problems = {setting.problem for setting in settings}
    if len(problems) != 1:
        raise InputError("settings", allowed="of one problem", given=f"{len(problems)} problems")
    bench = problems.pop().bench()
    methods = [setting.method for setting in settings]
    found = dict(_measured(bench, dict.fromkeys(methods)))
    return [found[method] for method in methods]


def _measured(bench: Bench, methods: Iterable[Any]) -> Iterator[tuple[Any, Course]]:
    """Methods with their results; all trainings are one."""
    tunings = {method: bench.tuning(method) for method in methods}
    trained = {method: tuning for method, tuning in tunings.items() if tuning}
    for method, tuning in tunings.items():
        if tuning is None:
            yield method, bench.test(bench.adapt(method).merge(bench.frozen))
    if trained:
        runs = train(bench.frozen, [*trained.values()], bench.data, **bench.course)
        courses = runs.best_loss, runs.best_step, runs.diverged
        columns = (course.tolist() for course in courses)
        for method, network, adapters, *course in zip(
            trained, runs.network, runs.adapters, *columns, strict=True
        ):
            outcome, known = bench.finish(method, network, adapters)
            known |= dict(zip(Course.model_fields, course, strict=True))
            yield method, bench.test(outcome, **known)
