"""Adapt random networks to random targets, by the study's methods and by others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import randomness
from .._records import Record
from ..adapters import Adapters
from ..constructions import fitted
from ..constructions.fitted import FittedAdaptation
from ..lowrank import LowRank
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition
from ..networks.transformer import Transformer
from ..regions import Ball
from ..regression import variance as variance_of
from ..training.fused import linearized, polish, train_fused
from ..training.tuning import Data, Fixed, Fresh, Loss, Schedule, Tuning
from . import study
from .study import Course, Final, Gradient, Lora, Rank

Network = LinearNetwork | FNN | Transformer
# The parts of the initial loss at which pretraining stops: of none, and of the study's.
RANDOM, PRETRAINED = 1.0, 1 / 3
PRETRAINING = Tuning(learning_rate=1e-3)
PRETRAINING_STEPS = 1000
TEST_SAMPLES = 5000
# Inputs by which candidates of a fit are compared.
CHOOSING = 1000
SHIFT = 5.0


# The study's settings, and fewer of them: axes of a `Problem`, and of a method by gradients.
GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "quick": (
        {"steps": 2000, "every": 10, "seed": range(3)},
        {"learning_rate": [1e-2, 1e-3], "weight_decay": [0.0]},
    ),
    "paper": (
        {"steps": 5000, "every": 1, "seed": range(5)},
        {"learning_rate": [1e-2, 1e-3, 1e-4], "weight_decay": [0.0, 1e-4, 1e-3, 1e-2]},
    ),
}


class Problem(Record):
    """Draw a frozen network, a target, and what there is to train on.

    ``width``, ``target_depth`` and ``depth`` are ``D``, ``L̄`` and ``L``; transformers are of equal
    depth. ``scale`` is the standard deviation of their attention weights, ``gain`` a factor of
    other frozen weights. ``pretraining`` trains the frozen network in full on the target, until its
    loss is this part of the first or for 1000 steps. If ``distance_rank`` is not 0, the target is
    the product of each frozen block plus a random matrix of this rank, of ``distance`` times the
    product's Frobenius norm. In a classification, by cross-entropy, the class is the target's
    largest output, or the larger sum of its two halves. ``samples`` are in each fresh batch, or in
    the ``fixed`` training set. Raises `InputError` for values that do not fit each other.
    """

    model: Literal["linear", "fnn", "transformer"] = "fnn"
    width: int = Field(16, ge=1)
    target_depth: int = Field(1, ge=1)
    depth: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    tokens: int = Field(10, ge=1)
    scale: float = Field(1.0, gt=0)
    gain: float = Field(1.0, gt=0)
    pretraining: float = Field(RANDOM, gt=0)
    distance: float = Field(0.0, ge=0)
    distance_rank: int = Field(0, ge=0)
    task: Literal["regression", "multiclass", "binary"] = "regression"
    samples: int = Field(256, ge=1)
    fixed: bool = False
    steps: int = Field(5000, ge=1)
    every: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        transformer = self.model == "transformer"
        for field, fits, allowed in (
            ("depth", self.depth >= self.target_depth, "at least target_depth"),
            ("depth", not transformer or self.depth == self.target_depth, "target_depth"),
            ("distance_rank", not (transformer and self.distance_rank), "0 for a transformer"),
            ("fixed", not (transformer and self.fixed), "False for a transformer"),
            ("gain", not transformer or self.gain == 1, "1 for a transformer"),
            ("task", self.task == "regression" or self.model == "fnn", "regression but for fnn"),
        ):
            self.require(field, fits, allowed)
        return self

    @property
    def classes(self) -> list[int]:
        """List the class to which each output votes; none for a regression."""
        if self.task == "regression":
            return []
        outputs = range(self.width)
        return [i if self.task == "multiclass" else int(2 * i >= self.width) for i in outputs]

    def networks(self) -> tuple[Network, Network]:
        """Draw the frozen network and the target, in double precision."""
        kind: Any = {"linear": LinearNetwork, "fnn": FNN, "transformer": Transformer}[self.model]
        transformer = self.model == "transformer"
        options = {"heads": self.heads, "scale": self.scale} if transformer else {}
        frozen, target = (
            kind.random(depth, self.width, seed=self.seed, purpose=purpose, **options)
            for depth, purpose in ((self.depth, "frozen"), (self.target_depth, "target"))
        )
        if not transformer:
            frozen = frozen.with_parameters([self.gain * weight for weight in frozen.weights])
        return frozen, self._near(frozen, target) if self.distance_rank else target

    def start(self) -> tuple[Network, Network]:
        """Draw the frozen network, pretrained if the problem says so, and the target."""
        frozen, target = self.networks()
        if self.pretraining < 1:
            plain = self.replace(task="regression", fixed=False, samples=256)
            data, _ = plain.data(target, "pretraining")
            options = {"steps": PRETRAINING_STEPS, "until": self.pretraining, "seed": self.seed}
            frozen = study.train_fully(frozen, data, PRETRAINING, **options)
        return frozen, target

    def _near(self, frozen: LinearNetwork | FNN, target: Any) -> Any:
        """Put the target's weights at the given distance from the frozen blocks."""
        generator = randomness.generator(self.seed, "perturbation")
        shape = (self.width, self.distance_rank)
        weights = []
        for layers in Partition.uniform(self.depth, self.target_depth).slices:
            block = LinearNetwork(frozen.weights[layers]).product()
            left, right = (randomness.normal(generator, *shape) for _ in range(2))
            change = left @ right.mT
            size = self.distance * torch.linalg.matrix_norm(block)
            weights.append(block + size / torch.linalg.matrix_norm(change) * change)
        return target.with_parameters(weights)

    def data(self, target: Network, *purpose: str, scale: float = 1.0) -> tuple[Data, Fresh]:
        """Draw data to train on and fresh inputs to test on, others for each purpose and scale."""
        label: Any = (lambda x: self.votes(target(x)).argmax(-2)) if self.classes else target
        shape = (self.width, self.tokens) if self.model == "transformer" else (self.width,)
        draws: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "purpose": purpose}
        fresh = Fresh(label, shape, scale=scale, **draws)
        if not self.fixed:
            return fresh, fresh
        x, y = (part[0] for part in fresh.block(0))
        return Fixed((x, y), fresh.validation, seed=self.seed), fresh

    def votes(self, outputs: Tensor) -> Tensor:
        """Sum the outputs that vote for each class; ``[..., classes, samples]``."""
        votes = outputs.new_zeros(*outputs.shape[:-2], max(self.classes) + 1, outputs.shape[-1])
        return votes.index_add(-2, torch.tensor(self.classes), outputs)


class Construction(study.Construction):
    """Adapt by the theorems' construction, of ReLU networks on ``region`` times a ball.

    The ball contains nearly all inputs. A transformer has one rank for all weights.
    """

    region: float = Field(1.0, gt=0)


class Fitted(study.Fitted):
    """Adapt by a fit to inputs (`constructions.fitted.adapt`), and perhaps polish it.

    `training.polish` takes ``adam`` steps on fresh batches, then ``iterations`` of L-BFGS.
    """

    inputs: int = Field(4000, ge=2)
    polished: bool = False
    adam: int = Field(0, ge=0)
    iterations: int = Field(400, ge=0)


class Recipe(Gradient):
    """Train adapters by Adam with further options of `training.Tuning`, for regressions.

    It may also start from the adapters of a ``"construction"`` or a ``"fitted"`` one. Normal
    numbers, of ``perturbation`` times the root mean square of each factor, are then added.
    """

    kind: Literal["recipe"] = "recipe"
    ranks: Rank = 0
    schedule: Schedule = "constant"
    loss: Loss = "squared"
    final: int = Field(0, ge=0)
    start: Literal["study", "linearized", "construction", "fitted"] = "study"
    perturbation: float = Field(0.0, ge=0)


class Fused(Record):
    """Train the fused network and carry it back (`training.train_fused`), for regressions.

    It trains on the problem's inputs times ``input_scale``.
    """

    kind: Literal["fused"] = "fused"
    ranks: int = Field(1, ge=0)
    starts: int = Field(4, ge=1)
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = (1e-2,)
    input_scale: float = Field(1.0, gt=0)


Method = Construction | Fitted | Lora | Final | Recipe | Fused


class Setting(Record):
    """Say which method is to solve which problem; raise `InputError` if they do not fit."""

    problem: Problem = Problem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem, method = self.problem, self.method
        if not isinstance(method, Final):
            ranks = method.ranks if isinstance(method.ranks, tuple) else (method.ranks,)
            method.require("ranks", max(ranks) <= problem.width, "at most the width")
        if isinstance(method, Construction):
            fits = problem.model == "fnn" or method.region == 1
            method.require("region", fits, "1 but for model 'fnn'")
        if isinstance(method, Fitted):
            fits = problem.model != "transformer"
            method.require("kind", fits, "'fitted' but for transformers")
        if isinstance(method, Recipe | Fused):
            problem.require("task", problem.task == "regression", "'regression'")
        return self


class Errors(Course):
    """Hold what a run reaches on 5000 test inputs, on these times 5, and on a fixed training set.

    ``error`` is the mean squared error, ``accuracy`` the share of inputs put into the target's
    class. ``signal`` is the mean square of the target's outputs, ``variance`` the same about the
    mean of each. ``predicted`` is the error of a fit to first order over that variance. What does
    not apply is NaN.
    """

    error: float
    shifted_error: float
    training_error: float = math.nan
    accuracy: float = math.nan
    shifted_accuracy: float = math.nan
    training_accuracy: float = math.nan
    signal: float
    variance: float
    predicted: float = math.nan


def measure(settings: Sequence[Setting]) -> list[Errors]:
    """Measure what each setting reaches; raise `InputError` if they have several problems."""
    problem: Problem = study.one_problem(settings)
    bench = _Bench(problem)
    methods = [setting.method for setting in settings]
    trained = study.train_each(
        (method for method in methods if isinstance(method, Gradient)),
        bench.frozen,
        bench.data,
        bench.tuning,
        classes=problem.classes,
        **bench.course,
    )
    found = []
    for method in methods:
        if method in trained:
            network, about = trained[method].network, trained[method].course
        else:
            adapters, about = bench.adapt(method)
            network = adapters.merge(bench.frozen)
        found.append(Errors(**bench.test(network) | about))
    return found


class _Bench:
    """Has the networks and data of a problem, adapts by its methods, and tests the outcome."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.frozen, self.target = problem.start()
        self.data, fresh = problem.data(self.target)
        self.course = problem.model_dump(include={"steps", "every", "seed"})
        # Nearly all of the normal inputs are inside.
        self.radius = problem.width**0.5 + 4
        self.fits: dict[Fitted, FittedAdaptation] = {}
        x, _ = fresh.test(TEST_SAMPLES)
        inputs = {"": x, "shifted_": SHIFT * x}
        if isinstance(self.data, Fixed):
            inputs["training_"] = self.data.training[0]
        self.inputs = {name: x.to(torch.float64) for name, x in inputs.items()}
        self.outputs = {name: self.target(x) for name, x in self.inputs.items()}

    def test(self, network: Network) -> dict[str, float]:
        """Errors, and for a classification the accuracies, of one network."""
        network = network.to(torch.float64)
        y = self.outputs[""]
        found = {"signal": float(y.square().mean()), "variance": float(variance_of(y))}
        for kind, x in self.inputs.items():
            out, target = network(x), self.outputs[kind]
            found[f"{kind}error"] = float((out - target).square().mean())
            if self.problem.classes:
                chosen, right = (self.problem.votes(each).argmax(-2) for each in (out, target))
                found[f"{kind}accuracy"] = float((chosen == right).double().mean())
        return found

    def tuning(self, method: Any) -> Tuning:
        """Settings of a method by gradients, with its start."""
        if not isinstance(method, Recipe):
            return Gradient.tuning(method)
        start: Adapters | None = None
        if method.start == "linearized":
            blocks = Partition.uniform(self.problem.depth, self.problem.target_depth)
            start = linearized(self.frozen, self.data, blocks)
        elif method.start != "study":
            source: Any = Construction if method.start == "construction" else Fitted
            adapters, _ = self.adapt(source(ranks=method.ranks))
            start = _perturb(adapters.balanced(), method.perturbation, self.problem.seed)
        options = method.model_dump(exclude={"kind", "start", "perturbation"})
        return Tuning(**options, start=start)

    def adapt(self, method: Any) -> tuple[Adapters, dict[str, float]]:
        """Adapters of another method, and fields of `Errors` that it knows."""
        if isinstance(method, Fitted):
            fit = self.fit(method)
            return fit.adapters, {"predicted": float(fit.predicted)}
        if isinstance(method, Fused):
            depths = self.problem.depth, self.problem.target_depth
            found = train_fused(
                self.frozen,
                method.ranks,
                self.problem.data(self.target, scale=method.input_scale)[0],
                partition=Partition.uniform(*depths) if isinstance(self.frozen, FNN) else None,
                starts=method.starts,
                learning_rates=method.learning_rates,
                throw=False,
                **self.course,
            )
            return found.adapters, {"validation_loss": float(found.validation_loss.min())}
        region = Ball(method.region * self.radius)
        return study.construct(self.frozen, self.target, method.ranks, region), {}

    def fit(self, method: Fitted) -> FittedAdaptation:
        """Adapters fitted to inputs; those that are polished may have been fitted already."""
        plain = method.replace(polished=False, adam=0, iterations=0)
        method = method if method.polished else plain
        if method in self.fits:
            return self.fits[method]
        x = self.sample("calibration", method.inputs), self.sample("choosing", 2 * CHOOSING)
        if method.polished:
            found = polish(
                self.fit(plain),
                *x,
                steps=method.adam,
                iterations=method.iterations,
                data=self.problem.data(self.target, "polishing")[1],
                seed=self.problem.seed,
                throw=False,
            )
        else:
            region = Ball(self.radius) if self.problem.model == "fnn" else None
            pair = self.frozen, self.target
            found = fitted.adapt(*pair, method.ranks, *x, region=region, throw=False)
        return self.fits.setdefault(method, found)

    def sample(self, purpose: str, count: int) -> Tensor:
        """Inputs that are drawn for one purpose."""
        return self.problem.data(self.target, purpose)[1].test(count)[0].to(torch.float64)


def _perturb(adapters: Adapters, size: float, seed: int) -> Adapters:
    """Adapters with normal numbers added to each part, of so many times its root mean square."""
    generator = randomness.generator(seed, "perturbation of adapters")

    def move(part: Tensor) -> Tensor:
        drawn = randomness.normal(generator, *part.shape, dtype=part.dtype)
        return part + size * part.square().mean().sqrt() * drawn

    updates = tuple(LowRank(move(u.left), move(u.right)) for u in adapters.updates)
    return Adapters(updates, tuple(map(move, adapters.bias_updates)), adapters.tuned)
