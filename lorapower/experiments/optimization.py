"""Ways to train adapters, on the study's synthetic problems: how often each arrives.

A problem is a `synthetic.Problem` of a regression. `measure` takes any number of ways to train on
one problem, and is what `sweeps.run` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import _checks, randomness
from .._records import Record
from ..adapters.core import Adapters
from ..constructions import fitted
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.fnn import FNN
from ..networks.partition import Partition
from ..regions import Ball
from ..training.descent import newton
from ..training.engine import begin, train
from ..training.fused import train_fused
from ..training.tuning import Data, Loss, Schedule, Start, Tuning
from . import methods
from .synthetic import Fitted as Fit
from .synthetic import Found, Problem, Tests, fitting_inputs

# Samples by which `newton` chooses.
HELD_OUT = 1000


class Recipe(methods.Gradient):
    """Adam on adapters, with what may help it.

    Attributes
    ----------
    schedule, loss, ratio
        As `training.Tuning` has them.
    start : Start or {"construction", "fitted"}
        As there; or ``"construction"``, the theorem's adapters, or ``"fitted"``, those that are
        fitted to inputs.
    perturbation : float
        Of these two: each factor and each change of a bias is moved by normal numbers of so many
        times its own root mean square.
    """

    kind: Literal["recipe"] = "recipe"
    ranks: methods.Rank = 0
    schedule: Schedule = "constant"
    loss: Loss = "squared"
    ratio: float = Field(1.0, gt=0)
    start: Start | Literal["construction", "fitted"] = "study"
    perturbation: float = Field(0.0, ge=0)


class Fused(Record):
    """Training of the fused network, carried back: see `training.train_fused`."""

    kind: Literal["fused"] = "fused"
    ranks: int = Field(1, ge=0)
    starts: int = Field(4, ge=1)
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = (1e-2,)


class Newton(Record):
    """Levenberg–Marquardt on fixed samples, see `training.newton`.

    Attributes
    ----------
    training_samples : int
        It is given; ``iterations`` at most.
    """

    kind: Literal["newton"] = "newton"
    ranks: int = Field(1, ge=0)
    start: Start = "linearized"
    loss: Loss = "one-sided"
    training_samples: int = Field(700, ge=1)
    iterations: int = Field(25, ge=0)


class Setting(Record):
    """One run. Raises `InputError` for a way that does not fit the problem."""

    problem: Problem = Problem()
    method: Annotated[Recipe | Fused | Newton, Field(discriminator="kind")] = Recipe()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem, method = self.problem, self.method
        if problem.task != "regression":
            raise InputError("task", allowed="'regression'", given=problem.task)
        _checks.integer("ranks", method.ranks, 0, problem.width, limit="the width")
        if problem.model != "fnn" and not isinstance(method, Fused):
            if method.start == "linearized":
                raise InputError(
                    "start", allowed="another, but for model 'fnn'", given="linearized"
                )
            if method.loss == "one-sided":
                raise InputError(
                    "loss", allowed="'squared', but for model 'fnn'", given=method.loss
                )
        return self


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting of one problem reaches; raises `InputError` for several problems."""
    problem: Problem = methods.common_problem(settings)
    frozen, target = problem.start()
    data, fresh = problem.data(target)
    tests = Tests(problem, target, data, fresh)
    asked = [setting.method for setting in settings]
    found: dict[Any, dict[str, Any]] = {}
    recipes = list(dict.fromkeys(method for method in asked if isinstance(method, Recipe)))
    course: dict[str, Any] = {"steps": problem.steps, "every": problem.every, "seed": problem.seed}
    if recipes:
        tunings = [_tuning(method, problem, frozen, target) for method in recipes]
        runs = train(frozen, tunings, data, **course)
        for i, method in enumerate(recipes):
            found[method] = {
                **tests.of(runs.network[i]),
                "validation_loss": float(runs.best_loss[i]),
                "best_step": int(runs.best_step[i]),
                "diverged": bool(runs.diverged[i]),
            }
    for other in dict.fromkeys(asked):
        if isinstance(other, Fused):
            adapters, loss = _fused(other, problem, frozen, data, course)
        elif isinstance(other, Newton):
            adapters, loss = _newton(other, problem, frozen, target, data)
        else:
            continue
        found[other] = {**tests.of(adapters.merge(frozen)), **loss}
    return [Found(**found[method]) for method in asked]


def perturbed(adapters: Adapters, size: float, seed: int = 0) -> Adapters:
    """Adapters with normal numbers added to each part, of so many times its root mean square."""
    _checks.kind(Adapters, adapters=adapters)
    size = _checks.tolerance("size", size)
    generator = randomness.generator(seed, "perturbation of adapters")

    def moved(part: Tensor) -> Tensor:
        drawn = randomness.normal(generator, *part.shape, dtype=part.dtype, device=part.device)
        return part + size * part.square().mean().sqrt().nan_to_num(0) * drawn

    updates = tuple(LowRank(moved(u.left), moved(u.right)) for u in adapters.updates)
    return Adapters(updates, tuple(map(moved, adapters.bias_updates)), adapters.tuned)


def _tuning(method: Recipe, problem: Problem, frozen: Any, target: Any) -> Tuning:
    options = method.model_dump(exclude={"kind", "start", "perturbation"})
    if method.start == "linearized":
        options["blocks"] = problem.target_depth
    region = Ball(problem.width**0.5 + 4)
    if method.start == "construction":
        adapters = methods.construct(frozen, target, method.ranks, region)
    elif method.start == "fitted":
        x = fitting_inputs(problem, target, Fit().inputs)
        adapters = fitted.adapt(
            frozen, target, method.ranks, *x, region=region, throw=False
        ).adapters
    else:
        return Tuning(**options, start=method.start)
    start = perturbed(adapters.balanced(), method.perturbation, problem.seed)
    return Tuning(**options, start=start)


def _fused(
    method: Fused, problem: Problem, frozen: Any, data: Data, course: dict[str, Any]
) -> tuple[Adapters, dict[str, float]]:
    relu = isinstance(frozen, FNN)
    found = train_fused(
        frozen,
        method.ranks,
        data,
        partition=Partition.uniform(problem.depth, problem.target_depth) if relu else None,
        starts=method.starts,
        learning_rates=method.learning_rates,
        throw=False,
        **course,
    )
    return found.adapters, {"validation_loss": float(found.validation_loss.min())}


def _newton(
    method: Newton, problem: Problem, frozen: Any, target: Any, data: Data
) -> tuple[Adapters, dict[str, float]]:
    blocks = problem.target_depth if method.start == "linearized" else 1
    tuning = Tuning(method.ranks, start=method.start, blocks=blocks)
    start = begin(frozen, [tuning], data, seed=problem.seed)[0].to(torch.float64)

    def pair(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        x = problem.data(target, purpose)[1].test(count)[0].to(torch.float64)
        return x, target(x)

    samples, others = pair("newton", method.training_samples), pair("newton, held out", HELD_OUT)
    found = newton(frozen, start, samples, others, method.iterations, loss=method.loss)
    losses = {"validation_loss": found.validation_loss, "training_error": found.training_loss}
    return found.adapters, {name: float(loss.min()) for name, loss in losses.items()}
