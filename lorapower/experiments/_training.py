"""Training that experiments share: by gradients, of all methods of one problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from .._records import Record
from ..adapters.core import Adapters
from ..errors import InputError
from ..training.engine import train
from ..training.tuning import LARGEST, Data, Tuning


class Gradient(Record):
    """What Adam tunes: biases or not, at a learning rate, with weight decay as an L2 penalty."""

    biases: bool = True
    learning_rate: float = Field(1e-3, gt=0, le=LARGEST)
    weight_decay: float = Field(0.0, ge=0, le=LARGEST)

    def tuning(self) -> Tuning:
        """What `training.train` is told."""
        return Tuning(**self.model_dump(exclude={"kind"}))


def one_problem(settings: Sequence[Any]) -> Any:
    """The problem that all of the settings have; raises `InputError` for several, or none."""
    if not isinstance(settings, Sequence) or not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    problem, *others = dict.fromkeys(getattr(setting, "problem", None) for setting in settings)
    if others or problem is None:
        raise InputError("settings", allowed="of one problem", value=settings)
    return problem


def train_fully(network: Any, data: Data, tuning: Tuning, **options: Any) -> Any:
    """The network after training of all its weights, in double precision."""
    full = replace(tuning, final=len(network.weights))
    return train(network, [full], data, **options).network[0].to(torch.float64)


def train_each(
    methods: Iterable[Any],
    frozen: Any,
    data: Data,
    tuning: Callable[[Any], Tuning] = Gradient.tuning,
    **options: Any,
) -> dict[Any, tuple[Any, Adapters, dict[str, Any]]]:
    """Train by all methods at once; for each its network, its adapters and columns of its run.

    `training.train` gets what ``tuning`` makes of each method, and ``options``.
    """
    distinct = [*dict.fromkeys(methods)]
    if not distinct:
        return {}
    runs = train(frozen, [tuning(method) for method in distinct], data, **options)
    return {
        method: (
            runs.network[i],
            runs.adapters[i],
            {
                "validation_loss": float(runs.best_loss[i]),
                "best_step": int(runs.best_step[i]),
                "diverged": bool(runs.diverged[i]),
            },
        )
        for i, method in enumerate(distinct)
    }
