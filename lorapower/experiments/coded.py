"""Adapt to digits in few bits, and bound the share of errors on new images by their number.

The frozen network is random, or pretrained on other images, so the code for adapters is fixed
before the images of the task are seen. A prior may use some of these; only the others then count.

The code of factors and biases has the number of bits, the ranks, and whether there are biases, in
Elias's gamma code; then, for each column of a factor and each bias, a scale of 16 bits and the
numbers of its entries. The code of cores has the number of bits and the largest rank plus 1 in
gamma code; then, for each core, a scale of five bits and its entries. All lengths follow from what
was read before, so that a word ends where no other goes on: this is what [thm-occam] asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import lowrank, randomness
from .._records import Record, Results
from ..adapters import Adapters
from ..bounds import samples
from ..lowrank import LowRank
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
SCALE_BITS, CORE_SCALE_BITS = 16, 5
# A column's scale is one of these parts of its largest entry; a core's is one of these.
CLIPS = torch.linspace(0.0, 1.0, 41, dtype=torch.float64).float()
CORE_SCALES = torch.tensor(
    [2.0 ** (number / 4 - 5) for number in range(2**CORE_SCALE_BITS)], dtype=torch.float64
)


class Problem(Record):
    """Make a frozen network of two layers, and the digits to adapt it with.

    The network is ``"random"``, or ``"pretrained"`` on 400 upright images that serve for nothing
    else. Images of the task are turned by ``angle`` degrees.
    """

    start: digits.Start = "pretrained"
    angle: float = Field(90.0, ge=-360, le=360)
    steps: int = Field(600, ge=1)
    seed: int = Field(0, ge=0)

    def split(self) -> dict[str, Labelled]:
        """Split the turned images: those of the task, those to pretrain on, those to test on."""
        pictures, classes = digits.images(self.angle)
        generator = randomness.generator(self.seed, "split for codes")
        parts = torch.randperm(len(classes), generator=generator).split([*SIZES.values()])
        return {
            name: (pictures[part].flatten(1).mT, classes[part])
            for name, part in zip(SIZES, parts, strict=True)
        }

    def frozen(self) -> FNN:
        """Make the frozen network, in double precision."""
        return _freeze(self.start, self.seed)


class Coded(Record):
    """Code adapters of one rank, and changes of biases, in ``bits`` per number."""

    kind: Literal["coded"] = "coded"
    ranks: int = Field(1, ge=0, le=digits.PIXELS)
    bits: int = Field(2, ge=1, le=12)


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

    ``kl`` bounds the error on new images with probability 0.95 (`bounds.samples.kl_bound`).
    """

    length: int
    training_error: float
    test_error: float
    kl: float


def measure(settings: Sequence[Setting]) -> list[Found]:
    """Measure what each setting reaches; raise `InputError` if they have several problems."""
    problem: Problem = one_problem(settings)
    split = problem.split()
    found = []
    for method in (setting.method for setting in settings):
        network, (x, y) = problem.frozen(), split["training"]
        if isinstance(method, Coded):
            adapters = _fit(problem, method, network, (x, y))
            network, length = adapters.merge(network), _code_length(adapters, method.bits)
        else:
            if known := method.prior:
                network = _train(network, (x[:, :known], y[:known]), problem.seed, "prior", 300, 1)
                x, y = x[:, known:], y[known:]
            network, cores = _fit_cores(problem, method, network, (x, y))
            length = _cores_length(cores, method.bits)
        error, test_error = (
            1 - digits.accuracy(network, (x.double(), y)) for x, y in ((x, y), split["test"])
        )
        bound = samples.kl_bound(error, length, len(y), DELTA)
        found.append(Found(length=length, training_error=error, test_error=test_error, kl=bound))
    return found


@functools.cache
def _freeze(start: str, seed: int) -> FNN:
    drawn: FNN = digits.Problem(depth=DEPTH, start="random", seed=seed).frozen()
    if start == "random":
        return drawn
    images = Problem(angle=0.0, seed=seed).split()["pretraining"]
    purpose = "pretraining apart, 10 classes"
    return _train(drawn, images, seed, purpose, digits.PRETRAINING_STEPS, digits.EVERY)


def _train(network: FNN, images: Labelled, seed: int, purpose: str, steps: int, every: int) -> FNN:
    """Train all weights; without images to choose by, those that it is trained on choose."""
    data = Fixed(images, images, samples=digits.BATCH, seed=seed, purpose=(purpose,))
    options = {"steps": steps, "every": every, "classes": range(CLASSES)}
    trained: FNN = train_fully(network, data, digits.PRETRAINING, **options)
    return trained


def _fit(problem: Problem, method: Coded, frozen: FNN, images: Labelled) -> Adapters:
    """Rounded adapters, trained by Adam through the rounding."""
    x, y = images[0].to(frozen.dtype), images[1]
    ranks = tuple(min(method.ranks, *weight.shape) for weight in frozen.weights)
    given = frozen, [Tuning(ranks)], Fixed(images, images)
    free = Free.of(frozen, begin(*given, classes=range(CLASSES), seed=problem.seed)[0])

    def rounding(part: Tensor) -> Tensor:
        columns = part if part.ndim == 2 else part[:, None]
        return _quantize(columns, method.bits).reshape(part.shape)

    def votes(rounded: Sequence[Tensor]) -> Tensor:
        return free.merge(rounded)(x)

    kept = _descend(free.start, rounding, votes, y, problem.steps, RATE)
    return free.adapters_of([rounding(part) for part in kept])


def _fit_cores(
    problem: Problem, method: Cores, frozen: FNN, images: Labelled
) -> tuple[FNN, list[Tensor]]:
    """Rounded cores, trained by Adam through the rounding, and the network that has them."""
    if not method.ranks:
        return frozen, []
    x, y = images[0].float(), images[1]
    network = frozen.to(torch.float32)
    # The leading singular vectors of a weight, left and right, that a core stands between.
    parts = [lowrank.svd(weight) for weight in frozen.weights]
    pairs = [(U[:, : method.ranks], V[:, : method.ranks]) for U, _, V in parts]
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
        return _quantize_core(core, method.bits).to(core)

    kept = _descend(cores, rounding, votes, y, problem.steps, CORE_RATE)
    cores = [_quantize_core(core, method.bits) for core in kept]
    each = zip(pairs, cores, strict=True)
    updates = tuple(LowRank(left @ core, right) for (left, right), core in each)
    return Adapters(updates).merge(frozen), cores


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


def _quantize(part: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """Round each column to ``2^bits`` levels of the scale of least squared error.

    Level ``k`` is the column's scale, in half precision, times ``(2k − m)/m``, ``m = 2^bits − 1``.
    """
    if not part.numel():
        return part
    scales = (CLIPS.to(part)[:, None, None] * part.abs().amax(0)).half().to(part)
    values = scales * _levels(part / torch.where(scales > 0, scales, 1), bits) / (2**bits - 1)
    best = (values - part).square().sum(1, keepdim=True).argmin(0, keepdim=True)
    return values.gather(0, best.expand(1, *part.shape))[0]


def _quantize_core(core: Float[Tensor, "R R"], bits: int) -> Float[Tensor, "R R"]:
    """Round a square matrix to ``2^bits`` levels of one scale, in double precision."""
    scales = CORE_SCALES.to(core)[:, None, None]
    levels = _levels(core / scales, bits)
    values = scales * levels / (2**bits - 1)
    best = int((values - core).square().sum((-2, -1)).argmin())
    return CORE_SCALES[best] * levels[best].double() / (2**bits - 1)


def _levels(ratio: Tensor, bits: int) -> Tensor:
    """The nearest of ``2^bits`` levels ``m·ratio``, from −m to m."""
    steps = 2**bits - 1
    return 2 * ((ratio + 1) / 2 * steps).round().clamp(0, steps) - steps


def _code_length(adapters: Adapters, bits: int) -> int:
    """Count the bits of the code of adapters."""
    header = [bits, *(rank + 1 for rank in adapters.ranks), 1 + bool(adapters.bias_updates)]
    parts = [factor for u in adapters.updates for factor in (u.left, u.right)]
    columns = 2 * sum(adapters.ranks) + len(adapters.bias_updates)
    numbers = sum(part.numel() for part in [*parts, *adapters.bias_updates])
    return sum(map(_gamma, header)) + SCALE_BITS * columns + bits * numbers


def _cores_length(cores: Sequence[Tensor], bits: int) -> int:
    """Count the bits of the code of cores; no core, of rank 0, is ``[]``."""
    header = _gamma(bits) + _gamma(1 + max((len(core) for core in cores), default=0))
    return header + sum(CORE_SCALE_BITS + bits * core.numel() for core in cores)


def _gamma(number: int) -> int:
    """Bits of a number from 1 in Elias's gamma code."""
    return 2 * number.bit_length() - 1
