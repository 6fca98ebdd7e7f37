"""Gradient training of many adapters at once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks import FNN, LinearNetwork, Transformer
from . import compiled, reference
from .compiled import State, Structure
from .data import Data, Labelled, generator

N = TypeVar("N", LinearNetwork, FNN, Transformer)

# Numbers that a tile of a batch has in each layer, at most: several such arrays fit a core's cache.
TILE = 2**13
# Samples in a tile are a multiple of this: numbers of single precision in a vector register.
LANES = 16
# Standard deviation of B's entries at the start, where A is 0.
FACTOR_SCALE = 0.25


@dataclass(frozen=True)
class Tuning:
    """What one run tunes, and how fast.

    Attributes
    ----------
    ranks : of the adapters: one for all weights, or one for each in the order of the network's
        ``weights``. One number gives a transformer the adapters of the theorem on its exact
        adaptation: on its attention, ``W_2`` of the last block, and ``W_out``.
    final : tune, instead of adapters, the last so many ``weights`` in full, biases beside them.
    biases : whether biases are tuned: all of them beside adapters.
    learning_rate, weight_decay : of Adam; the decay is its L2 penalty.
    """

    ranks: int | tuple[int, ...] = 0
    final: int = 0
    biases: bool = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _checks.positive("learning_rate", self.learning_rate)
        if math.isinf(_checks.tolerance("weight_decay", self.weight_decay)):
            raise InputError("weight_decay", allowed="finite", given=self.weight_decay)
        _checks.integer("final", self.final, 0)
        if self.final and self.ranks:
            raise InputError(
                "final",
                allowed="0 where adapters have a rank",
                given=f"{self.final} with ranks {self.ranks}",
            )


@dataclass(frozen=True, eq=False)
class Training(Generic[N]):
    """Trained networks: one for each `Tuning` (first dimension) and each frozen network.

    Attributes
    ----------
    network : at each run's least validation loss, batch shape ``[tunings, *batch]``.
    adapters : its updates, padded with zeros to the largest rank, and its bias updates; the updates
        of weights that were tuned in full are 0.
    steps : those at which the losses below were taken; 0 is before the first step.
    training_loss : of the batch of each of these steps; NaN at step 0.
    validation_loss : after each of these steps; NaN after a run has ended.
    best_loss, best_step : the least validation loss and when it was reached.
    diverged : whether a loss was no finite number, at which a run ends.
    """

    network: N
    adapters: Adapters
    steps: Int[Tensor, " points"]
    training_loss: Float[Tensor, "tunings *batch points"]
    validation_loss: Float[Tensor, "tunings *batch points"]
    best_loss: Float[Tensor, " tunings *batch"]
    best_step: Int[Tensor, " tunings *batch"]
    diverged: Bool[Tensor, " tunings *batch"]


def train(
    frozen: N,
    tunings: Sequence[Tuning],
    data: Data | Sequence[Data],
    *,
    steps: int = 5000,
    every: int = 1,
    classes: Sequence[int] = (),
    until: float = 0.0,
    seed: int | Sequence[int] = 0,
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> Training[N]:
    """Tune adapters, final layers or everything of frozen networks by Adam, all runs at once.

    Each of ``tunings`` is run on each frozen network. Runs of one network see the same inputs and
    start from the same factors, ``A = 0`` and ``B ~ N(0, 0.25²)``, of which a run of rank ``R`` has
    the first ``R`` columns. What a run gives does not depend on what it is run with. In single
    precision, whatever the type of the network.

    Parameters
    ----------
    frozen : network, or a batch of them.
    data : for each member of the batch, in order; or one for all.
    steps, every : number of steps, and after how many of them the validation loss is taken.
    classes : for classification, the class from 0 to which each output votes, or −1 for none; the
        votes of all outputs and tokens are summed and their softmax is compared with the label by
        cross-entropy. None: mean squared error over outputs, tokens and samples.
    until : a run ends when its validation loss is at most this part of that before the first step.
    seed : of the factors; one for each member of the batch, or one for all.
    threads : of processors, all by default.
    device : where it runs. By default a GPU if torch finds one, else processors with compiled code;
        naming ``"cpu"`` computes the same with torch, slowly.

    Raises
    ------
    InputError : ranks or layers out of range, data that does not fit the network or the loss.

    Source: the protocol of the study's experiments, chapter 5.
    """
    steps = _checks.integer("steps", steps, 1)
    every = _checks.integer("every", every, 1, steps, limit="the steps")
    members = frozen.batch_shape.numel()
    sources = [data] * members if isinstance(data, Data) else list(data)
    seeds = [seed] * members if isinstance(seed, int) else list(seed)
    for name, given in (("data", sources), ("seed", seeds)):
        if len(given) != members:
            raise InputError(
                name, allowed=f"one, or one for each of {members} networks", given=len(given)
            )
    tunings = list(tunings)
    if not tunings:
        raise InputError("tunings", allowed="at least one", given="none")
    stack = _Stack(frozen)
    structure = stack.structure(classes)
    until = _checks.tolerance("until", until)
    state = stack.state(tunings, seeds, steps // every + 1, until)
    batches = _Batches(sources, stack, structure)
    if device is None and not torch.cuda.is_available():
        _run_compiled(stack, structure, state, batches, steps, every, threads)
    else:
        _run_torch(structure, state, batches, steps, every, device or "cuda")
    return stack.training(state, len(tunings), every)


class _Stack(Generic[N]):
    """A network as stacked square matrices, padded by zeros, which stay zeros."""

    def __init__(self, network: N) -> None:
        self.network = network
        self.shapes = [tuple(w.shape[-2:]) for w in network.weights]
        largest = max(max(shape) for shape in self.shapes)
        self.width = -(-largest // 4) * 4
        self.members = network.batch_shape.numel()
        flat = [w.reshape(-1, *w.shape[-2:]) for w in network.weights]
        self.weights = np.stack([self._square(w) for w in flat], axis=1)
        # A linear network has biases too: zeros, which stay.
        self.old = () if isinstance(network, LinearNetwork) else network.biases
        count = len(self.old) or network.depth
        self.biases = np.zeros((self.members, count, self.width), np.float32)
        for l, b in enumerate(self.old):
            self.biases[:, l, : b.shape[-1]] = b.reshape(self.members, -1)

    def _square(self, w: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        square = np.zeros((len(w), self.width, self.width), np.float32)
        square[:, : w.shape[-2], : w.shape[-1]] = w
        return square

    @property
    def outputs(self) -> int:
        return self.shapes[-1][0]

    @property
    def inputs(self) -> int:
        first = self.network.W_Q if isinstance(self.network, Transformer) else None
        return self.shapes[0][1] if first is None else first.shape[-1]

    def structure(self, classes: Sequence[int]) -> Structure:
        """What all runs have in common; tokens and tile are set when the data is known."""
        class_of = np.full(self.width, -1)
        if len(classes):
            if len(classes) != self.outputs:
                raise InputError(
                    "classes", allowed=f"one for each of {self.outputs} outputs", given=classes
                )
            for i, c in enumerate(classes):
                class_of[i] = _checks.integer("classes", c, -1)
        network = self.network
        blocks, heads = (
            (network.depth, network.heads) if isinstance(network, Transformer) else (0, 0)
        )
        return Structure(
            relu=isinstance(network, FNN),
            blocks=blocks,
            heads=heads,
            tokens=1,
            outputs=self.outputs,
            classes=int(class_of.max()) + 1,
            class_of=class_of,
            tile=LANES,
        )

    def ranks(self, tuning: Tuning) -> list[int]:
        """Of each weight's adapter; −1 where the weight is tuned in full."""
        network, count = self.network, len(self.shapes)
        if tuning.final:
            last = _checks.integer("final", tuning.final, 0, count, limit="the number of weights")
            return [0] * (count - last) + [-1] * last
        if isinstance(network, Transformer) and isinstance(tuning.ranks, int):
            largest = network.width
            rank = _checks.integer("rank", tuning.ranks, 0, largest, limit="the width")
            return [
                min(rank, *shape) if of_theorem else 0
                for shape, of_theorem in zip(self.shapes, network.adapted, strict=True)
            ]
        return list(_checks.ranks_per_layer(tuning.ranks, self.shapes))

    def tuned_biases(self, tuning: Tuning) -> list[bool]:
        count = len(self.old)
        if not tuning.final or tuning.final == len(self.shapes):
            return [tuning.biases] * count
        if isinstance(self.network, Transformer):
            # The last weight is W_out, which has no bias beside it.
            return [False] * count
        return [tuning.biases and l >= count - tuning.final for l in range(count)]

    def state(
        self, tunings: Sequence[Tuning], seeds: Sequence[int], points: int, until: float
    ) -> State[Any]:
        ranks = np.repeat(np.array([self.ranks(t) for t in tunings]), self.members, 0)
        tuned = np.zeros((len(ranks), self.biases.shape[1]), bool)
        tuned[:, : len(self.old)] = np.repeat(
            np.array([self.tuned_biases(t) for t in tunings], bool), self.members, 0
        )
        runs, M, D = len(ranks), len(self.shapes), self.width
        problem = np.tile(np.arange(self.members), len(tunings))
        A = np.zeros((runs, M, D, D), np.float32)
        B = np.stack([self._first_factors(seed) for seed in seeds])[problem]
        B *= np.arange(D)[:, None] < ranks[..., None, None]
        full = ranks < 0
        A[full] = self.weights[problem][full]
        b = self.biases[problem]

        def per_run(name: str) -> Any:
            values = np.array([getattr(t, name) for t in tunings], np.float32)
            return np.repeat(values, self.members)

        return State(
            problem=problem,
            frozen=self.weights,
            ranks=ranks,
            tuned=tuned,
            rate=per_run("learning_rate"),
            decay=per_run("weight_decay"),
            A=A,
            B=B,
            b=b,
            A_moments=np.zeros((runs, M, 2, D, D), np.float32),
            B_moments=np.zeros((runs, M, 2, D, D), np.float32),
            b_moments=np.zeros((*b.shape[:2], 2, 1, D), np.float32),
            A_best=A.copy(),
            B_best=B.copy(),
            b_best=b.copy(),
            goal=np.full(runs, until, np.float32),
            best=np.full(runs, np.inf, np.float32),
            best_step=np.zeros(runs, np.int64),
            stopped=np.zeros(runs, bool),
            training=np.full((runs, points), np.nan, np.float32),
            validation=np.full((runs, points), np.nan, np.float32),
        )

    def _first_factors(self, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """``Bᵀ`` of every weight, a row for each direction, at the largest rank."""
        factors = np.zeros((len(self.shapes), self.width, self.width), np.float32)
        for m, (outer, inner) in enumerate(self.shapes):
            rank = min(outer, inner)
            drawn = torch.randn(
                rank, inner, generator=generator(_checks.integer("seed", seed, 0), m)
            )
            factors[m, :rank, :inner] = FACTOR_SCALE * drawn
        return factors

    def training(self, state: State[Any], tunings: int, every: int) -> Training[N]:
        batch = (tunings, *self.network.batch_shape)

        def shaped(values: Any) -> Tensor:
            values = torch.as_tensor(values)
            return values.reshape(*batch, *values.shape[1:])

        largest = max(int(state.ranks.max()), 0)
        A, B, b = (shaped(v) for v in (state.A_best, state.B_best, state.b_best))
        full = shaped(state.ranks < 0)
        updates, weights = [], []
        for m, (outer, inner) in enumerate(self.shapes):
            rows = slice(0, min(largest, outer, inner))
            counts = ~full[..., m, None, None]
            # Rows past a run's rank hold zeros in A.
            update = LowRank(
                (A[..., m, rows, :outer] * counts).mT, (B[..., m, rows, :inner] * counts).mT
            )
            own = self.network.weights[m].to(torch.float32)
            weights.append(torch.where(counts, own + update.matrix(), A[..., m, :outer, :inner]))
            updates.append(update)
        biases = [b[..., l, : old.shape[-1]] for l, old in enumerate(self.old)]
        changes = tuple(
            new - old.to(torch.float32) for new, old in zip(biases, self.old, strict=True)
        )
        if isinstance(self.network, LinearNetwork):
            network: Any = LinearNetwork(weights)
        else:
            network = self.network.to(torch.float32).with_parameters(weights, biases)
        best = shaped(state.best)
        return Training(
            network,
            Adapters(tuple(updates), changes),
            steps=torch.arange(state.training.shape[1]) * every,
            training_loss=shaped(state.training),
            validation_loss=shaped(state.validation),
            best_loss=best,
            best_step=shaped(state.best_step),
            diverged=shaped(state.stopped) & ~(best <= shaped(state.goal)),
        )


class _Batches:
    """Labelled inputs in the form that the runs take them: ``[D, tokens, samples]``, padded."""

    def __init__(self, sources: Sequence[Data], stack: _Stack[Any], structure: Structure) -> None:
        self.sources, self.stack, self.structure = sources, stack, structure
        pairs = [self._pair(source.validation) for source in sources]
        self.validation = tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))
        self.structure = structure._replace(tokens=pairs[0][0].shape[-2])

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """``[problems, steps, D, tokens, samples]`` and what is wanted there."""
        found = {}
        for source in self.sources:
            if id(source) not in found:
                found[id(source)] = self._pair(source.block(index))
        pairs = [found[id(source)] for source in self.sources]
        x, y = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return x, y

    def _pair(self, labelled: Labelled) -> tuple[Tensor, Tensor]:
        x, y = labelled
        if self.structure.classes:
            return self._padded(x, self.stack.inputs, "inputs"), self._one_hot(y)
        return (
            self._padded(x, self.stack.inputs, "inputs"),
            self._padded(y, self.stack.outputs, "labels"),
        )

    def _padded(self, values: Tensor, size: int, name: str) -> Tensor:
        sequences = bool(self.structure.blocks)
        values = values.movedim(-3, -1) if sequences else values.unsqueeze(-2)
        if values.shape[-3] != size:
            raise InputError(
                f"data's {name}", allowed=f"of {size} coordinates", given=values.shape[-3]
            )
        padded = torch.zeros(*values.shape[:-3], self.stack.width, *values.shape[-2:])
        padded[..., :size, :, :] = values
        return padded

    def _one_hot(self, y: Tensor) -> Tensor:
        if y.dtype != torch.int64 or not bool(((y >= 0) & (y < self.structure.classes)).all()):
            raise InputError(
                "data's labels",
                allowed=f"classes, integers from 0 to {self.structure.classes - 1}",
                given=f"{y.dtype} from {y.min()} to {y.max()}",
            )
        hot = torch.nn.functional.one_hot(y, self.structure.classes).to(torch.float32)
        return hot.movedim(-1, -2).unsqueeze(-2)


def _blocks(steps: int) -> Iterator[tuple[int, int, int]]:
    for index, start in enumerate(range(0, steps, Data.BLOCK)):
        yield index, start, min(Data.BLOCK, steps - start)


def _run_compiled(
    stack: _Stack[Any],
    structure: Structure,
    state: State[Any],
    batches: _Batches,
    steps: int,
    every: int,
    threads: int | None,
) -> None:
    structure = batches.structure
    model = compiled.transformer if structure.blocks else compiled.chain
    workers = len(os.sched_getaffinity(0)) if threads is None else threads
    workers = _checks.integer("threads", workers, 1)
    tile = max(TILE // (stack.width * structure.tokens) // LANES, 1) * LANES
    structure = structure._replace(tile=tile)
    runs = np.arange(len(state.problem))
    # More parts than threads: runs differ in cost.
    parts = [part for part in np.array_split(runs, 4 * workers) if len(part)]
    scratch = _scratch(structure, stack.width, len(stack.shapes))

    def tiles(values: Tensor) -> Any:
        flat = [part.flatten(-3) for part in values.split(tile, -1)]
        return torch.cat(flat, -1).contiguous().numpy()

    validation = [tiles(part) for part in batches.validation]
    validation_samples = batches.validation[0].shape[-1]

    def advance(x: Any, y: Any, samples: int, start: int, part: Any) -> None:
        compiled.advance(
            model, structure, state, part, x, y, samples,
            validation[0], validation[1], validation_samples,
            start, every, np.empty(scratch, np.float32),
        )  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        for index, start, count in _blocks(steps):
            x, y = batches.block(index)
            packed = [tiles(part[:, :count]) for part in (x, y)]
            work = partial(advance, packed[0], packed[1], x.shape[-1], start)
            list(pool.map(work, parts))


def _scratch(structure: Structure, width: int, weights: int) -> int:
    """Numbers that a model keeps while a tile goes through it."""
    layer = width * structure.tokens * structure.tile
    if not structure.blocks:
        return (weights + 2) * layer
    pairs = structure.blocks * structure.heads
    square = structure.tokens**2 * structure.tile
    return (3 * structure.blocks + 2 * pairs + 4) * layer + (pairs + 1) * square


def _run_torch(
    structure: Structure,
    state: State[Any],
    batches: _Batches,
    steps: int,
    every: int,
    device: str | torch.device,
) -> None:
    there: State[Tensor] = State(*(torch.from_numpy(part).to(device) for part in state))
    validation = [part.to(device) for part in batches.validation]
    for index, start, count in _blocks(steps):
        x, y = (part[:, :count].to(device) for part in batches.block(index))
        reference.advance(batches.structure, there, x, y, *validation, start, every)
    for part, result in zip(state, there, strict=True):
        part[...] = result.cpu().numpy()
