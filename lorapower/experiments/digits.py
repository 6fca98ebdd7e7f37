"""ReLU networks that read handwritten digits, adapted to turned digits.

The images are scikit-learn's, 1797 of 8 × 8 grey values (Alpaydin and Kaynak 1998). Networks are
pretrained on upright images; a target is then trained in full on images that are turned.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..adapters import Adapters
from ..bounds.layers import fnn_threshold
from ..constructions.fitted import nearest
from ..constructions.fused import fuse
from ..networks.layers import FNN
from ..randomness import generator
from ..regions import Box
from ..regression import variance as variance_of
from ..training.engine import train
from ..training.tuning import Fixed, Labelled, Tuning
from .study import Bench, Course, Fitted, Problem

SIDE, CLASSES = 8, 10
PIXELS = SIDE**2
# Images for training, validation and test.
SIZES = 1000, 297, 500
# Layers of a target.
DEPTH = 2
# Added to the logits at the start: a logit that is 0 for all images gets no gradient.
LIFT = 10.0
# Images in a batch; steps between validations.
BATCH, EVERY = 100, 20


def _turn(
    pictures: Float[Tensor, "samples side side"], angle: float
) -> Float[Tensor, "samples side side"]:
    """Images turned counter-clockwise by degrees, interpolated linearly, with 0 outside.

    Grey values are multiples of 1/256, as otherwise hardly any pixel would be free of ink.
    """
    phi = torch.tensor(math.radians(angle))
    matrix = torch.tensor([[phi.cos(), -phi.sin(), 0.0], [phi.sin(), phi.cos(), 0.0]])
    places = torch.nn.functional.affine_grid(
        matrix.expand(len(pictures), 2, 3), [len(pictures), 1, SIDE, SIDE], align_corners=False
    )
    found = torch.nn.functional.grid_sample(pictures[:, None], places, align_corners=False)
    return (256 * found[:, 0]).round().clamp(0, 256) / 256


@functools.cache
def _task(angle: float, seed: int) -> list[Labelled]:
    """The digits turned by an angle, split in three by the seed alone; inputs are the pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    # From 0 (paper) to 1 (ink).
    pictures = _turn(torch.from_numpy(found.images / 16).to(torch.float32), angle)
    classes = torch.from_numpy(found.target)
    order = torch.randperm(len(classes), generator=generator(seed, "split"))
    return [(pictures[part].flatten(1).mT, classes[part]) for part in order.split([*SIZES])]


class Digits(Problem):
    """Make a frozen network and a target, trained on digits or drawn, and data to adapt it with.

    Networks have width 64 and ten outputs. The frozen network has ``depth`` layers and is
    ``"random"`` or ``"pretrained"`` on upright digits. The target has depth 2 and is pretrained,
    then trained in full on digits turned by ``angle`` degrees. Each training of a whole network has
    ``pretraining`` steps, those of adapters have ``steps``. Fits are to the training images.
    """

    width: ClassVar[int] = PIXELS

    depth: int = Field(2, ge=DEPTH, le=16)
    start: Literal["pretrained", "random"] = "pretrained"
    angle: float = Field(90.0, ge=-360, le=360)
    pretraining: int = Field(500, ge=EVERY)
    steps: int = Field(1000, ge=EVERY)
    seed: int = Field(0, ge=0)

    def require_fit(self, method: Any) -> None:
        super().require_fit(method)
        if isinstance(method, Fitted):
            usual = method == Fitted(ranks=method.ranks)
            method.require("inputs", usual, "left out, as all options of a fit to images")

    def networks(self) -> tuple[FNN, FNN]:
        """Make the frozen network and the target, in double precision."""
        if self.start == "pretrained":
            frozen = _pretrained(self.depth, self.seed, self.pretraining)
        else:
            frozen = _drawn(self.depth, self.seed, "random")
        return frozen, _target(self.angle, self.seed, self.pretraining)

    def bench(self) -> Bench:
        """Make the networks and the data."""
        return _Bench(self)


@functools.cache
def _pretrained(depth: int, seed: int, steps: int) -> FNN:
    """A network trained in full on upright digits."""
    drawn = _drawn(depth, seed, f"before pretraining, depth {depth}")
    return _train(drawn, _task(0.0, seed), seed, steps, f"pretraining, depth {depth}")


@functools.cache
def _target(angle: float, seed: int, steps: int) -> FNN:
    """The pretrained network of the target's depth, trained in full on digits that are turned."""
    return _train(_pretrained(DEPTH, seed, steps), _task(angle, seed), seed, steps, "target")


def _drawn(depth: int, seed: int, purpose: str) -> FNN:
    square = FNN.random(depth, PIXELS, seed=seed, purpose=purpose)
    *weights, last = square.weights
    *biases, last_bias = square.biases
    return FNN([*weights, last[:CLASSES]], [*biases, last_bias[:CLASSES] + LIFT])


def _train(network: FNN, task: list[Labelled], seed: int, steps: int, purpose: str) -> FNN:
    """Train all weights of a network."""
    data = Fixed(*task[:2], samples=BATCH, seed=seed, purpose=(purpose,))
    tuning = Tuning(final=network.depth, learning_rate=3e-3)
    options: Any = {"steps": steps, "every": EVERY, "classes": range(CLASSES)}
    return train(network, [tuning], data, **options).network[0].to(torch.float64)


class Readings(Course):
    """Hold what a run reaches on the test images.

    ``accuracy`` is the share of images whose digit has the largest logit, ``error`` the mean
    squared difference of the logits from the target's over their variance about each class's mean.
    ``threshold`` is the rank from which on the construction is exact.
    """

    accuracy: float
    error: float
    target_accuracy: float
    threshold: int


class _Bench(Bench):
    region = Box(0.0, 1.0)  # of all possible images

    def __init__(self, problem: Digits) -> None:
        self.frozen, self.target = problem.networks()
        self.images, validation, (x, self.y) = _task(problem.angle, problem.seed)
        self.data = Fixed(self.images, validation, samples=BATCH, seed=problem.seed)
        self.course = {"steps": problem.steps, "every": EVERY, "classes": range(CLASSES)}
        self.course["seed"] = problem.seed
        self.x = x.to(torch.float64)
        self.wanted = self.target(self.x)
        self.variance = variance_of(self.wanted)
        self.threshold = int(fnn_threshold(self.frozen, self.target))

    def adapt(self, method: Any) -> Adapters:
        """Make adapters by a method without gradients."""
        if not isinstance(method, Fitted):
            return super().adapt(method)
        fused = fuse(self.frozen, self.target, method.ranks)
        adapters = nearest(fused, self.images[0])
        return fused.carry_back(adapters, self.region, throw=False).adapters

    def test(self, network: Any, **known: Any) -> Readings:
        logits = network(self.x)
        error = float((logits - self.wanted).square().mean() / self.variance)
        return Readings(
            accuracy=self._accuracy(logits),
            error=error,
            target_accuracy=self._accuracy(self.wanted),
            threshold=self.threshold,
            **known,
        )

    def _accuracy(self, logits: Tensor) -> float:
        return float((logits.argmax(0) == self.y).double().mean())
