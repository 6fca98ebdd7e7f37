"""ReLU networks that read handwritten digits, adapted to turned digits.

The images are scikit-learn's, 1797 of 8 × 8 grey values (Alpaydin and Kaynak 1998). Networks are
pretrained on upright images; a target is then trained in full on images that are turned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from lorapower.adapters import Adapters
from lorapower.book.values import Values
from lorapower.bounds.layers import fnn_threshold
from lorapower.constructions.fitted import nearest
from lorapower.constructions.fused import fuse
from lorapower.networks.layers import FNN
from lorapower.randomness import generator
from lorapower.regions import Box
from lorapower.regression import variance as variance_of
from lorapower.training.engine import train
from lorapower.training.tuning import Fixed, Labelled, Tuning
from records.methods import AnyRun, Fitted, Method, TrainingResults, adapt_by, measure_on

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
    turned = torch.nn.functional.grid_sample(pictures[:, None], places, align_corners=False)
    return (256 * turned[:, 0]).round().clamp(0, 256) / 256


@functools.cache
def _task(angle: float, seed: int) -> list[Labelled]:
    """The digits turned by an angle, split in three by the seed alone; inputs are the pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # From 0 (paper) to 1 (ink).
    pictures = _turn(torch.from_numpy(digits.images / 16).to(torch.float32), angle)
    classes = torch.from_numpy(digits.target)
    order = torch.randperm(len(classes), generator=generator(seed, "split"))
    return [(pictures[part].flatten(1).mT, classes[part]) for part in order.split([*SIZES])]


class Digits(Values):
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

    def networks(self) -> tuple[FNN, FNN]:
        """Make the frozen network and the target, in double precision."""
        if self.start == "pretrained":
            frozen = _pretrained(self.depth, self.seed, self.pretraining)
        else:
            frozen = _drawn(self.depth, self.seed, "random")
        return frozen, _target(self.angle, self.seed, self.pretraining)


class Run(AnyRun):
    """Say which method is to solve which problem; raise `InputError` if they do not fit."""

    problem: Digits
    method: Method

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.method, Fitted):
            usual = self.method == Fitted(ranks=self.method.ranks)
            self.method.require("inputs", usual, "left out, as all options of a fit to images")
        return self


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
    options: Any = {"steps": steps, "every": EVERY}
    return train(network, [tuning], data, **options).network[0].to(torch.float64)


class Readings(TrainingResults):
    """Hold what a run reaches on the test images.

    ``accuracy`` is the share of images whose digit has the largest logit, ``error`` the mean
    squared difference of the logits from the target's over their variance about each class's mean.
    ``threshold`` is the rank from which on the construction is exact.
    """

    accuracy: float
    error: float
    target_accuracy: float
    threshold: int


def measure(runs: Sequence[Run]) -> list[Readings]:
    """Measure what each run of one problem reaches."""
    (problem,) = {run.problem for run in runs}
    frozen, target = problem.networks()
    images, validation, (x, classes) = _task(problem.angle, problem.seed)
    x, region = x.to(torch.float64), Box(0.0, 1.0)  # of all possible images
    y = target(x)
    variance = float(variance_of(y))
    known: Any = {"target_accuracy": _accuracy(y, classes)}
    known["threshold"] = int(fnn_threshold(frozen, target))

    def fit(method: Fitted) -> Adapters:
        fused = fuse(frozen, target, method.ranks)
        return fused.split_among_layers(nearest(fused, images[0]), region, throw=False).adapters

    methods = [run.method for run in runs]
    data = Fixed(images, validation, samples=BATCH, seed=problem.seed)
    options: Any = {"steps": problem.steps, "every": EVERY}
    options |= {"seed": problem.seed, "region": region, "fit": fit}
    return [
        Readings(
            accuracy=_accuracy(network(x), classes),
            error=measure_on(network, x, y) / variance,
            **known,
            **curve,
        )
        for network, curve in adapt_by(methods, frozen, target, data, **options)
    ]


def _accuracy(logits: Tensor, classes: Tensor) -> float:
    return float((logits.argmax(0) == classes).double().mean())
