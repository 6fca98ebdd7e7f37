"""All runs that are trained at once, as named parts, and how networks and data become these.

Weights are padded by zeros to square matrices of one size ``D``, and zeros stay zeros. ``M`` counts
the weights of a network and ``P`` its biases (of a linear network its weights, with biases 0 that
are never tuned). Inputs and labels are padded alike, ``[..., D, tokens, samples]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN
from ..networks.transformer import Transformer
from .tuning import Data, Tuning

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# Standard deviation of B's entries at the start, where A is 0.
FACTOR_SCALE = 0.25
# ``D`` is a multiple of this, since the kernels take so many rows at a time.
UNROLLED = 4
# At most so many numbers of a tile in each layer: several such arrays fit a core's cache.
TILE = 2**14
# Samples in a tile are a multiple of this, the single-precision numbers of a vector register.
LANES = 16


class Structure(NamedTuple):
    """What the runs of a batch have in common."""

    # How many of the first layers of a chain a ReLU follows.
    relus: int
    # Of a transformer; 0, 0 and 1 for a chain of layers.
    blocks: int
    heads: int
    tokens: int
    # How many coordinates of an output count in the squared error.
    outputs: int
    # Number of classes, or 0 for the squared error; the class of each output, or −1, ``[D]``.
    classes: int
    class_of: Integers
    # Samples that go through the network together.
    tile: int
    # Steps of the whole training, over which a falling rate falls.
    steps: int
    # The validation loss is taken after so many steps.
    every: int


class Layers(NamedTuple):
    """A network's weights ``[M, D, D]`` and biases ``[P, D]``, or the gradient in them."""

    W: Array
    b: Array


class Batch(NamedTuple):
    """Inputs and labels of a batch: one tile after the other, each ``[D, tokens, samples]``.

    There may be leading dimensions; ``samples`` counts all samples of one batch.
    """

    x: Array
    y: Array
    samples: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, structure: Structure) -> Batch:
        """Arrange inputs and labels ``[..., D, tokens, samples]`` in tiles."""

        def tiled(values: Float[Tensor, "*lead D tokens samples"]) -> Array:
            parts = [part.flatten(-3) for part in values.split(structure.tile, -1)]
            return torch.cat(parts, -1).numpy()

        return cls(tiled(x), tiled(y), x.shape[-1])


class Frozen(NamedTuple):
    """What training reads: networks, and what its `Tuning` says of each run, ``[runs]``."""

    # The weights of all networks, ``[networks, M, D, D]``.
    weights: Array
    # The number of each run's network, ``[runs]``.
    network: Integers
    # The rank of each weight's adapter, −1 if the weight is tuned in full, ``[runs, M]``.
    ranks: Integers
    # Which biases are tuned, ``[runs, P]``.
    biases: Booleans
    # What is subtracted from the inputs of weights, 0 but in centred runs, ``[runs, P, D]``.
    centre: Array
    learning_rate: Array
    # Whether the rate falls as half a cosine.
    falling: Booleans
    weight_decay: Array
    # The rate of A over the rate of all else.
    ratio: Array
    one_sided: Booleans


class Parameters(NamedTuple):
    """The numbers that training moves, or what Adam keeps of each of them.

    ``A`` and ``B`` are ``[runs, M, D, D]``: row ``r`` is one direction, ``ΔW = Σ_r A[r] B[r]ᵀ``,
    and where a weight is tuned in full, ``A`` holds the weight itself. ``b`` is ``[runs, P, D]``.
    Adam's first and second moments are stacked after the second dimension.
    """

    A: Array
    B: Array
    b: Array


class Course(NamedTuple):
    """What is recorded of each run."""

    # The share of the first validation loss at which a run stops, and after step 0 that loss.
    goal: Array
    best_loss: Array
    best_step: Integers
    # Whether a run has ended: at its goal, or at a loss that is not finite.
    stopped: Booleans
    # Losses at the recorded steps, ``[runs, points]``.
    training: Array
    validation: Array


class State(NamedTuple):
    """All runs, stacked along the first dimension."""

    structure: Structure
    frozen: Frozen
    parameters: Parameters
    moments: Parameters
    # The parameters at the least validation loss.
    best: Parameters
    course: Course


class Stack:
    """A batch of frozen networks, and their data, as the kernels read them."""

    def __init__(
        self, frozen: Network, data: Data, classes: Sequence[int], one_sided: bool
    ) -> None:
        if not frozen.batch_shape.numel():
            given = f"batch shape {tuple(frozen.batch_shape)}"
            raise InputError("frozen", allowed="at least one network", given=given)
        # The network's own checks refuse numbers too large for single precision.
        self.network: Any = frozen.to(torch.float32)
        self.shapes = [tuple(weight.shape[-2:]) for weight in frozen.weights]
        self.biases = self.network.biases
        self.width = -(-max(map(max, self.shapes)) // UNROLLED) * UNROLLED
        self.members = frozen.batch_shape.numel()
        # Coordinates of an input and of an output, or of each of their tokens.
        self.inputs, self.outputs = self.shapes[0][1], self.shapes[-1][0]
        self.data, self.one_sided = data, one_sided
        self.votes = self._class_of(classes)
        self.classes = int(self.votes.max(initial=-1)) + 1
        self.validation = self._arrange(*data.validation)
        self.first = self._arrange(*data.block(0), Data.BLOCK)
        self.tokens, others = (part[0].shape[-2] for part in (self.first, self.validation))
        if others != self.tokens:
            allowed = "of equally many tokens for training and validation"
            raise InputError("data", allowed=allowed, given=f"{self.tokens} and {others}")

    @property
    def has_kernel(self) -> bool:
        """Whether these are chains of layers, or transformers of the kind that kernels know."""
        network = self.network
        if not isinstance(network, Transformer):
            return not network.sequences
        settings = network.settings
        return settings.is_plain and settings.activation == "relu" and not settings.causal

    def _structure(self, steps: int, every: int) -> Structure:
        has_attention = isinstance(self.network, Transformer)
        return Structure(
            relus=self.network.relus,
            blocks=self.network.depth if has_attention else 0,
            heads=self.network.heads if has_attention else 0,
            tokens=self.tokens,
            outputs=self.outputs,
            classes=self.classes,
            class_of=np.pad(self.votes, (0, self.width - len(self.votes)), constant_values=-1),
            tile=max(TILE // (self.width * self.tokens) // LANES, 1) * LANES,
            steps=steps,
            every=every,
        )

    def state(
        self, tunings: Sequence[Tuning], seeds: Sequence[int], steps: int, every: int, until: float
    ) -> State:
        """Make all runs, tuning by tuning, at the start ``"study"``."""

        def per_run(value: Callable[[Tuning], Any], dtype: Any = np.float32) -> Any:
            return np.array([*map(value, tunings)], dtype).repeat(self.members, 0)

        weights = self._pad(self.network.weights, 2)
        none = [torch.zeros(self.members, 1)] * len(self.shapes)
        network = np.tile(np.arange(self.members), len(tunings))
        ranks = per_run(self.ranks, np.int64)
        A = np.where((ranks < 0)[..., None, None], weights[network], np.float32(0))
        adapted = np.flatnonzero((ranks > 0).any(0))
        B = np.stack([self._first_factors(seed, adapted) for seed in seeds])[network]
        B *= np.arange(self.width)[:, None] < ranks[..., None, None]
        parameters = Parameters(A, B, self._pad(self.biases or none, 1)[network])
        losses = np.full((2, len(ranks), steps // every + 1), np.nan, np.float32)
        return State(
            self._structure(steps, every),
            Frozen(
                weights,
                network,
                ranks,
                biases=per_run(self._tuned_biases, bool),
                centre=np.zeros_like(parameters.b),
                learning_rate=per_run(lambda tuning: tuning.learning_rate),
                falling=per_run(lambda tuning: tuning.schedule == "cosine", bool),
                weight_decay=per_run(lambda tuning: tuning.weight_decay),
                ratio=per_run(lambda tuning: tuning.ratio),
                one_sided=per_run(lambda tuning: tuning.loss == "one-sided", bool),
            ),
            parameters,
            Parameters(*(np.stack([np.zeros_like(each)] * 2, 2) for each in parameters)),
            Parameters(*(each.copy() for each in parameters)),
            Course(
                goal=np.full(len(ranks), until, np.float32),
                best_loss=np.full(len(ranks), np.inf, np.float32),
                best_step=np.zeros(len(ranks), np.int64),
                stopped=np.zeros(len(ranks), bool),
                training=losses[0],
                validation=losses[1],
            ),
        )

    def ranks(self, tuning: Tuning) -> list[int]:
        """Return the rank of each weight's adapter; −1 where the weight is tuned in full."""
        network, count = self.network, len(self.shapes)
        if tuning.final:
            last = _checks.integer("final", tuning.final, 0, count, limit="the number of weights")
            return [0] * (count - last) + [-1] * last
        ranks = _checks.ranks_per_layer(tuning.ranks, self.shapes)
        if network.sequences and isinstance(tuning.ranks, int):
            pairs = zip(ranks, network.adapted, strict=True)
            return [rank if adapted else 0 for rank, adapted in pairs]
        return list(ranks)

    def _tuned_biases(self, tuning: Tuning) -> Sequence[bool]:
        count, given = len(self.biases), tuning.biases
        if isinstance(given, tuple) and len(given) != count:
            allowed = f"True, False, or one of them for each of {count}"
            raise InputError("biases", allowed=allowed, given=f"{len(given)} of them")
        if not count:
            return [False] * len(self.shapes)
        if isinstance(given, tuple):
            return given
        if not tuning.final or tuning.final == len(self.shapes):
            return [given] * count
        # In a transformer the last weight is W_out, which has no bias beside it.
        first = count if self.network.sequences else count - tuning.final
        return [given and l >= first for l in range(count)]

    def _first_factors(self, seed: int, adapted: Any) -> Array:
        """Draw ``Bᵀ`` of every adapted weight, a row for each direction, at the largest rank."""
        factors = np.zeros((len(self.shapes), self.width, self.width), np.float32)
        for m in adapted.tolist():
            outer, inner = self.shapes[m]
            rank = min(outer, inner)
            generator = randomness.generator(seed, "factors", m)
            drawn = randomness.normal(generator, rank, inner, dtype=torch.float32)
            factors[m, :rank, :inner] = FACTOR_SCALE * drawn
        return factors

    def _pad(self, values: Sequence[Tensor], dims: int) -> Array:
        """Stack values to ``[members, values, …]``, their last ``dims`` dimensions padded."""
        padded = np.zeros((self.members, len(values), *[self.width] * dims), np.float32)
        for i, value in enumerate(values):
            sizes = value.shape[-dims:]
            padded[:, i][(slice(None), *map(slice, sizes))] = value.reshape(-1, *sizes).cpu()
        return padded

    def blocks(self, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield first step, inputs and labels of each block, made while the last one is in use."""
        with ThreadPoolExecutor(1, initializer=_checks.flush) as ahead:
            coming = ahead.submit(self._block, 0)
            for index, start in enumerate(range(0, steps, Data.BLOCK)):
                x, y = coming.result()
                if start + Data.BLOCK < steps:
                    coming = ahead.submit(self._block, index + 1)
                yield start, x[: steps - start], y[: steps - start]

    # Threads do not inherit this.
    @torch.no_grad()
    def _block(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 0:
            return self.first
        x, y = self._arrange(*self.data.block(index), Data.BLOCK)
        if x.shape != self.first[0].shape:
            raise InputError("data", allowed="alike in every block", given=f"block {index} unlike")
        return x, y

    def _arrange(self, x: Any, y: Any, *lead: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels, checked and padded; ``lead`` is how many batches they are."""
        x = _checks.real_tensor("data's inputs", x, min_dims=1)
        D, sequences = self.inputs, self.network.sequences
        form = [*lead, "samples", D, "tokens"] if sequences else [*lead, D, "samples"]
        if x.ndim != len(form) or x.shape[: len(lead)] != lead or x.shape[-2] != D:
            allowed = f"of shape [{', '.join(map(str, form))}]"
            raise InputError("data's inputs", allowed=allowed, given=tuple(x.shape))
        if self.classes:
            samples = x.shape[len(lead)] if sequences else x.shape[-1]
            return self._features(x), self._one_hot(y, (*lead, samples))
        if isinstance(y, Tensor) and not y.is_floating_point():
            allowed = "float32 or float64 where no classes are given"
            remedy = f"say for which class each output votes, classes=range({self.outputs})"
            raise InputError("data's labels", allowed=allowed, given=y.dtype, remedy=remedy)
        y = _checks.real_tensor("data's labels", y, min_dims=1)
        _require_shape(y, (*x.shape[:-2], self.outputs, x.shape[-1]))
        if self.one_sided and y.min() < 0:
            allowed = "at least 0 for the one-sided loss, as outputs of a ReLU are"
            raise InputError("data's labels", allowed=allowed, given=float(y.min()))
        return self._features(x), self._features(y)

    def _features(self, values: Tensor) -> Float[Tensor, "*lead D tokens samples"]:
        values = values.movedim(-3, -1) if self.network.sequences else values.unsqueeze(-2)
        padding = self.width - values.shape[-3]
        return torch.nn.functional.pad(values, (0, 0, 0, 0, 0, padding)).to("cpu", torch.float32)

    def _one_hot(self, y: Any, shape: tuple[int, ...]) -> Float[Tensor, "*lead classes 1 samples"]:
        y = torch.as_tensor(y, device="cpu")
        _require_shape(y, shape)
        if y.is_floating_point() or y.min() < 0 or y.max() >= self.classes:
            allowed = f"classes, integers from 0 to {self.classes - 1}"
            given = f"{y.dtype} from {y.min()} to {y.max()}"
            raise InputError("data's labels", allowed=allowed, given=given)
        hot = torch.nn.functional.one_hot(y.long(), self.classes)
        return hot.movedim(-1, -2).unsqueeze(-2).to(torch.float32)

    def _class_of(self, classes: Sequence[int]) -> Integers:
        """Return the class to which each output votes, checked; empty for the squared error."""
        if len(classes) not in (0, self.outputs):
            allowed = f"none, or one for each of {self.outputs} outputs"
            raise InputError("classes", allowed=allowed, given=f"{len(classes)} of them")
        votes = np.array([_checks.integer("classes", c, 0) for c in classes], np.int64)
        if len(set(votes.tolist())) <= votes.max(initial=-1):
            allowed = "such that each class from 0 to the last has a vote"
            raise InputError("classes", allowed=allowed, given=list(classes))
        return votes


def _require_shape(y: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(y.shape) != shape:
        allowed = f"of shape {shape}, to fit inputs"
        raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))


def require_relu_end(network: Network, classes: Sequence[int] = ()) -> None:
    """Refuse a one-sided loss for outputs that no ReLU gives, or that vote for classes."""
    if not isinstance(network, FNN) or network.linear_last or len(classes):
        given = "classes" if len(classes) else network
        raise InputError(
            "loss",
            allowed="'squared', but for ReLU networks that end with a ReLU and a squared error",
            given=f"'one-sided' for {given}",
        )
