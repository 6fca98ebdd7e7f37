"""Adapters in few bits on the digits, and what their number of bits says of new images.

The frozen network is random or pretrained on other images. So the code for adapters is fixed before
the images of the task are seen, and errors on these bound the share of errors on new ones. A prior
may use some of them: then only the others count.
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
from ..adapters.coding import (
    core_sides,
    decode,
    decode_cores,
    encode,
    encode_cores,
    quantize,
    quantize_core,
)
from ..adapters.core import Adapters
from ..bounds import samples
from ..networks.layers import FNN
from ..training._free import Free
from ..training.engine import begin
from ..training.tuning import Fixed, Labelled, Tuning
from . import digits
from ._training import one_problem, train_fully
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
    """A frozen network of two layers, and the digits to adapt it with.

    The network is ``"random"``, or ``"pretrained"`` on 400 upright images that serve for nothing
    else. Images of the task are turned by ``angle`` degrees.
    """

    start: digits.Start = "pretrained"
    angle: float = Field(90.0, ge=-360, le=360)
    steps: int = Field(600, ge=1)
    seed: int = Field(0, ge=0)

    def split(self, *, angle: float | None = None) -> _Split:
        """The images, turned by ``angle`` degrees, by default the problem's."""
        pictures, classes = digits.images()
        pictures = digits.turn(pictures, self.angle if angle is None else angle)
        generator = randomness.generator(self.seed, "split for codes")
        order = torch.randperm(len(classes), generator=generator, device="cpu")
        parts = order.split([*SIZES.values()])
        return _Split(*((pictures[part].flatten(1).mT, classes[part]) for part in parts))

    def frozen(self) -> FNN:
        """The frozen network, in double precision."""
        return _freeze(self.start, self.seed)


class Coded(Record):
    """Adapters of one rank and, if ``biases`` are tuned, their changes, in ``bits`` per number."""

    kind: Literal["coded"] = "coded"
    ranks: int = Field(1, ge=0, le=digits.PIXELS)
    bits: int = Field(2, ge=1, le=12)
    biases: bool = True


class Cores(Record):
    """Cores of one rank between singular vectors of the frozen weights, as in LoRA-XS.

    With a ``prior``, so many of the images first train the whole frozen network, and the code is
    for the others; rank 0 then bounds the errors of the network so trained as a test would.
    """

    kind: Literal["cores"] = "cores"
    ranks: int = Field(4, ge=0, le=digits.PIXELS)
    bits: int = Field(1, ge=1, le=12)
    prior: int = Field(0, ge=0, lt=SIZES["training"])


class Setting(Record):
    """One run."""

    problem: Problem = Problem()
    method: Annotated[Coded | Cores, Field(discriminator="kind")] = Coded()


class Found(Results):
    """A code's length in bits, errors of the network read from it, and bounds on new images.

    ``occam`` and ``kl`` bound the error on new images with probability 0.95 (`bounds.samples`).
    """

    length: int
    training_error: float
    test_error: float
    occam: float
    kl: float


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting of one problem reaches; raises `InputError` for several problems."""
    problem: Problem = one_problem(settings)
    frozen, split = problem.frozen(), problem.split()
    found = []
    for method in (setting.method for setting in settings):
        base, labelled = frozen, split.training
        # What counts is what can be read from the code.
        if isinstance(method, Coded):
            code = encode(_fit(problem, method, frozen, labelled), method.bits)
            adapters = decode(code.data, frozen)
        else:
            if method.prior:
                known, labelled = _divide(labelled, method.prior)
                base = _train_prior(frozen, known, problem.seed)
            code = encode_cores(_fit_cores(problem, method, base, labelled), method.bits)
            adapters = decode_cores(code.data, base)
        network = adapters.merge(base)
        known_error, new = (
            1 - digits.accuracy(network, (x.double(), y)) for x, y in (labelled, split.test)
        )
        given = (known_error, code.length, len(labelled[1]), DELTA)
        bounds = {"occam": samples.occam_bound(*given), "kl": samples.kl_bound(*given)}
        found.append(
            Found(length=code.length, training_error=known_error, test_error=new, **bounds)
        )
    return found


def _divide(labelled: Labelled, count: int) -> tuple[Labelled, Labelled]:
    """The first images and the others."""
    x, y = labelled
    return (x[:, :count], y[:count]), (x[:, count:], y[count:])


def _train_prior(frozen: FNN, labelled: Labelled, seed: int) -> FNN:
    data = Fixed(labelled, labelled, samples=digits.BATCH, seed=seed, purpose=("prior",))
    network: FNN = train_fully(frozen, data, digits.PRETRAINING, classes=range(CLASSES), steps=300)
    return network


def _fit_cores(problem: Problem, method: Cores, frozen: FNN, labelled: Labelled) -> list[Tensor]:
    """Cores by Adam on rounded numbers."""
    x, y = labelled[0].float(), labelled[1]
    weights, biases = ([p.float() for p in part] for part in (frozen.weights, frozen.biases))
    # The signs of singular vectors are those that the code is read with, in double precision.
    pairs = [core_sides(weight, method.ranks) for weight in frozen.weights]
    sides = [(left.float(), right.float()) for left, right in pairs]
    generator = randomness.generator(problem.seed, "cores")
    cores = [
        (1e-2 * randomness.normal(generator, left.shape[1], left.shape[1])).float()
        for left, _ in sides
    ]
    if not method.ranks:
        return []

    def votes(rounded: Sequence[Tensor]) -> Tensor:
        h = x
        for weight, bias, (left, right), core in zip(weights, biases, sides, rounded, strict=True):
            h = torch.relu(weight @ h + left @ (core @ (right.mT @ h)) + bias[:, None])
        return h

    return _descend(
        cores, lambda core: quantize_core(core, method.bits), votes, y, problem.steps, CORE_RATE
    )


def _fit(problem: Problem, method: Coded, frozen: FNN, labelled: Labelled) -> Adapters:
    """Adapters by Adam on rounded numbers."""
    x, y = labelled[0].to(frozen.dtype), labelled[1]
    ranks = tuple(min(method.ranks, *weight.shape) for weight in frozen.weights)
    data = Fixed(labelled, labelled)
    tunings = [Tuning(ranks, biases=method.biases)]
    start = begin(frozen, tunings, data, classes=range(CLASSES), seed=problem.seed)[0]
    free = Free.of(frozen, start)
    if not free.count:
        return start
    kept = _descend(
        free.start,
        lambda part: _rounded(part, method.bits),
        lambda rounded: free.merge(rounded)(x),
        y,
        problem.steps,
        RATE,
    )
    return free.adapters_of(kept)


def _descend(
    parts: Sequence[Tensor],
    quantized: Callable[[Tensor], Tensor],
    votes: Callable[[Sequence[Tensor]], Tensor],
    y: Tensor,
    steps: int,
    rate: float,
) -> list[Tensor]:
    """Adam on the votes of rounded parts, with gradients as if nothing were rounded.

    Of the parts met, those are returned that, rounded, read the images best.
    """
    parts = [part.requires_grad_() for part in parts]
    optimizer = torch.optim.Adam(parts, lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = float("inf"), parts
    for _ in range(steps):
        out = votes([part + (quantized(part.detach()) - part.detach()) for part in parts])
        wrong = float((out.detach().argmax(0) != y).double().mean())
        if wrong < best:
            best, kept = wrong, [part.detach().clone() for part in parts]
        optimizer.zero_grad()
        cross_entropy(out.mT, y).backward()
        optimizer.step()
        falling.step()
    return kept


def _rounded(part: Tensor, bits: int) -> Tensor:
    """What `encode` makes of a factor, or of a bias as a column."""
    return quantize(part, bits) if part.ndim == 2 else quantize(part[:, None], bits)[:, 0]


@functools.cache
def _freeze(start: str, seed: int) -> FNN:
    drawn: FNN = digits.Problem(depth=DEPTH, start="random", seed=seed).frozen()
    if start == "random":
        return drawn
    # Without images to choose by, those that it is trained on choose.
    apart = Problem(seed=seed).split(angle=0.0).pretraining
    purpose = f"pretraining apart, {CLASSES} classes"
    data = Fixed(apart, apart, samples=digits.BATCH, seed=seed, purpose=(purpose,))
    options = {"steps": digits.PRETRAINING_STEPS, "every": digits.EVERY}
    return train_fully(drawn, data, digits.PRETRAINING, classes=range(CLASSES), **options)
