"""The study's experiments on synthetic problems: settings, and what is measured for each.

A problem is a frozen network and a target drawn by a seed; a method adapts the one to the other.
`measure` does this for any number of settings of one problem, and is what `sweeps.run` is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .. import _checks, constructions, randomness
from ..adapters import Adapters
from ..errors import InputError
from ..networks import FNN, LinearNetwork, Partition, Transformer
from ..regions import Ball, Region
from ..training import Data, Fixed, Fresh, Tuning, train
from . import sweeps

Network = LinearNetwork | FNN | Transformer

MODELS = ("linear", "fnn", "transformer")
TRAINED = ("lora", "final")
METHODS = ("construction", *TRAINED)
TASKS = ("regression", "multiclass", "binary")
# What a method tunes and how: settings that differ only in these have one problem.
OF_METHOD = ("method", "ranks", "final", "biases", "region", "learning_rate", "weight_decay")

# Names of the two published kinds of frozen networks, and the part of the initial loss at which
# pretraining stops.
RANDOM, PRETRAINED = 1.0, 1 / 3
PRETRAINING = Tuning(learning_rate=1e-3)
PRETRAINING_STEPS = 1000
TEST_SAMPLES = 5000
SHIFT = 5.0

GRIDS: dict[str, dict[str, Any]] = {
    "quick": {
        "learning_rate": [1e-2, 1e-3],
        "weight_decay": [0.0],
        "steps": 2000,
        "every": 10,
        "seed": range(3),
    },
    "paper": {
        "learning_rate": [1e-2, 1e-3, 1e-4],
        "weight_decay": [0.0, 1e-4, 1e-3, 1e-2],
        "steps": 5000,
        "every": 1,
        "seed": range(5),
    },
}


@dataclass(frozen=True)
class Setting:
    """One run: a problem, and a method.

    Attributes
    ----------
    model : ``"linear"``, ``"fnn"`` or ``"transformer"``.
    width, target_depth, depth : ``D``, ``L̄`` and ``L``. Transformers are of equal depth.
    heads, tokens, scale : of transformers; the standard deviation of attention weights.
    gain : factor on the frozen weights, not those of transformers. ``6^{1/2}`` makes the variance
        of uniform ones ``2/D``, with which ReLU layers keep the size of what passes through them.
    pretraining : part of its initial loss to which the frozen network was first trained, in full,
        on the target, within 1000 steps: 1 for a random network, 1/3 for the study's pretrained
        ones.
    distance, distance_rank : where the rank is not 0, the target is no independent network but the
        frozen one's blocks plus a random matrix of that rank and of that Frobenius norm relative to
        the block's product.
    task : ``"regression"``: the target's outputs by squared error. ``"multiclass"``: the largest of
        the target's outputs, by cross-entropy. ``"binary"``: the larger of the sums of their two
        halves.
    samples : in each batch of fresh inputs, or, with ``fixed``, in the training set that all steps
        use.
    steps, every : of training; the validation loss is taken after every so many steps.
    method : ``"construction"``: the theorems' adapters. ``"lora"``: adapters by Adam. ``"final"``:
        the last layers in full by Adam.
    ranks : of adapters, one for all or one for each weight.
    final : number of last layers.
    biases : whether they are tuned.
    region : radius of the ball over which a ReLU network's construction holds, in units of one that
        hardly any input is outside of.
    learning_rate, weight_decay : of Adam.
    seed : of the problem's networks and inputs and of the first factors.

    Raises `InputError` for a value that has no meaning, alone or with the others.
    """

    model: str = "fnn"
    width: int = 16
    target_depth: int = 1
    depth: int = 2
    heads: int = 2
    tokens: int = 10
    scale: float = 1.0
    gain: float = 1.0
    pretraining: float = RANDOM
    distance: float = 0.0
    distance_rank: int = 0
    task: str = "regression"
    samples: int = 256
    fixed: bool = False
    steps: int = 5000
    every: int = 1
    method: str = "lora"
    ranks: int | tuple[int, ...] = 0
    final: int = 0
    biases: bool = True
    region: float = 1.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("model", MODELS), ("method", METHODS), ("task", TASKS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    name, allowed=f"one of {', '.join(allowed)}", given=repr(getattr(self, name))
                )
        for name in ("width", "target_depth", "heads", "tokens", "samples", "steps"):
            _checks.integer(name, getattr(self, name), 1)
        _checks.integer("depth", self.depth, self.target_depth)
        _checks.integer("every", self.every, 1, self.steps, limit="the steps")
        _checks.integer("seed", self.seed, 0)
        _checks.integer("distance_rank", self.distance_rank, 0, self.width, limit="the width")
        _checks.positive("scale", self.scale)
        _checks.positive("gain", self.gain)
        _checks.positive("pretraining", self.pretraining)
        _checks.positive("region", self.region)
        _checks.tolerance("distance", self.distance)
        self.tuning()
        for rank in self.ranks if isinstance(self.ranks, tuple) else (self.ranks,):
            _checks.integer("ranks", rank, 0, self.width, limit="the width")
        _checks.integer("final", self.final, 0, self.depth, limit="the depth")
        if (self.method == "final") != (self.final > 0):
            raise InputError(
                "final",
                allowed="above 0 with method 'final', and 0 with others",
                given=f"{self.final} with {self.method!r}",
            )
        if isinstance(self.ranks, tuple):
            blocks = self.model == "transformer"
            weights = (4 * self.heads + 2) * self.depth + 1 if blocks else self.depth
            if len(self.ranks) != weights or (blocks and self.method == "construction"):
                several = f" or {weights}, one for each weight"
                raise InputError(
                    "ranks",
                    allowed="one" + ("" if blocks and self.method == "construction" else several),
                    given=f"{len(self.ranks)} of them",
                )
        if self.model == "transformer" and self.depth != self.target_depth:
            raise InputError(
                "depth",
                allowed=f"target_depth, {self.target_depth}, for a transformer",
                given=self.depth,
            )
        if self.model == "transformer" and (
            self.distance_rank or self.final or self.fixed or self.gain != 1
        ):
            raise InputError(
                "model",
                allowed="linear or fnn with distance_rank, final, fixed or gain",
                given="'transformer'",
            )
        if self.task != "regression" and self.model != "fnn":
            raise InputError("task", allowed="regression, but for model 'fnn'", given=self.task)
        if self.region != 1 and (self.model, self.method) != ("fnn", "construction"):
            raise InputError(
                "region",
                allowed="1, but for the construction of model 'fnn'",
                given=f"{self.region} for {self.method!r} of {self.model!r}",
            )
        if self.task == "binary" and self.width < 2:
            raise InputError("width", allowed="at least 2 for a binary task", given=self.width)

    def tuning(self) -> Tuning:
        """What gradient training makes of it."""
        return Tuning(self.ranks, self.final, self.biases, self.learning_rate, self.weight_decay)

    @property
    def problem(self) -> Setting:
        """The same problem with no method, equal for all settings that share it."""
        plain: Any = {field.name: field.default for field in fields(Setting)}
        return replace(self, **{name: plain[name] for name in OF_METHOD})

    @property
    def classes(self) -> list[int]:
        """Class to which each output votes; empty for a regression."""
        outputs = range(self.width)
        if self.task == "multiclass":
            return list(outputs)
        return [] if self.task == "regression" else [int(2 * i >= self.width) for i in outputs]

    def networks(self) -> tuple[Network, Network]:
        """The frozen network as drawn, and the target, in double precision."""
        if self.model == "transformer":
            frozen, target = (
                Transformer.random(
                    self.depth,
                    self.width,
                    self.heads,
                    scale=self.scale,
                    seed=self.seed,
                    purpose=purpose,
                )
                for purpose in ("frozen", "target")
            )
            return frozen, target
        kind: Any = {"linear": LinearNetwork, "fnn": FNN}[self.model]
        frozen = kind.random(self.depth, self.width, seed=self.seed, purpose="frozen")
        frozen = frozen.with_parameters([self.gain * weight for weight in frozen.weights])
        target = kind.random(self.target_depth, self.width, seed=self.seed, purpose="target")
        return frozen, self._near(frozen, target) if self.distance_rank else target

    def start(self) -> tuple[Network, Network]:
        """The network that is adapted, pretrained where the setting says so, and the target."""
        problem = self.problem
        frozen, target = problem.networks()
        if problem.pretraining < 1:
            frozen = _pretrained(problem, frozen, target)
        return frozen, target

    def _near(self, frozen: LinearNetwork | FNN, target: Any) -> Any:
        """The target with weights that differ from the frozen blocks by a matrix of given size."""
        generator = randomness.generator(self.seed, "perturbation")
        shape = (self.width, self.distance_rank)
        weights = []
        for layers in Partition.uniform(self.depth, self.target_depth).slices:
            block = LinearNetwork(frozen.weights[layers]).product()
            left, right = (
                torch.randn(shape, generator=generator, dtype=block.dtype) for _ in range(2)
            )
            change = left @ right.mT
            size = self.distance * torch.linalg.matrix_norm(block)
            weights.append(block + size / torch.linalg.matrix_norm(change) * change)
        return target.with_parameters(weights)

    def data(self, target: Network) -> tuple[Data, Fresh]:
        """What to train on, and a source of fresh inputs to test on."""
        label = self._label(target)
        sequence = self.model == "transformer"
        shape = (self.width, self.tokens) if sequence else (self.width,)
        fresh = Fresh(label, shape, samples=self.samples, seed=self.seed)
        if not self.fixed:
            return fresh, fresh
        x, y = (part[0] for part in fresh.block(0))
        return Fixed((x, y), fresh.validation, seed=self.seed), fresh

    def _label(self, target: Network) -> Any:
        if not self.classes:
            return target
        return lambda x: self.votes(target(x)).argmax(-2)

    def votes(self, outputs: Tensor) -> Tensor:
        """Sums of the outputs that vote for each class, ``[..., classes, samples]``."""
        votes = outputs.new_zeros(*outputs.shape[:-2], max(self.classes) + 1, outputs.shape[-1])
        return votes.index_add(-2, torch.tensor(self.classes), outputs)


def measure(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What each setting of one problem reaches.

    ``error`` is the mean squared error over 5000 test inputs, and ``shifted_error`` over five times
    these; ``training_error`` that over the training set, where there is a fixed one;
    ``accuracy`` and ``shifted_accuracy`` the parts of these inputs that are put into the target's
    class, where there are classes. ``validation_loss`` is the least one met in training, at step
    ``best_step``, by which grid points are compared. What does not apply is NaN, or step −1.
    ``signal`` is the target's mean square output over the test inputs, and ``variance`` what is
    left of it when each output's mean is subtracted: the error of the best constant.

    Raises `InputError` for settings of several problems.
    """
    problem = settings[0].problem
    if any(setting.problem != problem for setting in settings):
        raise InputError("settings", allowed="of one problem", given="several")
    frozen, target = problem.start()
    data, fresh = problem.data(target)
    tests = _Tests(problem, target, data, fresh)
    # Hardly any of the normal inputs that are used here is outside √D + 4.
    usual = problem.width**0.5 + 4
    found = adapted(
        settings,
        frozen,
        data,
        lambda s: construct(frozen, target, s.ranks, Ball(s.region * usual)),
        steps=problem.steps,
        every=problem.every,
        classes=problem.classes,
        seed=problem.seed,
    )
    return [{**tests.of(network), **about} for network, about in found]


def adapted(
    settings: Sequence[Any],
    frozen: Network,
    data: Data,
    construction: Callable[[Any], Adapters],
    **training: Any,
) -> list[tuple[Any, dict[str, Any]]]:
    """For each setting of one problem the adapted network, and how its training went.

    A setting whose ``method`` is ``"lora"`` or ``"final"`` is trained with its ``tuning()`` and the
    options of `training.train`, all of these at once; the adapters of others are what
    ``construction`` returns. What is known of the training is as `measure` describes it.
    """
    place = {s: i for i, s in enumerate(s for s in settings if s.method in TRAINED)}
    if place:
        runs = train(frozen, [setting.tuning() for setting in place], data, **training)
    found = []
    for setting in settings:
        if setting in place:
            i = place[setting]
            about = {
                "validation_loss": float(runs.best_loss[i]),
                "best_step": int(runs.best_step[i]),
                "diverged": bool(runs.diverged[i]),
            }
            found.append((runs.network[i], about))
        else:
            about = {"validation_loss": math.nan, "best_step": -1, "diverged": False}
            found.append((construction(setting).merge(frozen), about))
    return found


def best(table: pd.DataFrame, record: type = Setting) -> pd.DataFrame:
    """For each setting but for learning rate and weight decay, the row of least validation loss.

    ``record`` is the class of the settings. Constructions have one row each, which stays. A grid
    point that diverged counts up to there.
    """
    of_grid = ("learning_rate", "weight_decay")
    same = [field.name for field in fields(record) if field.name not in of_grid]
    ordered = table.sort_values("validation_loss", kind="stable", na_position="last")
    return ordered.groupby(same, sort=False, dropna=False).head(1).sort_index()


def _pretrained(problem: Setting, frozen: Network, target: Network) -> Network:
    """The frozen network after training all of it until its loss is a part of what it was."""
    plain = replace(problem, task="regression", fixed=False, samples=256)
    data, _ = plain.data(target)
    tuning = replace(PRETRAINING, final=len(frozen.weights))
    runs = train(
        frozen,
        [tuning],
        data,
        steps=PRETRAINING_STEPS,
        until=problem.pretraining,
        seed=problem.seed,
    )
    return runs.network[0].to(torch.float64)


def construct(frozen: Any, target: Any, ranks: Any, region: Region) -> Adapters:
    """The theorems' adapters, whatever digits rounding leaves; a ReLU network's over a region."""
    if isinstance(frozen, LinearNetwork):
        return constructions.linear.adapt(frozen, target, ranks, throw=False).adapters
    if isinstance(frozen, FNN):
        return constructions.fnn.adapt(frozen, target, ranks, region, throw=False).adapters
    return constructions.transformer.adapt(frozen, target, ranks, throw=False).adapters


class _Tests:
    """Labelled inputs by which networks of one problem are judged."""

    def __init__(self, problem: Setting, target: Network, data: Data, fresh: Fresh) -> None:
        self.problem = problem
        x, _ = fresh.test(TEST_SAMPLES)
        inputs = {"": x, "shifted_": SHIFT * x}
        if isinstance(data, Fixed):
            inputs["training_"] = data.training[0]
        self.inputs = {name: x.to(torch.float64) for name, x in inputs.items()}
        self.wanted = {name: target(x) for name, x in self.inputs.items()}

    def of(self, network: Network) -> dict[str, float]:
        """Errors, and for a classification the accuracies, of one network."""
        network = network.to(torch.float64)
        found = {
            f"{kind}{what}": math.nan
            for kind in ("", "shifted_", "training_")
            for what in ("error", "accuracy")
        }
        for kind, x in self.inputs.items():
            out, wanted = network(x), self.wanted[kind]
            found[f"{kind}error"] = float((out - wanted).square().mean())
            if self.problem.classes:
                classes = (self.problem.votes(y).argmax(-2) for y in (out, wanted))
                found[f"{kind}accuracy"] = float(torch.eq(*classes).double().mean())
        wanted = self.wanted[""]
        each = wanted.movedim(-2, 0).flatten(1)
        return {
            **found,
            "signal": float(wanted.square().mean()),
            "variance": float(each.var(-1, correction=0).mean()),
        }


def sweep(
    settings: Sequence[Any],
    folder: Any = None,
    *,
    work: Any = measure,
    size: int = 256,
    scheduler: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """`sweeps.run` of ``work``, problem by problem."""
    return sweeps.run(
        settings,
        work,
        folder,
        batch=lambda setting: setting.problem,
        size=size,
        scheduler=scheduler,
        progress=progress,
    )
