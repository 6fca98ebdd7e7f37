"""Adapt to digits in few bits, and bound the share of errors on new images by their number.

The frozen network is random, or pretrained on other images, so the code for adapters is fixed
before the images of the task are seen. A prior may use some of these; only the others then count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import randomness
from .._records import Record, Results
from ..adapters import Adapters
from ..bounds import samples
from ..lowrank import LowRank
from ..networks.layers import FNN
from ..training._free import Free
from ..training.engine import begin
from ..training.tuning import Fixed, Labelled, Tuning
from . import digits
from ._codes import code_length, core_sides, cores_length, quantize, quantize_core
from ._training import one_problem
from .digits import CLASSES

SIZES = {"training": 1000, "pretraining": 400, "test": 397}
DEPTH, RATE, CORE_RATE = 2, 1e-2, 3e-2
DELTA = 0.05


class _Split(NamedTuple):
    """Labelled images; no image is in two of the three."""

    training: Labelled
    pretraining: Labelled
    test: Labelled


class Problem(Record):
    """Make a frozen network of two layers, and the digits to adapt it with.

    The network is ``"random"``, or ``"pretrained"`` on 400 upright images that serve for nothing
    else. Images of the task are turned by ``angle`` degrees.
    """

    start: digits.Start = "pretrained"
    angle: float = Field(90.0, ge=-360, le=360)
    steps: int = Field(600, ge=1)
    seed: int = Field(0, ge=0)

    def split(self, *, angle: float | None = None) -> _Split:
        """Split the images, turned by ``angle`` degrees, by default the problem's."""
        angle = self.angle if angle is None else angle
        return _Split(*digits.split_pixels(angle, self.seed, "split for codes", SIZES.values()))

    def frozen(self) -> FNN:
        """Make the frozen network, in double precision."""
        return _freeze(self.start, self.seed)


class Coded(Record):
    """Code adapters of one rank, and changes of ``biases`` or not, in ``bits`` per number."""

    kind: Literal["coded"] = "coded"
    ranks: int = Field(1, ge=0, le=digits.PIXELS)
    bits: int = Field(2, ge=1, le=12)
    biases: bool = True


class Cores(Record):
    """Code cores of one rank between singular vectors of the frozen weights, as in LoRA-XS.

    With a ``prior``, so many of the images first train the whole frozen network, and the code is
    for the others; rank 0 then bounds the errors of the network so trained as a test would.
    """

    kind: Literal["cores"] = "cores"
    ranks: int = Field(4, ge=0, le=digits.PIXELS)
    bits: int = Field(1, ge=1, le=12)
    prior: int = Field(0, ge=0, lt=SIZES["training"])


class Setting(Record):
    """Say which method is to solve which problem."""

    problem: Problem = Problem()
    method: Annotated[Coded | Cores, Field(discriminator="kind")] = Coded()


class Found(Results):
    """Hold a code's length in bits, the shares of errors of its network, and bounds on new ones.

    ``occam`` and ``kl`` bound the error on new images with probability 0.95 (`bounds.samples`).
    """

    length: int
    training_error: float
    test_error: float
    occam: float
    kl: float


def measure(settings: Sequence[Setting]) -> list[Found]:
    """Measure what each setting reaches; raise `InputError` if they have several problems."""
    problem: Problem = one_problem(settings)
    split = problem.split()
    found = []
    for method in (setting.method for setting in settings):
        network, labelled = problem.frozen(), split.training
        if isinstance(method, Coded):
            adapters = _fit(problem, method, network, labelled)
            network, length = adapters.merge(network), code_length(adapters, method.bits)
        else:
            if method.prior:
                known, labelled = _divide(labelled, method.prior)
                network = digits.train(network, [known] * 2, problem.seed, "prior", 300, every=1)
            cores = _fit_cores(problem, method, network, labelled)
            network, length = _insert(network, cores), cores_length(cores, method.bits)
        error, test_error = (
            1 - digits.accuracy(network, (x.double(), y)) for x, y in (labelled, split.test)
        )
        given = (error, length, len(labelled[1]), DELTA)
        bounds = {"occam": samples.occam_bound(*given), "kl": samples.kl_bound(*given)}
        found.append(Found(length=length, training_error=error, test_error=test_error, **bounds))
    return found


def _divide(labelled: Labelled, count: int) -> tuple[Labelled, Labelled]:
    """The first images and the others."""
    x, y = labelled
    return (x[:, :count], y[:count]), (x[:, count:], y[count:])


def _fit_cores(problem: Problem, method: Cores, frozen: FNN, labelled: Labelled) -> list[Tensor]:
    """Rounded cores, trained by Adam through the rounding."""
    if not method.ranks:
        return []
    x, y = labelled[0].float(), labelled[1]
    network = frozen.to(torch.float32)
    # The signs of singular vectors are those of the adapters, in double precision.
    pairs = [core_sides(weight, method.ranks) for weight in frozen.weights]
    sides = [(left.float(), right.float()) for left, right in pairs]
    generator = randomness.generator(problem.seed, "cores")
    sizes = [left.shape[1] for left, _ in sides]
    cores = [(1e-2 * randomness.normal(generator, size, size)).float() for size in sizes]

    def votes(rounded: Sequence[Tensor]) -> Tensor:
        h = x
        for weight, bias, (left, right), core in zip(
            network.weights, network.biases, sides, rounded, strict=True
        ):
            h = torch.relu(weight @ h + left @ (core @ (right.mT @ h)) + bias[:, None])
        return h

    def rounding(core: Tensor) -> Tensor:
        return quantize_core(core, method.bits).to(core)

    kept = _descend(cores, rounding, votes, y, problem.steps, CORE_RATE)
    return [quantize_core(core, method.bits) for core in kept]


def _insert(network: FNN, cores: list[Tensor]) -> FNN:
    """The network with cores between the singular vectors of its weights."""
    if not cores:
        return network
    updates = []
    for weight, core in zip(network.weights, cores, strict=True):
        left, right = core_sides(weight, len(core))
        updates.append(LowRank(left @ core, right))
    return Adapters(tuple(updates)).merge(network)


def _fit(problem: Problem, method: Coded, frozen: FNN, labelled: Labelled) -> Adapters:
    """Rounded adapters, trained by Adam through the rounding."""
    x, y = labelled[0].to(frozen.dtype), labelled[1]
    ranks = tuple(min(method.ranks, *weight.shape) for weight in frozen.weights)
    data = Fixed(labelled, labelled)
    tunings = [Tuning(ranks, biases=method.biases)]
    start = begin(frozen, tunings, data, classes=range(CLASSES), seed=problem.seed)[0]
    free = Free.of(frozen, start)
    if not free.count:
        return start.to(frozen.dtype)

    def rounding(part: Tensor) -> Tensor:
        columns = part if part.ndim == 2 else part[:, None]
        return quantize(columns, method.bits).reshape(part.shape)

    def votes(rounded: Sequence[Tensor]) -> Tensor:
        return free.merge(rounded)(x)

    kept = _descend(free.start, rounding, votes, y, problem.steps, RATE)
    return free.adapters_of([rounding(part) for part in kept])


def _descend(
    parts: Sequence[Tensor],
    rounding: Callable[[Tensor], Tensor],
    votes: Callable[[Sequence[Tensor]], Tensor],
    y: Tensor,
    steps: int,
    rate: float,
) -> list[Tensor]:
    """Parts that, rounded, read the images best, by Adam as if nothing were rounded."""
    parts = [part.requires_grad_() for part in parts]
    optimizer = torch.optim.Adam(parts, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = float("inf"), parts
    for _ in range(steps):
        out = votes([part + (rounding(part.detach()) - part.detach()) for part in parts])
        wrong = float((out.detach().argmax(0) != y).double().mean())
        if wrong < best:
            best, kept = wrong, [part.detach().clone() for part in parts]
        optimizer.zero_grad()
        cross_entropy(out.mT, y).backward()
        optimizer.step()
        falling.step()
    return kept


@functools.cache
def _freeze(start: str, seed: int) -> FNN:
    drawn: FNN = digits.Problem(depth=DEPTH, start="random", seed=seed).frozen()
    if start == "random":
        return drawn
    # Without images to choose by, those that it is trained on choose.
    parts = [Problem(seed=seed).split(angle=0.0).pretraining] * 2
    purpose = "pretraining apart, 10 classes"
    network: FNN = digits.train(drawn, parts, seed, purpose, digits.PRETRAINING_STEPS)
    return network
