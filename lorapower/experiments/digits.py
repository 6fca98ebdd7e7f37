"""Adapt networks that read handwritten digits to turned digits.

The images are scikit-learn's, 1797 of 8 × 8 grey values. Networks are pretrained on upright images;
a target is then trained in full on images that are turned by an angle.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from .._records import Record
from ..adapters import Adapters
from ..bounds.layers import fnn_error_on
from ..constructions.fitted import nearest
from ..constructions.fused import fuse
from ..networks.layers import FNN
from ..networks.transformer import Transformer
from ..randomness import generator
from ..regions import Box
from ..regression import variance as variance_of
from ..training.tuning import Fixed, Labelled, Tuning
from . import study
from .study import Construction, Course, Final, Fitted, Gradient, Lora

SIDE, CLASSES = 8, 10
PIXELS = SIDE**2
SIZES = {"training": 1000, "validation": 297, "test": 500}

Model = Literal["fnn", "transformer"]
Start = Literal["pretrained", "random"]
Network = FNN | Transformer
# Of targets, and of transformers that are adapted too.
DEPTHS = {"fnn": 2, "transformer": 1}
HEADS = 2
# Added to a ReLU network's votes at the start: a vote that is 0 for all images gets no gradient.
LIFT = 10.0
PRETRAINING = Tuning(learning_rate=3e-3)
PRETRAINING_STEPS = 1500
# Images in a batch; steps between validations.
BATCH, EVERY = 100, 20


@functools.cache
def images(
    angle: float = 0.0,
) -> tuple[Float[Tensor, "samples side side"], Int[Tensor, " samples"]]:
    """Load all images, turned counter-clockwise by ``angle`` degrees, and their digits.

    Grey values are from 0 (paper) to 1 (ink). Source: Alpaydin and Kaynak (1998).
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.from_numpy(found.images / 16).to(torch.float32)
    return _turn(pictures, angle) if angle else pictures, torch.from_numpy(found.target)


def _turn(
    pictures: Float[Tensor, "samples side side"], angle: float
) -> Float[Tensor, "samples side side"]:
    """Images turned about their centre, interpolated linearly, with 0 outside.

    Grey values are multiples of 1/256, as otherwise hardly any pixel would be free of ink.
    """
    phi = torch.tensor(math.radians(angle))
    matrix = torch.tensor([[phi.cos(), -phi.sin(), 0.0], [phi.sin(), phi.cos(), 0.0]])
    places = torch.nn.functional.affine_grid(
        matrix.expand(len(pictures), 2, 3), [len(pictures), 1, SIDE, SIDE], align_corners=False
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
    """The digits turned by an angle, split by the seed alone, as a network takes them.

    A ReLU network sees the 64 pixels of an image. A transformer sees a token for each row,
    ``[samples, 16, 8]``: its eight pixels, and a one in the coordinate of the row.
    """
    pictures, classes = images(angle)
    if model == "fnn":
        inputs = pictures.flatten(1)
    else:
        inputs = torch.cat([pictures.mT, torch.eye(SIDE).expand_as(pictures)], dim=1)
    order = torch.randperm(len(classes), generator=generator(seed, "split"))
    parts = [(inputs[part], classes[part]) for part in order.split([*SIZES.values()])]
    return _Split(*((x.mT if model == "fnn" else x, y) for x, y in parts))


def _votes(network: Network, x: Tensor) -> Float[Tensor, "classes samples"]:
    """Votes of a network for each digit; a transformer's are summed over its tokens."""
    return network(x).sum(-1).mT if network.sequences else network(x)


def accuracy(network: Network, labelled: Labelled) -> float:
    """Count the share of the images whose digit gets the most votes."""
    x, y = labelled
    return float((_votes(network, x).argmax(-2) == y).double().mean())


def error(network: Network, target: Network, x: Tensor) -> float:
    """Measure the mean squared difference of the votes from the target's, over their variance.

    Means are over classes and samples; the variance is about each class's mean.
    """
    votes, reference = _votes(network, x), _votes(target, x)
    return float((votes - reference).square().mean() / variance_of(reference))


class Problem(Record):
    """Make a frozen network and a target, trained on digits or drawn, and data to adapt it with.

    ReLU networks (``"fnn"``) have width 64 and ten outputs; transformers have one block, two heads
    and width 16, over the rows of an image. The frozen network has ``depth`` layers and is
    ``"random"`` or ``"pretrained"`` on upright digits. The target has depth 2 (a transformer 1) and
    is pretrained, then trained in full on digits turned by ``angle`` degrees.
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
        """Width of the layers, or of a token, which no rank exceeds."""
        return PIXELS if self.model == "fnn" else 2 * SIDE

    @property
    def task(self) -> _Split:
        """The images, turned, split at random."""
        return _task(self.model, self.angle, self.seed)

    def adapters(self, frozen: Any, target: Any, method: Construction | Fitted) -> Adapters:
        """Make a method's adapters, for ReLU networks over all possible images."""
        region = Box(0.0, 1.0)
        if not isinstance(method, Fitted):
            return study.construct(frozen, target, method.ranks, region)
        fused = fuse(frozen, target, method.ranks)
        adapters = nearest(fused, self.task.training[0])
        return fused.carry_back(adapters, region, throw=False).adapters

    def frozen(self) -> Any:
        """Make the frozen network, in double precision."""
        if self.start == "pretrained":
            return _pretrained(self.model, self.depth, self.seed)
        return _drawn(self.model, self.depth, self.seed, "random")

    def networks(self) -> tuple[Any, Any]:
        """Make the frozen network and the target, in double precision."""
        return self.frozen(), _target(self.model, self.angle, self.seed)


class Setting(Record):
    """Say which method, of one rank, solves which problem; raise `InputError` if it cannot."""

    problem: Problem = Problem()
    method: Annotated[Construction | Fitted | Lora | Final, Field(discriminator="kind")] = Lora()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problem, method = self.problem, self.method
        if isinstance(method, Final):
            return self
        fits = isinstance(method.ranks, int) and method.ranks <= problem.width
        method.require("ranks", fits, f"one, at most {problem.width}")
        fits = problem.model == "fnn" or not isinstance(method, Fitted)
        method.require("kind", fits, "'fitted' for model 'fnn'")
        return self

    @property
    def fitting(self) -> Construction | Fitted | Lora | Final:
        """Give each weight of a ReLU network a rank, the last at most ten."""
        method, problem = self.method, self.problem
        if isinstance(method, Final) or problem.model == "transformer":
            return method
        last = min(method.ranks, CLASSES)
        return method.replace(ranks=(method.ranks,) * (problem.depth - 1) + (last,))


@functools.cache
def _pretrained(model: str, depth: int, seed: int) -> Network:
    """A network trained in full on upright digits."""
    drawn = _drawn(model, depth, seed, f"before pretraining, depth {depth}")
    return _train(drawn, _task(model, 0.0, seed), seed, f"pretraining, depth {depth}")


@functools.cache
def _target(model: str, angle: float, seed: int) -> Network:
    """The pretrained network of the target's depth, trained in full on digits that are turned."""
    start = _pretrained(model, DEPTHS[model], seed)
    return _train(start, _task(model, angle, seed), seed, "target")


def _drawn(model: str, depth: int, seed: int, purpose: str) -> Network:
    if model == "transformer":
        width = 2 * SIDE
        scale = width**-0.5
        drawn = Transformer.random(depth, width, HEADS, scale=scale, seed=seed, purpose=purpose)
        return drawn.with_parameters([*drawn.weights[:-1], drawn.weights[-1][:CLASSES]])
    square = FNN.random(depth, PIXELS, seed=seed, purpose=purpose)
    *weights, last = square.weights
    *biases, last_bias = square.biases
    return FNN([*weights, last[:CLASSES]], [*biases, last_bias[:CLASSES] + LIFT])


def _train(network: Network, task: _Split, seed: int, purpose: str) -> Network:
    """Train all weights of a network."""
    data = Fixed(*task[:2], samples=BATCH, seed=seed, purpose=(purpose,))
    options = {"steps": PRETRAINING_STEPS, "every": EVERY, "classes": range(CLASSES)}
    trained: Network = study.train_fully(network, data, PRETRAINING, **options)
    return trained


class Readings(Course):
    """Hold what a run reaches on the test images.

    ``accuracy`` is the share of images read rightly; for ``error`` see the function. ``bound`` is
    `bounds.fnn_error_on` of a ReLU network's plain construction, otherwise NaN.
    """

    accuracy: float
    error: float
    bound: float = math.nan
    target_accuracy: float
    frozen_accuracy: float


def measure(settings: Sequence[Setting]) -> list[Readings]:
    """Measure what each setting reaches; raise `InputError` if they have several problems."""
    problem: Problem = study.one_problem(settings)
    frozen, target = problem.networks()
    x, y = problem.task.test[0].to(torch.float64), problem.task.test[1]
    variance = variance_of(_votes(target, x))
    methods = [setting.fitting for setting in settings]
    trained = study.train_each(
        (method for method in methods if isinstance(method, Gradient)),
        frozen,
        Fixed(*problem.task[:2], samples=BATCH, seed=problem.seed),
        steps=problem.steps,
        every=EVERY,
        classes=range(CLASSES),
        seed=problem.seed,
    )
    found = []
    for method in methods:
        about: dict[str, Any] = {}
        if isinstance(method, Gradient):
            network, about = trained[method].network.to(torch.float64), trained[method].course
        else:
            network = problem.adapters(frozen, target, method).merge(frozen)
        if problem.model == "fnn" and isinstance(method, Construction):
            norm = fnn_error_on(frozen, target, method.ranks, x)
            about["bound"] = float(norm.square() / CLASSES / variance)
        named = {"": network, "target_": target, "frozen_": frozen}
        about = about | {f"{name}accuracy": accuracy(each, (x, y)) for name, each in named.items()}
        found.append(Readings(error=error(network, target, x), **about))
    return found
