"""Handwritten digits: tasks on real images, networks trained on them, and what adapts one to one.

The images are scikit-learn's, 1797 of 8 × 8 grey values, and a task is to read them turned by an
angle. Networks are pretrained on upright images; a target is one that was then trained in full on a
task. As elsewhere, `measure` runs any number of settings of one problem.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, bounds, constructions
from ..adapters import Adapters
from ..errors import InputError
from ..networks import FNN, Transformer, blocks, segments
from ..randomness import generator
from ..regions import Box
from ..training import Fixed, Tuning, train
from ..training.data import Labelled
from . import synthetic

SIDE, CLASSES = 8, 10
PIXELS = SIDE**2
SIZES = {"training": 1000, "validation": 297, "test": 500}

MODELS = ("fnn", "transformer")
STARTS = ("pretrained", "random")
METHODS = ("construction", "fitted", *synthetic.TRAINED)
OF_METHOD = ("method", "ranks", "final", "learning_rate")
# Of targets, and of transformers that are adapted too.
DEPTHS = {"fnn": 2, "transformer": 1}
HEADS = 2
# Added to the votes of ReLU networks at the start, so that none is cut off: what is cut off for all
# images gets no gradient, and its class is never named.
LIFT = 10.0
PRETRAINING = Tuning(learning_rate=3e-3)
PRETRAINING_STEPS = 1500
BATCH, EVERY = 100, 20

# Model and depth of the frozen networks, and the ranks that are tried.
CASES = (("fnn", 2), ("fnn", 4), ("transformer", 1))
RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64)
TRAINED_RANKS = {"quick": (1, 2, 4, 8, 16, 32), "paper": (1, 2, 3, 4, 6, 8, 12, 16, 32)}
GRIDS: dict[str, dict[str, Any]] = {
    "quick": {"learning_rate": [1e-2], "steps": 800, "seed": range(3)},
    "paper": {"learning_rate": [1e-2, 3e-3], "steps": 2000, "seed": range(5)},
}


@functools.cache
def images() -> tuple[Float[Tensor, "samples side side"], Int[Tensor, " samples"]]:
    """All images, grey values from 0 (paper) to 1 (ink), and the digits that they show.

    Raises `InputError` where scikit-learn, in which the images are, is not installed. Source:
    `alpaydin1998` in the book's bibliography.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "digits",
            allowed="used where scikit-learn is installed",
            given="none",
            remedy="install it (it is in the extra `glue`)",
        ) from error
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)


def turned(
    pictures: Float[Tensor, "samples side side"], angle: float
) -> Float[Tensor, "samples side side"]:
    """Images turned counter-clockwise by so many degrees about their centre.

    Grey values are interpolated linearly, and rounded to multiples of 1/256, without which hardly
    any pixel would be free of ink; what comes from outside is 0.
    """
    phi = torch.tensor(math.radians(angle))
    matrix = torch.tensor([[phi.cos(), -phi.sin(), 0.0], [phi.sin(), phi.cos(), 0.0]])
    shape = len(pictures), 1, *pictures.shape[1:]
    places = torch.nn.functional.affine_grid(
        matrix.expand(len(pictures), 2, 3), list(shape), align_corners=False
    )
    found = torch.nn.functional.grid_sample(pictures[:, None], places, align_corners=False)
    return (256 * found[:, 0]).round().clamp(0, 256) / 256


class Split(NamedTuple):
    """Labelled images as a network takes them; no image is in two of the three."""

    training: Labelled
    validation: Labelled
    test: Labelled


@functools.cache
def task(model: str, angle: float, seed: int) -> Split:
    """The digits turned by an angle, split at random; the split depends on the seed alone.

    A ReLU network sees the 64 pixels of an image, ``[64, samples]``. A transformer sees a token for
    each row, ``[samples, 16, 8]``: its eight pixels, and a one in the coordinate that says which
    row it is. Raises `InputError` for another model.
    """
    if model not in MODELS:
        raise InputError("model", allowed=" or ".join(MODELS), given=repr(model))
    pictures, classes = images()
    pictures = turned(pictures, angle)
    order = torch.randperm(len(classes), generator=generator(seed, "split"))
    if model == "fnn":
        parts = [pictures[part].flatten(1).mT for part in order.split([*SIZES.values()])]
    else:
        places = torch.eye(SIDE).expand(len(pictures), SIDE, SIDE)
        tokens = torch.cat([pictures.mT, places], dim=1)
        parts = [tokens[part] for part in order.split([*SIZES.values()])]
    labels = [classes[part] for part in order.split([*SIZES.values()])]
    return Split(*zip(parts, labels, strict=True))


def votes(network: FNN | Transformer, x: Tensor) -> Float[Tensor, "classes samples"]:
    """Votes of a network for each digit; a transformer's are summed over its tokens."""
    return network(x).sum(-1).mT if network.sequences else network(x)


def accuracy(network: FNN | Transformer, labelled: Labelled) -> float:
    """Part of the images whose digit gets the most votes."""
    x, y = labelled
    return float((votes(network, x).argmax(-2) == y).double().mean())


def error(network: FNN | Transformer, target: FNN | Transformer, x: Tensor) -> float:
    """Mean squared difference of the votes from the target's, over the variance of these.

    Means are over classes and samples, the variance of each class's votes is about their mean.
    """
    found, wanted = votes(network, x), votes(target, x)
    variance = wanted.var(-1, correction=0).mean()
    return float((found - wanted).square().mean() / variance)


@dataclass(frozen=True)
class Setting:
    """One run: a frozen network and a target, and a method that adapts the one to the other.

    Attributes
    ----------
    model : ``"fnn"``: ReLU networks of width 64 and ten outputs. ``"transformer"``: of one block,
        two heads and width 16 over the rows of an image.
    depth : of the frozen network; that of the target is 2 for ReLU networks and 1 for transformers.
    start : the frozen network is ``"pretrained"`` on upright digits, or ``"random"``.
    angle : of the task, in degrees; the target was trained on it in full, starting from the network
        of its depth that was pretrained on upright digits.
    method : ``"construction"``: the theorems' adapters. ``"fitted"``: the construction for the
        nearest target on the training images that the ranks reach (`constructions.fnn.reachable`).
        ``"lora"``: adapters by Adam, which sees digits and not the target. ``"final"``: the last
        weights in full by Adam.
    ranks : of every adapter.
    final : number of last weights.
    steps, learning_rate : of Adam.
    seed : of the split, of the networks before their training, and of the first factors.

    Raises `InputError` for a value that has no meaning, alone or with the others.
    """

    model: str = "fnn"
    depth: int = 2
    start: str = "pretrained"
    angle: float = 90.0
    method: str = "lora"
    ranks: int = 0
    final: int = 0
    steps: int = 1000
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("model", MODELS), ("start", STARTS), ("method", METHODS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    name, allowed=f"one of {', '.join(allowed)}", given=repr(getattr(self, name))
                )
        least = DEPTHS[self.model]
        _checks.integer("depth", self.depth, least, least if self.model == "transformer" else 16)
        if not -360 <= self.angle <= 360:
            raise InputError("angle", allowed="from -360 to 360 degrees", given=self.angle)
        _checks.integer("ranks", self.ranks, 0, self.width, limit="the width")
        _checks.integer("final", self.final, 0, self.weights, limit="the weights")
        _checks.integer("steps", self.steps, EVERY)
        _checks.integer("seed", self.seed, 0)
        self.tuning()
        if (self.method == "final") != (self.final > 0):
            raise InputError(
                "final",
                allowed="above 0 with method 'final', and 0 with others",
                given=f"{self.final} with {self.method!r}",
            )
        if self.method == "fitted" and self.model == "transformer":
            raise InputError("method", allowed="'fitted' for model 'fnn'", given=self.model)

    @property
    def width(self) -> int:
        """Of the layers, or of a token; no rank is above it."""
        return PIXELS if self.model == "fnn" else 2 * SIDE

    @property
    def weights(self) -> int:
        """Number of the frozen network's weights, which are tuned in full if ``final`` is this."""
        return self.depth if self.model == "fnn" else (4 * HEADS + 2) * self.depth + 1

    @property
    def problem(self) -> Setting:
        """The same problem with no method, equal for all settings that share it."""
        plain: Any = {field.name: field.default for field in fields(Setting)}
        return replace(self, **{name: plain[name] for name in OF_METHOD})

    @property
    def task(self) -> Split:
        return task(self.model, self.angle, self.seed)

    def tuning(self) -> Tuning:
        """What gradient training makes of it."""
        return Tuning(self.of_weights, self.final, learning_rate=self.learning_rate)

    @property
    def of_weights(self) -> int | tuple[int, ...]:
        """Rank of the adapter of each weight: ``ranks``, but no more than its smaller side."""
        if self.model == "transformer":
            return self.ranks
        return (self.ranks,) * (self.depth - 1) + (min(self.ranks, CLASSES),)

    def construct(self, frozen: Any, target: Any) -> Adapters:
        """The construction's adapters, for ReLU networks over all images that there can be."""
        if self.method == "fitted":
            inputs = self.task.training[0]
            target = constructions.fnn.reachable(frozen, target, self.of_weights, inputs)
        return synthetic.construct(frozen, target, self.of_weights, Box(0.0, 1.0))

    def networks(self) -> tuple[Any, Any]:
        """The frozen network and the target, in double precision."""
        made = pretrained if self.start == "pretrained" else random
        return made(self.model, self.depth, self.seed), target(self.model, self.angle, self.seed)

    def threshold(self) -> int:
        """The least equal rank at which the construction is exact."""
        frozen, target = self.networks()
        least = bounds.fnn_threshold if self.model == "fnn" else bounds.transformer_threshold
        return int(least(frozen, target))

    def error_matrices(self) -> dict[str, Float[Tensor, "heads out in"]]:
        """What adapters have to make up for, by name.

        Of a ReLU network ``first``, the first block's ``E_1``, and ``on data``, ``E_1`` times the
        training images about their mean over the root of their number, whose singular values are
        those of ``E_1 C^{1/2}``. Of a transformer ``scores`` and ``values``, those of its heads.
        """
        frozen, target = self.networks()
        if self.model == "transformer":
            cut = segments(frozen, target)
            return {"scores": cut.query_key.matrix[0], "values": cut.value_output.matrix[0]}
        E = blocks(frozen, target)[0].matrix
        x = self.task.training[0].to(E.dtype)
        shifted = (x - x.mean(1, keepdim=True)) / x.shape[1] ** 0.5
        return {"first": E[None], "on data": (E @ shifted)[None]}


def spectra(settings: Sequence[Setting]) -> pd.DataFrame:
    """Singular values ``sigma`` of each of the settings' error matrices.

    One row for each value, with its index ``d`` from 1, the ``matrix`` by its name in
    `Setting.error_matrices`, and the setting's ``start`` and ``angle``.
    """
    rows = []
    for setting in settings:
        same = {"start": setting.start, "angle": setting.angle}
        for name, matrices in setting.error_matrices().items():
            for values in torch.linalg.svdvals(matrices).tolist():
                rows += [
                    same | {"matrix": name, "d": d, "sigma": v} for d, v in enumerate(values, 1)
                ]
    return pd.DataFrame(rows)


def needed(table: pd.DataFrame, tolerance: float = 0.1, points: float = 0.01) -> dict[str, float]:
    """The least rank in a table of runs at which each of three aims is met, medians over seeds.

    ``bound``: the bound is at most the tolerance. ``error``: the error is. ``accuracy``: it is at
    most so much below the target's. Infinite where half of the seeds or more meet it at no rank.
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


def random(model: str, depth: int, seed: int) -> FNN | Transformer:
    """A network as drawn, independent of all that `pretrained` makes of the same seed."""
    return _drawn(model, depth, seed, "random")


@functools.cache
def pretrained(model: str, depth: int, seed: int) -> FNN | Transformer:
    """A network trained in full on upright digits."""
    return _trained(_drawn(model, depth, seed, "before pretraining"), task(model, 0.0, seed), seed)


@functools.cache
def target(model: str, angle: float, seed: int) -> FNN | Transformer:
    """The pretrained network of the target's depth, trained in full on digits that are turned."""
    return _trained(pretrained(model, DEPTHS[model], seed), task(model, angle, seed), seed)


def _drawn(model: str, depth: int, seed: int, purpose: str) -> FNN | Transformer:
    if model == "transformer":
        width = 2 * SIDE
        drawn = Transformer.random(
            depth, width, HEADS, scale=width**-0.5, seed=seed, purpose=purpose
        )
        return drawn.with_parameters([*drawn.weights[:-1], drawn.weights[-1][:CLASSES]])
    square = FNN.random(depth, PIXELS, seed=seed, purpose=purpose)
    *weights, last = square.weights
    *biases, last_bias = square.biases
    return FNN([*weights, last[:CLASSES]], [*biases, last_bias[:CLASSES] + LIFT])


def _trained(network: Any, split: Split, seed: int) -> Any:
    runs = train(
        network,
        [replace(PRETRAINING, final=len(network.weights))],
        _data(split, seed),
        steps=PRETRAINING_STEPS,
        every=EVERY,
        classes=range(CLASSES),
    )
    return runs.network[0].to(torch.float64)


def _data(split: Split, seed: int) -> Fixed:
    return Fixed(split.training, split.validation, samples=BATCH, seed=seed)


def measure(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What each setting of one problem reaches on the test images.

    ``accuracy`` is the part of them that is read rightly, ``error`` that of the function of this
    name; ``bound`` is what `bounds.fnn_error_on` says of it for the plain construction of a ReLU
    network.
    ``target_accuracy`` and ``frozen_accuracy`` are those of the two networks; ``validation_loss``
    is the least one met in training, at step ``best_step``. What does not apply is NaN, or step −1.

    Raises `InputError` for settings of several problems.
    """
    problem = settings[0].problem
    if any(setting.problem != problem for setting in settings):
        raise InputError("settings", allowed="of one problem", given="several")
    frozen, wanted = problem.networks()
    x, y = problem.task.test[0].to(torch.float64), problem.task.test[1]
    variance = votes(wanted, x).var(-1, correction=0).mean()
    of_problem = {
        "target_accuracy": accuracy(wanted, (x, y)),
        "frozen_accuracy": accuracy(frozen, (x, y)),
    }
    found = synthetic.adapted(
        settings,
        frozen,
        _data(problem.task, problem.seed),
        lambda setting: setting.construct(frozen, wanted),
        steps=problem.steps,
        every=EVERY,
        classes=range(CLASSES),
        seed=problem.seed,
    )
    rows = []
    for setting, (network, about) in zip(settings, found, strict=True):
        network = network.to(torch.float64)
        bound = math.nan
        if (setting.model, setting.method) == ("fnn", "construction"):
            norm = bounds.fnn_error_on(frozen, wanted, setting.of_weights, x)
            bound = float(norm.square() / CLASSES / variance)
        rows.append(
            {
                "accuracy": accuracy(network, (x, y)),
                "error": error(network, wanted, x),
                "bound": bound,
                **of_problem,
                **about,
            }
        )
    return rows
