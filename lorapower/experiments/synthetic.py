"""The study's experiments on synthetic problems, and ways to train that may do better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import randomness
from .._records import Record, Results
from ..adapters.core import Adapters
from ..bounds.layers import variance as variance_of
from ..constructions import fitted, fnn
from ..constructions.fitted import Fitted as FittedAdapters
from ..lowrank import LowRank
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition
from ..networks.transformer import Transformer
from ..regions import Ball
from ..training import descent, fused
from ..training.engine import begin
from ..training.fused import polish, train_fused
from ..training.tuning import MARGIN, Data, Fixed, Fresh, Loss, Schedule, Start, Tuning
from . import study
from ._training import Gradient, one_problem, train_each, train_fully
from .study import Final, Lora, Rank

Network = LinearNetwork | FNN | Transformer
# Part of the initial loss at which pretraining stops, for the two published kinds.
RANDOM, PRETRAINED = 1.0, 1 / 3
PRETRAINING = Tuning(learning_rate=1e-3)
PRETRAINING_STEPS = 1000
TEST_SAMPLES = 5000
# Inputs by which candidates of a fit are compared, and those by which `Newton` chooses.
CHOOSING = 1000
SHIFT = 5.0

# What the problems and what the optimizer of the study's grids are, beside their networks.
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "problem": {"steps": 2000, "every": 10, "seed": range(3)},
        "optimizer": {"learning_rate": [1e-2, 1e-3], "weight_decay": [0.0]},
    },
    "paper": {
        "problem": {"steps": 5000, "every": 1, "seed": range(5)},
        "optimizer": {
            "learning_rate": [1e-2, 1e-3, 1e-4],
            "weight_decay": [0.0, 1e-4, 1e-3, 1e-2],
        },
    },
}


class Problem(Record):
    """A frozen network, a target, and what there is to train on.

    ``width``, ``target_depth`` and ``depth`` are ``D``, ``L̄`` and ``L``. Transformers are of equal
    depth; ``scale`` is the standard deviation of their attention weights. ``gain`` multiplies other
    frozen weights: with ``6^{1/2}`` uniform ones have variance ``2/D``, and ReLU layers keep the
    size of what passes through them. ``pretraining`` on the target, of all weights, stops at this
    part of the initial loss, or after 1000 steps: 1 is a random network, 1/3 the study's pretrained
    one.

    If ``distance_rank`` is not 0, the target is the frozen blocks plus random matrices of this
    rank, whose Frobenius norm is ``distance`` times that of the block's product. Classification is
    by cross-entropy: the class is the target's largest output, or the larger of the sums of its two
    halves. ``samples`` are in each fresh batch, or in the ``fixed`` training set.
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
            ("every", self.every <= self.steps, "at most the steps"),
            ("distance_rank", self.distance_rank <= self.width, "at most the width"),
            ("distance_rank", not (transformer and self.distance_rank), "0 for a transformer"),
            ("fixed", not (transformer and self.fixed), "False for a transformer"),
            ("gain", not transformer or self.gain == 1, "1 for a transformer"),
            ("task", self.task == "regression" or self.model == "fnn", "regression but for fnn"),
            ("width", self.task != "binary" or self.width > 1, "at least 2 for a binary task"),
        ):
            self.require(field, fits, allowed)
        return self

    @property
    def classes(self) -> list[int]:
        """Class to which each output votes; empty for a regression."""
        outputs = range(self.width)
        if self.task == "multiclass":
            return list(outputs)
        return [] if self.task == "regression" else [int(2 * i >= self.width) for i in outputs]

    def networks(self) -> tuple[Network, Network]:
        """The frozen network as drawn, and the target, in double precision."""
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
        """The frozen network, pretrained where the problem says so, and the target."""
        frozen, target = self.networks()
        return (_pretrain(self, frozen, target) if self.pretraining < 1 else frozen), target

    def _near(self, frozen: LinearNetwork | FNN, target: Any) -> Any:
        """The target with weights that differ from the frozen blocks by a matrix of given size."""
        generator = randomness.generator(self.seed, "perturbation")
        shape = (self.width, self.distance_rank)
        weights = []
        for layers in Partition.uniform(self.depth, self.target_depth).slices:
            block = LinearNetwork(frozen.weights[layers]).product()
            left, right = (
                randomness.normal(generator, *shape, dtype=block.dtype, device=block.device)
                for _ in range(2)
            )
            change = left @ right.mT
            size = self.distance * torch.linalg.matrix_norm(block)
            weights.append(block + size / torch.linalg.matrix_norm(change) * change)
        return target.with_parameters(weights)

    def data(self, target: Network, *purpose: str, scale: float = 1.0) -> tuple[Data, Fresh]:
        """What to train on, and fresh inputs to test on; others for each purpose and scale."""
        label: Any = (lambda x: self.votes(target(x)).argmax(-2)) if self.classes else target
        shape = (self.width, self.tokens) if self.model == "transformer" else (self.width,)
        draws: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "purpose": purpose}
        fresh = Fresh(label, shape, scale=scale, **draws)
        if not self.fixed:
            return fresh, fresh
        x, y = (part[0] for part in fresh.block(0))
        return Fixed((x, y), fresh.validation, seed=self.seed), fresh

    def votes(self, outputs: Tensor) -> Tensor:
        """Sums of the outputs that vote for each class, ``[..., classes, samples]``."""
        votes = outputs.new_zeros(*outputs.shape[:-2], max(self.classes) + 1, outputs.shape[-1])
        return votes.index_add(-2, torch.tensor(self.classes, device=outputs.device), outputs)


class Construction(study.Construction):
    """The theorems' adapters; ``ranks`` is one for a transformer.

    For ReLU networks they hold on ``region`` times a ball that contains nearly all inputs.
    """

    region: float = Field(1.0, gt=0)


class Fitted(study.Fitted):
    """Adapters fitted to inputs (`constructions.fitted.adapt`), and polished from the ``starts``.

    From each start, `training.polish` takes ``adam`` steps on fresh batches, then ``iterations`` of
    L-BFGS. A transformer's inputs are sequences.
    """

    inputs: int = Field(4000, ge=2)
    starts: tuple[fused.Start, ...] = ()
    adam: int = Field(0, ge=0)
    iterations: int = Field(400, ge=0)


class Recipe(Gradient):
    """Adam on adapters, with what may help it, for regressions.

    ``schedule, loss, ratio, centred, final`` and ``start`` are as in `training.Tuning`. A start may
    also be ``"construction"``, the theorem's adapters, or ``"fitted"``; normal numbers of
    ``perturbation`` times its root mean square are added to each of their factors and changes of
    biases.
    """

    kind: Literal["recipe"] = "recipe"
    ranks: Rank = 0
    schedule: Schedule = "constant"
    loss: Loss = "squared"
    ratio: float = Field(1.0, gt=0)
    centred: bool = False
    final: int = Field(0, ge=0)
    start: Start | Literal["construction", "fitted"] = "study"
    perturbation: float = Field(0.0, ge=0)


class Fused(Record):
    """Training of the fused network, carried back, see `training.train_fused`; for regressions.

    It trains on the problem's inputs times ``input_scale``.
    """

    kind: Literal["fused"] = "fused"
    ranks: int = Field(1, ge=0)
    starts: int = Field(4, ge=1)
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = (1e-2,)
    input_scale: float = Field(1.0, gt=0)


class Newton(Record):
    """Levenberg–Marquardt on fixed inputs (`training.newton`), for regressions.

    From the linearized start inner ReLUs idle afterwards wherever `Fused` lets them, if that is no
    worse, but for rounding, on inputs that were not fitted.
    """

    kind: Literal["newton"] = "newton"
    ranks: int = Field(1, ge=0)
    start: Start = "linearized"
    loss: Loss = "one-sided"
    training_samples: int = Field(700, ge=1)
    iterations: int = Field(25, ge=0)


Method = Construction | Fitted | Lora | Final | Recipe | Fused | Newton


class Setting(Record):
    """One run. Raises `InputError` for a method that does not fit the problem."""

    problem: Problem = Problem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem, method = self.problem, self.method
        fnn, transformer = problem.model == "fnn", problem.model == "transformer"
        if isinstance(method, Final):
            problem.require("model", not transformer, "linear or fnn with method 'final'")
            method.require("final", method.final <= problem.depth, "at most the depth")
            return self
        weights = (4 * problem.heads + 2) * problem.depth + 1 if transformer else problem.depth
        one = transformer and isinstance(method, study.Construction | study.Fitted)
        if isinstance(method.ranks, tuple):
            fits = not one and len(method.ranks) == weights
            method.require("ranks", fits, "one" if one else f"one or {weights}")
        fits = np.max(method.ranks) <= problem.width
        method.require("ranks", bool(fits), "at most the width")
        if isinstance(method, Construction):
            method.require("region", fnn or method.region == 1, "1 but for model 'fnn'")
        if isinstance(method, Recipe | Fused | Newton):
            problem.require("task", problem.task == "regression", "'regression'")
        if isinstance(method, Recipe | Newton) and not fnn:
            method.require("start", method.start != "linearized", "another but for fnn")
            method.require("loss", method.loss == "squared", "'squared' but for fnn")
        if isinstance(method, Recipe):
            method.require("centred", fnn or not method.centred, "False but for fnn")
            method.require("final", method.final <= weights, "at most the number of weights")
        return self


class Found(Results):
    """What a run reaches over 5000 test inputs.

    ``error`` is the mean squared error, ``shifted_error`` over five times these inputs,
    ``training_error`` over a fixed training set. Accuracies are the shares of these inputs put into
    the target's class. ``validation_loss``, the least in training, compares grid points; of
    constructions it is NaN and ``best_step`` −1. ``signal`` is the target's mean square output,
    ``variance`` the same about each output's mean: the error of the best constant. ``predicted`` is
    the error of a fit to first order over that variance. What does not apply is NaN.
    """

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False
    error: float
    shifted_error: float
    training_error: float = math.nan
    accuracy: float = math.nan
    shifted_accuracy: float = math.nan
    training_accuracy: float = math.nan
    signal: float
    variance: float
    predicted: float = math.nan


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting of one problem reaches; raises `InputError` for several problems."""
    problem: Problem = one_problem(settings)
    bench = _Bench(problem)
    methods = [setting.method for setting in settings]
    trained = train_each(
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
            network, _, about = trained[method]
        else:
            adapters, about = bench.adapt(method)
            network = adapters.merge(bench.frozen)
        found.append(Found(**bench.test(network) | about))
    return found


class _Bench:
    """A problem's networks and data, its methods, and the tests by which networks are judged."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.frozen, self.target = problem.start()
        self.data, fresh = problem.data(self.target)
        self.course: dict[str, Any] = {
            "steps": problem.steps,
            "every": problem.every,
            "seed": problem.seed,
        }
        # Nearly all of the normal inputs are inside.
        self.radius = problem.width**0.5 + 4
        self.fits: dict[Fitted, FittedAdapters] = {}
        x, _ = fresh.test(TEST_SAMPLES)
        inputs = {"": x, "shifted_": SHIFT * x}
        if isinstance(self.data, Fixed):
            inputs["training_"] = self.data.training[0]
        self.inputs = {name: x.to(torch.float64) for name, x in inputs.items()}
        self.outputs = {name: self.target(x) for name, x in self.inputs.items()}

    def test(self, network: Network) -> dict[str, float]:
        """Errors, and for a classification the accuracies, of one network."""
        network = network.to(torch.float64)
        found = dict[str, float]()
        for kind, x in self.inputs.items():
            out, target = network(x), self.outputs[kind]
            found[f"{kind}error"] = float((out - target).square().mean())
            if self.problem.classes:
                classes = (self.problem.votes(y).argmax(-2) for y in (out, target))
                found[f"{kind}accuracy"] = float(torch.eq(*classes).double().mean())
        target = self.outputs[""]
        found["signal"] = float(target.square().mean())
        return found | {"variance": float(variance_of(target))}

    def tuning(self, method: Any) -> Tuning:
        if not isinstance(method, Recipe):
            return Gradient.tuning(method)
        options = method.model_dump(exclude={"kind", "start", "perturbation"})
        if method.start == "construction":
            adapters = self.construct(Construction(ranks=method.ranks))
        elif method.start == "fitted":
            adapters = self.fit(Fitted(ranks=method.ranks)).adapters
        else:
            blocks = self.problem.target_depth if method.start == "linearized" else 1
            return Tuning(**options, start=method.start, blocks=blocks)
        start = _perturb(adapters.balanced(), method.perturbation, self.problem.seed)
        return Tuning(**options, start=start)

    def adapt(self, method: Any) -> tuple[Adapters, dict[str, float]]:
        """The adapters of a method that is trained alone, and what it says of them."""
        if isinstance(method, Fitted):
            fit = self.fit(method)
            return fit.adapters, {"predicted": float(fit.predicted)}
        if isinstance(method, Fused):
            return self.fuse(method)
        if isinstance(method, Newton):
            return self.newton(method)
        return self.construct(method), {}

    def construct(self, method: Construction) -> Adapters:
        region = Ball(method.region * self.radius)
        return study.construct(self.frozen, self.target, method.ranks, region)

    def fit(self, method: Fitted) -> FittedAdapters:
        """Adapters fitted to inputs; what is polished may have been fitted already."""
        plain = method.replace(starts=(), adam=0, iterations=0)
        key = method if method.starts else plain
        if key not in self.fits:
            x = self.sample("calibration", method.inputs), self.sample("choosing", 2 * CHOOSING)
            if method.starts:
                fresh = self.problem.data(self.target, "polishing")[1]
                self.fits[key] = polish(
                    self.fit(plain),
                    *x,
                    starts=method.starts,
                    steps=method.adam,
                    iterations=method.iterations,
                    data=fresh if method.adam else None,
                    seed=self.problem.seed,
                    throw=False,
                )
            else:
                region = Ball(self.radius) if self.problem.model == "fnn" else None
                self.fits[key] = fitted.adapt(
                    self.frozen, self.target, method.ranks, *x, region=region, throw=False
                )
        return self.fits[key]

    def fuse(self, method: Fused) -> tuple[Adapters, dict[str, float]]:
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

    def newton(self, method: Newton) -> tuple[Adapters, dict[str, float]]:
        blocks = self.problem.target_depth if method.start == "linearized" else 1
        tuning = Tuning(method.ranks, start=method.start, blocks=blocks)
        start = begin(self.frozen, [tuning], self.data, seed=self.problem.seed)[0]
        counts = {"newton": method.training_samples, "newton, held out": CHOOSING}
        inputs = [self.sample(purpose, count) for purpose, count in counts.items()]
        fit, select = ((x, self.target(x)) for x in inputs)
        start = start.to(torch.float64)
        network: Any = self.frozen
        lifts = method.start == "linearized"
        # Where ReLUs bend on inputs to choose by, what fits best is not what is best there.
        others = fit if lifts else select
        found = descent.newton(network, start, fit, others, method.iterations, loss=method.loss)
        candidates = [found.adapters]
        if lifts:
            partition = Partition.uniform(self.problem.depth, blocks)
            region = Ball.about(torch.cat([self.data.validation[0].double(), *inputs], -1), MARGIN)
            candidates.insert(0, fnn.idle(network, region, partition, found.adapters))
        x, y = select
        errors = [float((a.merge(network)(x) - y).square().mean()) for a in candidates]
        # Of equally good ones, but for rounding, the first.
        rounding = torch.finfo(y.dtype).eps * float(y.square().mean())
        best = next(i for i, error in enumerate(errors) if error <= min(errors) + rounding)
        least = {
            "validation_loss": errors[best],
            "training_error": float(found.training_loss.min()),
        }
        return candidates[best], least

    def sample(self, purpose: str, count: int) -> Tensor:
        """So many inputs, drawn for nothing else."""
        return self.problem.data(self.target, purpose)[1].test(count)[0].to(torch.float64)


def _pretrain(problem: Problem, frozen: Network, target: Network) -> Network:
    """The frozen network trained in full until its loss is a part of what it was."""
    plain = problem.replace(task="regression", fixed=False, samples=256)
    data, _ = plain.data(target, "pretraining")
    options = {"steps": PRETRAINING_STEPS, "until": problem.pretraining, "seed": problem.seed}
    return train_fully(frozen, data, PRETRAINING, **options)


def _perturb(adapters: Adapters, size: float, seed: int) -> Adapters:
    """Adapters with normal numbers added to each part, of so many times its root mean square."""
    generator = randomness.generator(seed, "perturbation of adapters")

    def move(part: Tensor) -> Tensor:
        drawn = randomness.normal(generator, *part.shape, dtype=part.dtype, device=part.device)
        return part + size * part.square().mean().sqrt().nan_to_num(0) * drawn

    updates = tuple(LowRank(move(u.left), move(u.right)) for u in adapters.updates)
    return Adapters(updates, tuple(map(move, adapters.bias_updates)), adapters.tuned)
