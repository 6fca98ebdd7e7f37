"""The methods that kinds of experiments share, how these train, and the best run of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
from pydantic import Field

from .._records import Record, Results
from ..adapters import Adapters
from ..constructions.general import adapt
from ..errors import InputError
from ..networks.layers import FNN
from ..regions import Region
from ..training.engine import train
from ..training.tuning import LARGEST, Data, Tuning
from . import sweeps

Rank = Annotated[int, Field(ge=0)]
# One for all weights, or one for each.
Ranks = Rank | tuple[Rank, ...]


class Construction(Record):
    """Adapt by the theorems' construction."""

    kind: Literal["construction"] = "construction"
    ranks: Ranks = 0


class Fitted(Record):
    """Adapt by the construction for the target nearest on inputs (`constructions.fitted`)."""

    kind: Literal["fitted"] = "fitted"
    ranks: Ranks = 0


class Gradient(Record):
    """Tune by Adam, biases or not, with weight decay as an L2 penalty."""

    biases: bool = True
    learning_rate: float = Field(1e-3, gt=0, le=LARGEST)
    weight_decay: float = Field(0.0, ge=0, le=LARGEST)

    def tuning(self) -> Tuning:
        """Make the settings that `training.train` takes."""
        return Tuning(**self.model_dump(exclude={"kind"}))


class Lora(Gradient):
    """Train adapters, and ``biases`` or not, by Adam with weight decay as an L2 penalty."""

    kind: Literal["lora"] = "lora"
    ranks: Ranks = 0


class Final(Gradient):
    """Train the last weights, ``final`` of them, in full by Adam."""

    kind: Literal["final"] = "final"
    final: int = Field(1, ge=1)


class Course(Results):
    """The least validation loss of a training, at ``best_step``; NaN and −1 without one."""

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False


class Trained(NamedTuple):
    """A network that was trained, its adapters, and the fields of its `Course`."""

    network: Any
    adapters: Adapters
    course: dict[str, Any]


def one_problem(settings: Sequence[Any]) -> Any:
    """Return the problem that all settings have; raise `InputError` for none or several."""
    problems = {setting.problem for setting in settings}
    if len(problems) != 1:
        raise InputError("settings", allowed="of one problem", given=f"{len(problems)} problems")
    return problems.pop()


def construct(frozen: Any, target: Any, ranks: Any, region: Region) -> Adapters:
    """Make the theorems' adapters, whatever rounding costs; a ReLU network's over a region."""
    inputs = region if isinstance(frozen, FNN) else None
    return adapt(frozen, target, ranks, inputs, throw=False).adapters


def train_fully(network: Any, data: Data, tuning: Tuning, **options: Any) -> Any:
    """Train all weights of a network; return it in double precision."""
    full = replace(tuning, final=len(network.weights))
    return train(network, [full], data, **options).network[0].to(torch.float64)


def train_each(
    methods: Iterable[Any],
    frozen: Any,
    data: Data,
    tuning: Callable[[Any], Tuning] = Gradient.tuning,
    **options: Any,
) -> dict[Any, Trained]:
    """Train a frozen network by all methods at once; `training.train` gets the ``options``."""
    distinct = [*dict.fromkeys(methods)]
    if not distinct:
        return {}
    runs = train(frozen, [tuning(method) for method in distinct], data, **options)
    columns = runs.best_loss.tolist(), runs.best_step.tolist(), runs.diverged.tolist()
    courses = [
        dict(zip(Course.model_fields, row, strict=True)) for row in zip(*columns, strict=True)
    ]
    each = zip(runs.network, runs.adapters, courses, strict=True)
    return {method: Trained(*run) for method, run in zip(distinct, each, strict=True)}


def keep_best(table: pd.DataFrame, record: type[Record]) -> pd.DataFrame:
    """Keep the row of least validation loss of each setting, rate and weight decay aside.

    ``table`` has settings of class ``record``. A run that diverged counts by its loss before that.
    """
    of_grid = ("learning_rate", "weight_decay")
    same = [name for name in sweeps.columns(record) if name in table and name not in of_grid]
    ordered = table.sort_values("validation_loss", kind="stable", na_position="last")
    return ordered.groupby(same, sort=False, dropna=False).head(1).sort_index()
