"""Handwritten digits: networks trained on real images, and what adapts one to another.

The images are scikit-learn's, 1797 of 8 × 8 grey values. A task is to read them turned by an angle.
Networks are pretrained on upright images; a target is then trained in full on a task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from .._records import Record, Results
from ..adapters.core import Adapters
from ..bounds.layers import fnn_error_on, fnn_threshold
from ..bounds.layers import variance as variance_of
from ..bounds.transformer import transformer_threshold
from ..constructions.fitted import nearest
from ..constructions.fused import fuse
from ..networks.layers import FNN
from ..networks.partition import blocks
from ..networks.transformer import Transformer
from ..randomness import generator
from ..regions import Box
from ..training.tuning import Fixed, Labelled, Tuning
from . import study
from ._training import Gradient, one_problem, train_each, train_fully
from .study import Construction, Final, Fitted, Lora

SIDE, CLASSES = 8, 10
PIXELS = SIDE**2
SIZES = {"training": 1000, "validation": 297, "test": 500}

Model = Literal["fnn", "transformer"]
Start = Literal["pretrained", "random"]
MODELS: tuple[Model, ...] = get_args(Model)
# Of targets, and of transformers that are adapted too.
DEPTHS = {"fnn": 2, "transformer": 1}
HEADS = 2
# Added to a ReLU network's votes at the start: a vote that is 0 for all images gets no gradient.
LIFT = 10.0
PRETRAINING = Tuning(learning_rate=3e-3)
PRETRAINING_STEPS = 1500
BATCH, EVERY = 100, 20

# Model and depth of the frozen networks, and the ranks that are tried.
CASES = (("fnn", 2), ("fnn", 4), ("transformer", 1))
RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64)
TRAINED_RANKS = {"quick": (1, 2, 4, 8, 16, 32), "paper": (1, 2, 3, 4, 6, 8, 12, 16, 32)}
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "problem": {"steps": 800, "seed": range(3)},
        "optimizer": {"learning_rate": [1e-2]},
    },
    "paper": {
        "problem": {"steps": 2000, "seed": range(5)},
        "optimizer": {"learning_rate": [1e-2, 3e-3]},
    },
}


@functools.cache
def images() -> tuple[Float[Tensor, "samples side side"], Int[Tensor, " samples"]]:
    """All images, grey values from 0 (paper) to 1 (ink), and their digits.

    Raises `InputError` without scikit-learn. Source: Alpaydin and Kaynak (1998).
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images / 16).to(torch.float32)
    return pictures, torch.from_numpy(found.target)


def turn(
    pictures: Float[Tensor, "samples side side"], angle: float
) -> Float[Tensor, "samples side side"]:
    """Images turned counter-clockwise by ``angle`` degrees about their centre.

    Grey values are interpolated linearly, with 0 outside, and rounded to multiples of 1/256, as
    otherwise hardly any pixel would be free of ink.
    """
    phi = pictures.new_tensor(math.radians(angle))
    matrix = pictures.new_tensor([[phi.cos(), -phi.sin(), 0.0], [phi.sin(), phi.cos(), 0.0]])
    shape = len(pictures), 1, *pictures.shape[1:]
    places = torch.nn.functional.affine_grid(
        matrix.expand(len(pictures), 2, 3), list(shape), align_corners=False
    )
    found = torch.nn.functional.grid_sample(pictures[:, None], places, align_corners=False)
    return (256 * found[:, 0]).round().clamp(0, 256) / 256


class _Split(NamedTuple):
    """Labelled images as a network takes them; no image is in two of the three."""

    training: Labelled
    validation: Labelled
    test: Labelled


@functools.cache
def _task(model: str, angle: float, seed: int) -> _Split:
    """The digits turned by an angle, split at random by the seed alone.

    A ReLU network sees the 64 pixels of an image, ``[64, samples]``. A transformer sees a token for
    each row, ``[samples, 16, 8]``: its eight pixels, and a one in the coordinate of the row.
    """
    pictures, classes = images()
    pictures = turn(pictures, angle)
    order = torch.randperm(len(classes), generator=generator(seed, "split"), device="cpu")
    parts = order.split([*SIZES.values()])
    if model == "fnn":
        return _Split(*((pictures[part].flatten(1).mT, classes[part]) for part in parts))
    places = torch.eye(SIDE, device=pictures.device).expand(len(pictures), SIDE, SIDE)
    tokens = torch.cat([pictures.mT, places], dim=1)
    return _Split(*((tokens[part], classes[part]) for part in parts))


def _votes(network: FNN | Transformer, x: Tensor) -> Float[Tensor, "classes samples"]:
    """Votes of a network for each digit; a transformer's are summed over its tokens."""
    return network(x).sum(-1).mT if network.sequences else network(x)


def accuracy(network: FNN | Transformer, labelled: Labelled) -> float:
    """Share of the images whose digit gets the most votes."""
    x, y = labelled
    return float((_votes(network, x).argmax(-2) == y).double().mean())


def error(network: FNN | Transformer, target: FNN | Transformer, x: Tensor) -> float:
    """Mean squared difference of the votes from the target's, relative to the latter's variance.

    Means are over classes and samples; the variance is about each class's mean.
    """
    votes, reference = _votes(network, x), _votes(target, x)
    return float((votes - reference).square().mean() / variance_of(reference))


class Problem(Record):
    """A frozen network and a target, trained on digits or drawn, and the digits to adapt it with.

    ReLU networks (``"fnn"``) have width 64 and ten outputs; transformers have one block, two heads
    and width 16, over the rows of an image. The frozen network has ``depth`` layers and is
    ``"random"`` or ``"pretrained"`` on upright digits. The target has depth 2 (a transformer 1) and
    is pretrained, then trained in full on digits turned by ``angle`` degrees. Raises `InputError`
    for values that do not fit.
    """

    model: Model = "fnn"
    depth: int = 2
    start: Start = "pretrained"
    angle: float = Field(90.0, ge=-360, le=360)
    steps: int = Field(1000, ge=EVERY)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model == "transformer":
            self.require("depth", self.depth == 1, "1 for a transformer")
        self.require("depth", DEPTHS[self.model] <= self.depth <= 16, "from 2 to 16")
        return self

    @property
    def width(self) -> int:
        """Width of the layers, or of a token; no rank is above it."""
        return PIXELS if self.model == "fnn" else 2 * SIDE

    @property
    def weights(self) -> int:
        """Number of the frozen network's weights, the largest ``final``."""
        return self.depth if self.model == "fnn" else (4 * HEADS + 2) * self.depth + 1

    @property
    def task(self) -> _Split:
        """The images, turned, split at random."""
        return _task(self.model, self.angle, self.seed)

    def adapters(self, frozen: Any, target: Any, method: Construction | Fitted) -> Adapters:
        """The method's adapters, for ReLU networks over all possible images."""
        region = Box(0.0, 1.0)
        if not isinstance(method, Fitted):
            return study.construct(frozen, target, method.ranks, region)
        fused = fuse(frozen, target, method.ranks)
        adapters = nearest(fused, self.task.training[0])
        return fused.carry_back(adapters, region, throw=False).adapters

    def frozen(self) -> Any:
        """The frozen network, in double precision."""
        if self.start == "random":
            return _drawn(self.model, self.depth, self.seed, "random")
        return _pretrained(self.model, self.depth, self.seed)

    def networks(self) -> tuple[Any, Any]:
        """The frozen network and the target, in double precision."""
        return self.frozen(), _target(self.model, self.angle, self.seed)

    def threshold(self) -> int:
        """The least equal rank at which the construction is exact."""
        frozen, target = self.networks()
        least = fnn_threshold if self.model == "fnn" else transformer_threshold
        return int(least(frozen, target))

    def error_matrices(self) -> dict[str, Float[Tensor, "heads out in"]]:
        """What adapters have to make up for, by name.

        Of a ReLU network: ``first``, the first block's ``E_1``, and ``on data``, ``E_1 (X −
        mean)/√n`` of the ``n`` training images ``X``, with the singular values of ``E_1 C^{1/2}``.
        Of a transformer: ``scores`` and ``values`` of its heads.
        """
        frozen, target = self.networks()
        if self.model == "transformer":
            cut = frozen.segments(target)
            return {"scores": cut.query_key.matrix[0], "values": cut.value_output.matrix[0]}
        E = blocks(frozen, target)[0].matrix
        x = self.task.training[0].to(E.dtype)
        shifted = (x - x.mean(1, keepdim=True)) / x.shape[1] ** 0.5
        return {"first": E[None], "on data": (E @ shifted)[None]}


class Setting(Record):
    """One run, with one rank for all weights; raises `InputError` for an unfit method."""

    problem: Problem = Problem()
    method: Annotated[Construction | Fitted | Lora | Final, Field(discriminator="kind")] = Lora()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem, method = self.problem, self.method
        if isinstance(method, Final):
            method.require("final", method.final <= problem.weights, "at most the weights")
            return self
        fits = isinstance(method.ranks, int) and method.ranks <= problem.width
        method.require("ranks", fits, f"one, at most {problem.width}")
        fits = problem.model == "fnn" or not isinstance(method, Fitted)
        method.require("kind", fits, "'fitted' for model 'fnn'")
        return self

    @property
    def fitting(self) -> Construction | Fitted | Lora | Final:
        """The method with a rank for each weight of a ReLU network; the last is at most ten."""
        method, problem = self.method, self.problem
        if isinstance(method, Final) or problem.model == "transformer":
            return method
        last = min(method.ranks, CLASSES)
        return method.replace(ranks=(method.ranks,) * (problem.depth - 1) + (last,))


def spectra(problems: Sequence[Problem]) -> pd.DataFrame:
    """Singular values ``sigma`` of the problems' error matrices, one in each row.

    Also the index ``d`` from 1, ``matrix`` (see `Problem.error_matrices`), ``start`` and ``angle``.
    """
    rows = [
        {"start": problem.start, "angle": problem.angle, "matrix": name, "d": d, "sigma": value}
        for problem in problems
        for name, matrices in problem.error_matrices().items()
        for values in torch.linalg.svdvals(matrices).tolist()
        for d, value in enumerate(values, 1)
    ]
    return pd.DataFrame(rows)


def needed(table: pd.DataFrame, tolerance: float = 0.1, points: float = 0.01) -> dict[str, float]:
    """The least rank in a table of runs that meets each of three aims; medians over seeds.

    ``bound`` and ``error`` must be at most ``tolerance``, ``accuracy`` at most ``points`` below the
    target's. Infinite where half of the seeds or more never meet an aim.
    """
    met = {
        "bound": table.bound <= tolerance,
        "error": table.error <= tolerance,
        # A tie of two shares of 500 images must not depend on rounding.
        "accuracy": table.accuracy >= table.target_accuracy - points - 1e-9,
    }
    least = {
        name: table.ranks.where(good, math.inf).groupby(table.seed).min()
        for name, good in met.items()
    }
    return {name: float(ranks.median()) for name, ranks in least.items()}


@functools.cache
def _pretrained(model: str, depth: int, seed: int) -> FNN | Transformer:
    """A network trained in full on upright digits."""
    drawn = _drawn(model, depth, seed, f"before pretraining, depth {depth}")
    return _train(drawn, _task(model, 0.0, seed), seed, f"pretraining, depth {depth}")


@functools.cache
def _target(model: str, angle: float, seed: int) -> FNN | Transformer:
    """The pretrained network of the target's depth, trained in full on digits that are turned."""
    start = _pretrained(model, DEPTHS[model], seed)
    return _train(start, _task(model, angle, seed), seed, "target")


def _drawn(model: str, depth: int, seed: int, purpose: str) -> FNN | Transformer:
    if model == "transformer":
        width = 2 * SIDE
        scale = width**-0.5
        drawn = Transformer.random(depth, width, HEADS, scale=scale, seed=seed, purpose=purpose)
        return drawn.with_parameters([*drawn.weights[:-1], drawn.weights[-1][:CLASSES]])
    square = FNN.random(depth, PIXELS, seed=seed, purpose=purpose)
    *weights, last = square.weights
    *biases, last_bias = square.biases
    return FNN([*weights, last[:CLASSES]], [*biases, last_bias[:CLASSES] + LIFT])


def _train(network: Any, split: _Split, seed: int, purpose: str) -> Any:
    """The network after training in full on a split's images."""
    data = _data(split, seed, purpose)
    options = {"steps": PRETRAINING_STEPS, "every": EVERY, "classes": range(CLASSES)}
    return train_fully(network, data, PRETRAINING, **options)


def _data(split: _Split, seed: int, *purpose: str) -> Fixed:
    return Fixed(split.training, split.validation, samples=BATCH, seed=seed, purpose=purpose)


class Found(Results):
    """What a run reaches on the test images.

    ``validation_loss`` is the least in training, at ``best_step``; constructions have NaN and −1.
    ``accuracy`` is the share read rightly; for ``error`` see the function. ``bound`` is
    `bounds.fnn_error_on` of a ReLU network's plain construction, otherwise NaN.
    """

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False
    accuracy: float
    error: float
    bound: float = math.nan
    target_accuracy: float
    frozen_accuracy: float


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting of one problem reaches; raises `InputError` for several problems."""
    problem: Problem = one_problem(settings)
    frozen, target = problem.networks()
    x, y = problem.task.test[0].to(torch.float64), problem.task.test[1]
    variance = variance_of(_votes(target, x))
    methods = [setting.fitting for setting in settings]
    trained = train_each(
        (method for method in methods if isinstance(method, Gradient)),
        frozen,
        _data(problem.task, problem.seed),
        steps=problem.steps,
        every=EVERY,
        classes=range(CLASSES),
        seed=problem.seed,
    )
    found = []
    for method in methods:
        about: dict[str, Any] = {}
        if isinstance(method, Gradient):
            network, _, about = trained[method]
            network = network.to(torch.float64)
        else:
            network = problem.adapters(frozen, target, method).merge(frozen)
        if problem.model == "fnn" and isinstance(method, Construction):
            norm = fnn_error_on(frozen, target, method.ranks, x)
            about["bound"] = float(norm.square() / CLASSES / variance)
        about = about | {
            f"{name}accuracy": accuracy(each, (x, y))
            for name, each in (("", network), ("target_", target), ("frozen_", frozen))
        }
        found.append(Found(error=error(network, target, x), **about))
    return found
