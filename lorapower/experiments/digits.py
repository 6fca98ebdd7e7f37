"""Networks that read handwritten digits, adapted to turned digits.

The images are scikit-learn's, 1797 of 8 × 8 grey values. Networks are pretrained on upright images;
a target is then trained in full on images that are turned by an angle.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from ..adapters import Adapters
from ..bounds.layers import fnn_error_on
from ..constructions.fitted import nearest
from ..constructions.fused import fuse
from ..networks.layers import FNN
from ..networks.transformer import Transformer
from ..randomness import generator
from ..regions import Box
from ..regression import variance as variance_of
from ..training.engine import train
from ..training.tuning import Fixed, Labelled, Tuning
from .study import Bench, Course, Fitted, Problem

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


class Digits(Problem):
    """Make a frozen network and a target, trained on digits or drawn, and data to adapt it with.

    ReLU networks (``"fnn"``) have width 64 and ten outputs; transformers have one block, two heads
    and width 16, over the rows of an image. The frozen network has ``depth`` layers and is
    ``"random"`` or ``"pretrained"`` on upright digits. The target has depth 2 (a transformer 1) and
    is pretrained, then trained in full on digits turned by ``angle`` degrees. Fits are to
    the training images.
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

    def require_fit(self, method: Any) -> None:
        super().require_fit(method)
        if isinstance(method, Fitted):
            method.require("kind", self.model == "fnn", "'fitted' for model 'fnn'")
            usual = method == Fitted(ranks=method.ranks)
            method.require("inputs", usual, "left out, as all options of a fit to images")

    @property
    def width(self) -> int:
        """Width of the layers, or of a token, which no rank exceeds."""
        return PIXELS if self.model == "fnn" else 2 * SIDE

    @property
    def task(self) -> _Split:
        """The images, turned, split at random."""
        return _task(self.model, self.angle, self.seed)

    def networks(self) -> tuple[Any, Any]:
        """Make the frozen network and the target, in double precision."""
        about = self.model, self.depth, self.seed
        frozen = _pretrained(*about) if self.start == "pretrained" else _drawn(*about, "random")
        return frozen, _target(self.model, self.angle, self.seed)

    def bench(self) -> Bench:
        """Make the networks and the data."""
        return _Bench(self)


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


def _train(network: Any, task: _Split, seed: int, purpose: str) -> Network:
    """Train all weights of a network."""
    data = Fixed(*task[:2], samples=BATCH, seed=seed, purpose=(purpose,))
    tuning = Tuning(final=len(network.weights), learning_rate=3e-3)
    options: Any = {"steps": PRETRAINING_STEPS, "every": EVERY, "classes": range(CLASSES)}
    trained: Network = train(network, [tuning], data, **options).network[0].to(torch.float64)
    return trained


class Readings(Course):
    """Hold what a run reaches on the test images.

    ``accuracy`` is the share of images whose digit gets the most votes, ``error`` the mean squared
    difference of the votes from the target's over their variance about each class's mean. ``bound``
    is `bounds.fnn_error_on` of a ReLU network's plain construction, otherwise NaN.
    """

    accuracy: float
    error: float
    bound: float = math.nan
    target_accuracy: float
    frozen_accuracy: float


class _Bench(Bench):
    region = Box(0.0, 1.0)  # of all possible images

    def __init__(self, problem: Digits) -> None:
        self.frozen, self.target = problem.networks()
        self.task = problem.task
        self.data = Fixed(*self.task[:2], samples=BATCH, seed=problem.seed)
        self.course = {"steps": problem.steps, "every": EVERY, "classes": range(CLASSES)}
        self.course["seed"] = problem.seed
        self.x, self.y = self.task.test[0].to(torch.float64), self.task.test[1]
        self.wanted = _votes(self.target, self.x)
        self.variance = variance_of(self.wanted)

    def adapt(self, method: Any) -> tuple[Adapters, dict[str, Any]]:
        """Make adapters by a method without gradients, and the bound of a construction's."""
        if isinstance(method, Fitted):
            fused = fuse(self.frozen, self.target, method.ranks)
            adapters = nearest(fused, self.task.training[0])
            return fused.carry_back(adapters, self.region, throw=False).adapters, {}
        adapters, known = super().adapt(method)
        if isinstance(self.frozen, FNN):
            norm = fnn_error_on(self.frozen, self.target, method.ranks, self.x)
            known["bound"] = float(norm.square() / CLASSES / self.variance)
        return adapters, known

    def test(self, network: Any, **known: Any) -> Readings:
        votes = {"": _votes(network, self.x), "target_": self.wanted}
        votes["frozen_"] = _votes(self.frozen, self.x)
        for name, each in votes.items():
            known[f"{name}accuracy"] = float((each.argmax(-2) == self.y).double().mean())
        error = float((votes[""] - self.wanted).square().mean() / self.variance)
        return Readings(error=error, **known)
