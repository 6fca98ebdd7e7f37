"""Networks and data as the training steps take them: stacked, padded, in single precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, Generic

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks, randomness
from ..adapters.core import Adapters, N, Tuned
from ..constructions import fnn
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.layers import FNN
from ..networks.partition import Partition
from ..networks.transformer import Transformer
from ..regions import Ball
from . import _reference
from ._compiled import UNROLLED, Array, State, Structure, tile
from .tuning import MARGIN, Data, Labelled, Training, Tuning

# Standard deviation of B's entries at the start, where A is 0.
FACTOR_SCALE = 0.25
# A spectral start tries lengths halved up to so often, and takes the best on the first batch.
HALVINGS = 24


class Stack(Generic[N]):
    """Networks as square matrices, padded by zeros, which stay zeros."""

    def __init__(self, frozen: N) -> None:
        if not frozen.batch_shape.numel():
            given = f"batch shape {tuple(frozen.batch_shape)}"
            raise InputError("frozen", allowed="at least one network", given=given)
        # The network's own checks refuse numbers too large for single precision.
        self.network: Any = frozen.to(torch.float32)
        self.shapes = [tuple(weight.shape[-2:]) for weight in frozen.weights]
        largest = max(max(shape) for shape in self.shapes)
        self.width = -(-largest // UNROLLED) * UNROLLED
        self.members = frozen.batch_shape.numel()
        self.biases = self.network.biases
        self.weights = self._pad(self.network.weights, 2)
        # Linear networks get biases too: zeros, which stay.
        none = [torch.zeros(self.members, 1, device="cpu")] * len(self.shapes)
        self.padded_biases = self._pad(self.biases or none, 1)
        # Coordinates of an input and of an output, or of each of their tokens.
        self.inputs, self.outputs = self.shapes[0][1], self.shapes[-1][0]
        # Compiled code knows all chains of layers, but only these transformers.
        network: Any = frozen
        known = (
            isinstance(network, Transformer)
            and network.is_plain
            and network.activation == "relu"
            and not network.causal
        )
        self.blocks: int = network.depth if known else 0
        self.heads: int = network.heads if known else 0
        self.is_covered = known or not frozen.sequences

    def structure(self, batches: Batches, steps: int) -> Structure:
        """What all runs have in common."""
        votes = batches.votes
        return Structure(
            relus=self.network.relus,
            blocks=self.blocks,
            heads=self.heads,
            tokens=batches.tokens,
            outputs=self.outputs,
            classes=batches.classes,
            class_of=np.pad(votes, (0, self.width - len(votes)), constant_values=-1),
            tile=tile(self.width, batches.tokens),
            steps=steps,
        )

    def state(
        self,
        tunings: Sequence[Tuning],
        seeds: Sequence[int],
        sources: NDArray[np.int64],
        points: int,
        until: float,
    ) -> State[Any]:
        """All runs at the study's start; ``sources`` says which data each member has."""
        ranks = np.repeat(np.array([self.ranks(t) for t in tunings]), self.members, 0)
        runs, M, D = len(ranks), len(self.shapes), self.width
        problem = np.tile(np.arange(self.members), len(tunings))
        A = np.zeros((runs, M, D, D), np.float32)
        adapted = np.any(ranks > 0, axis=0)
        B = np.stack([self._first_factors(seed, adapted) for seed in seeds])[problem]
        B *= np.arange(D)[:, None] < ranks[..., None, None]
        b = self.padded_biases[problem]
        full = ranks < 0
        A[full] = self.weights[problem][full]
        tuned = np.zeros(b.shape[:2], bool)
        words = np.array([self._tuned_biases(t) for t in tunings], bool)
        tuned[:, : len(self.biases)] = np.repeat(words, self.members, 0)

        def per_run(values: list[float]) -> Any:
            return np.repeat(np.array(values, np.float32), self.members)

        return State(
            problem=problem,
            source=sources[problem],
            frozen=self.weights,
            ranks=ranks,
            tuned=tuned,
            centre=np.zeros_like(b),
            rate=per_run([t.learning_rate for t in tunings]),
            falling=np.repeat([t.schedule == "cosine" for t in tunings], self.members),
            decay=per_run([t.weight_decay for t in tunings]),
            ratio=per_run([t.ratio for t in tunings]),
            one_sided=np.repeat([t.loss == "one-sided" for t in tunings], self.members),
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

    def training(self, state: State[Any], every: int) -> Training[N]:
        """Results of the runs, at the least validation loss of each."""

        def shape(values: Any) -> Tensor:
            values = torch.as_tensor(values, device=self.network.device)
            return values.reshape(-1, *self.network.batch_shape, *values.shape[1:])

        A, B, b = (shape(values) for values in (state.A_best, state.B_best, state.b_best))
        ranks, full = shape(state.ranks.clip(0)), shape(state.ranks < 0)
        updates, weights = [], []
        for m, (outer, inner) in enumerate(self.shapes):
            rows = slice(0, min(outer, inner))
            adapted = ~full[..., m, None, None]
            # Rows past a run's rank hold zeros in A.
            update = LowRank(
                (A[..., m, rows, :outer] * adapted).mT, (B[..., m, rows, :inner] * adapted).mT
            )
            sums = self.network.weights[m] + update.matrix()
            weights.append(torch.where(adapted, sums, A[..., m, :outer, :inner]))
            updates.append(update)
        biases = [b[..., l, : old.shape[-1]] for l, old in enumerate(self.biases)]
        if state.centre.any():
            centres = shape(state.centre).double().unbind(-2)
            for l, (W, centre) in enumerate(zip(weights, centres, strict=True)):
                moved = W.double() @ centre[..., : W.shape[-1], None]
                biases[l] = biases[l] - moved.squeeze(-1).to(b)
        changes = tuple(new - old for new, old in zip(biases, self.biases, strict=True))
        tuned = Tuned(ranks, shape(state.tuned)[..., : len(biases)])
        best = shape(state.best)
        return Training(
            self.network.with_parameters(weights, *([biases] if biases else [])),
            Adapters.trimmed(updates, changes, tuned),
            parameter_count=self._counts(full, tuned),
            steps=torch.arange(state.training.shape[1], device=best.device) * every,
            training_loss=shape(state.training),
            validation_loss=shape(state.validation),
            best_loss=best,
            best_step=shape(state.best_step),
            diverged=shape(state.stopped) & ~(best <= shape(state.goal)),
        )

    def _counts(self, full: Tensor, tuned: Tuned) -> Tensor:
        """How many numbers each run tunes: of adapters, of weights in full, and of biases."""

        def whole(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=tuned.ranks.device)

        sides, sizes = (whole([of(shape) for shape in self.shapes]) for of in (sum, prod))
        lengths = whole([bias.shape[-1] for bias in self.biases])
        counts = (tuned.ranks * sides, full * sizes, tuned.biases * lengths)
        return torch.stack([of_each.sum(-1) for of_each in counts]).sum(0)

    def _pad(self, values: Sequence[Tensor], dims: int) -> Array:
        """``[members, values, …]``, the last ``dims`` dimensions padded to the width."""
        padded = np.zeros((self.members, len(values), *[self.width] * dims), np.float32)
        for i, value in enumerate(values):
            sizes = value.shape[-dims:]
            padded[:, i][(slice(None), *map(slice, sizes))] = value.reshape(-1, *sizes).cpu()
        return padded

    def ranks(self, tuning: Tuning) -> list[int]:
        """The rank of each weight's adapter; −1 where the weight is tuned in full."""
        network, count = self.network, len(self.shapes)
        if tuning.final:
            last = _checks.integer("final", tuning.final, 0, count, limit="the number of weights")
            return [0] * (count - last) + [-1] * last
        ranks = _checks.ranks_per_layer(tuning.ranks, self.shapes)
        if network.sequences and isinstance(tuning.ranks, int):
            return [r * adapted for r, adapted in zip(ranks, network.adapted, strict=True)]
        return list(ranks)

    def _tuned_biases(self, tuning: Tuning) -> list[bool]:
        count = len(self.biases)
        if isinstance(tuning.biases, tuple):
            if len(tuning.biases) != count:
                allowed = f"one word for all, or one for each of {count}"
                raise InputError("biases", allowed=allowed, given=f"{len(tuning.biases)} of them")
            return list(tuning.biases)
        if not tuning.final or tuning.final == len(self.shapes):
            return [tuning.biases] * count
        if self.network.sequences:
            # The last weight is W_out, which has no bias beside it.
            return [False] * count
        return [tuning.biases and l >= count - tuning.final for l in range(count)]

    def _first_factors(self, seed: int, adapted: Any) -> Array:
        """``Bᵀ`` of every adapted weight, a row for each direction, at the largest rank."""
        factors = np.zeros((len(self.shapes), self.width, self.width), np.float32)
        for m in adapted.nonzero()[0]:
            outer, inner = self.shapes[m]
            rank = min(outer, inner)
            generator = randomness.generator(seed, "factors", int(m))
            drawn = randomness.normal(generator, rank, inner, dtype=torch.float32)
            factors[m, :rank, :inner] = FACTOR_SCALE * drawn
        return factors


def put_starts(
    stack: Stack[Any],
    structure: Structure,
    state: State[Any],
    tunings: Sequence[Tuning],
    batches: Batches,
) -> None:
    """Replace the study's start where another one is asked for."""
    for i, tuning in enumerate(tunings):
        runs = slice(i * stack.members, (i + 1) * stack.members)
        if isinstance(tuning.start, Adapters):
            caps, ranks = stack.ranks(tuning), tuning.start.ranks
            is_within = [r <= cap for r, cap in zip(ranks, caps, strict=False)]
            if len(ranks) != len(caps) or not all(is_within):
                allowed = f"adapters of ranks up to {caps}"
                raise InputError("start", allowed=allowed, given=tuning.start)
            _put(stack, state, runs, tuning.start)
        elif tuning.start == "linearized":
            _put(stack, state, runs, _linearized(stack, tuning.blocks, batches))
        elif tuning.start == "spectral":
            _spectral(stack, structure, state, runs, batches)
        if tuning.centred:
            _centre(stack, state, runs, batches)
        # The best so far is the start.
        for name in ("A", "B", "b"):
            getattr(state, f"{name}_best")[runs] = getattr(state, name)[runs]


def _put(stack: Stack[Any], state: State[Any], runs: slice, start: Adapters) -> None:
    """Replace as many of the study's factors as there are adapters', and their biases."""
    batch = stack.network.batch_shape
    if torch.broadcast_shapes(start.batch_shape, batch) != batch:
        raise InputError("start", allowed=f"of batch shape {tuple(batch)}", given=start)
    start.merge(stack.network)

    def flat(values: Tensor, dims: int) -> Array:
        rest = values.shape[values.ndim - dims :]
        every = values.expand(*stack.network.batch_shape, *rest)
        return every.reshape(stack.members, *rest).to("cpu", torch.float32).numpy()

    for m, update in enumerate(start.updates):
        for factors, given in ((state.A, update.left), (state.B, update.right)):
            factors[runs, m, : update.rank, : given.shape[-2]] = flat(given.mT, 2)
    for l, change in enumerate(start.bias_updates):
        state.b[runs, l, : change.shape[-1]] += flat(change, 1)


def _linearized(stack: Stack[Any], blocks: int, batches: Batches) -> Adapters:
    """Biases with which inner ReLUs idle in a ball that holds the inputs seen so far."""
    network = stack.network
    if not isinstance(network, FNN):
        allowed = "'study', 'spectral' or adapters, but for ReLU networks"
        raise InputError("start", allowed=allowed, given=f"'linearized' for {network}")
    blocks = _checks.integer("blocks", blocks, 1, network.depth, limit="the depth")
    partition = Partition.uniform(network.depth, blocks)
    # All inputs of the first batches, side by side.
    first = batches.first[0].movedim(1, -1).flatten(-2)
    seen = torch.cat([batches.validation[0], first], -1)
    of_source = Ball.about(seen[..., : stack.inputs, 0, :].double(), MARGIN)
    sources, shape = batches.sources.tolist(), network.batch_shape
    centres = of_source.centre[sources, :, 0].reshape(*shape, -1)
    ball = Ball(of_source.radius[sources].reshape(shape), centres)
    return fnn.idle(network.to(torch.float64, "cpu"), ball, partition)


def _part(state: State[Any], runs: slice, device: torch.device) -> State[Tensor]:
    """Some runs as tensors."""
    parts = (part if name == "frozen" else part[runs] for name, part in state._asdict().items())
    return State(*(torch.as_tensor(part).to(device) for part in parts))


def _centre(stack: Stack[Any], state: State[Any], runs: slice, batches: Batches) -> None:
    """Write layers as ``W (z − m) + c``, ``m`` the mean of ``z`` on the first batches."""
    if not isinstance(stack.network, FNN):
        given = f"True for {stack.network}"
        raise InputError("centred", allowed="False, but for ReLU networks", given=given)
    here = _part(state, runs, torch.device("cpu"))
    W, b = _reference.weights(here, here.A, here.B).double(), here.b.double()
    z = batches.first[0].movedim(1, -1).flatten(-3)[here.source].double()
    for l in range(len(stack.shapes)):
        centre = z.mean(-1)
        z = W[:, l] @ z + b[:, l, :, None]
        z = z.relu() if l < stack.network.relus else z
        state.centre[runs, l] = centre.numpy()
        state.b[runs, l] += (W[:, l] @ centre[..., None]).squeeze(-1).numpy()


def _spectral(
    stack: Stack[Any], structure: Structure, state: State[Any], runs: slice, batches: Batches
) -> None:
    """``t U_R S_R V_Rᵀ`` of each weight's first gradient, shared equally by both factors."""
    x, y = (
        torch.as_tensor(part)[torch.as_tensor(state.source[runs]), 0].to(stack.network.device)
        for part in batches.first
    )
    here = _part(state, runs, stack.network.device)

    def losses(W: Tensor) -> Tensor:
        return _reference.losses(stack.network, structure, here, W, here.b, x, y)

    W = here.frozen[here.problem].clone()
    with torch.enable_grad():
        slopes = torch.autograd.grad(losses(W.requires_grad_()).sum(), W)[0]
    W = W.detach()
    U, S, Vh = torch.linalg.svd(-slopes)
    rows = torch.arange(W.shape[-1], device=W.device) < here.ranks[..., None]
    S = S * rows / S.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)
    direction = (U * S[..., None, :]) @ Vh
    lengths = W.new_tensor([0.5**k for k in range(HALVINGS)])
    tried = torch.stack([losses(W + t * direction) for t in lengths]).nan_to_num(torch.inf)
    # A direction without a gradient keeps the study's factors, and so does a run that no length
    # helps.
    learned = (S > 0) & (tried.amin(0) < losses(W))[:, None, None]
    root = (lengths[tried.argmin(0)][:, None, None] * S).sqrt()[..., None]
    state.A[runs] = torch.where(learned[..., None], root * U.mT, here.A).cpu().numpy()
    state.B[runs] = torch.where(learned[..., None], root * Vh, here.B).cpu().numpy()


def _class_of(classes: Sequence[int], outputs: int) -> NDArray[np.int64]:
    """The class to which each output votes, checked; empty for the squared error."""
    if not isinstance(classes, Sequence) or len(classes) not in (0, outputs):
        allowed = f"none, or one for each of {outputs} outputs"
        raise InputError("classes", allowed=allowed, value=classes)
    votes = np.array([_checks.integer("classes", c, -1) for c in classes], np.int64)
    missing = set(range(int(votes.max(initial=-1)) + 1)) - set(votes.tolist())
    if missing or (len(votes) and votes.max() < 0):
        allowed = "such that each class from 0 to the last has a vote"
        raise InputError("classes", allowed=allowed, given=list(classes))
    return votes


class Batches:
    """Labelled inputs, ``[..., D, tokens, samples]``, and what outputs are compared with there."""

    def __init__(
        self,
        data: Sequence[Data],
        stack: Stack[Any],
        classes: Sequence[int],
        one_sided: bool = False,
    ) -> None:
        self.stack, self.one_sided = stack, one_sided
        self.votes = _class_of(classes, stack.outputs)
        self.classes = int(self.votes.max(initial=-1)) + 1
        self.sequences = stack.network.sequences
        # Members with the same data share its tensors.
        distinct = {id(source): source for source in data}
        self.distinct = list(distinct.values())
        self.sources = np.array([list(distinct).index(id(source)) for source in data])
        self.validation = self._join([source.validation for source in self.distinct])
        self.first = self._join([source.block(0) for source in self.distinct], Data.BLOCK)
        self.tokens, others = (part[0].shape[-2] for part in (self.first, self.validation))
        if others != self.tokens:
            allowed = "of equally many tokens for training and validation"
            raise InputError("data", allowed=allowed, given=f"{self.tokens} and {others}")

    def blocks(self, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First step, inputs and labels of each block, made while the block before is in use."""
        with ThreadPoolExecutor(1, initializer=_checks.flush) as ahead:
            coming = ahead.submit(self._block, 0)
            for index, start in enumerate(range(0, steps, Data.BLOCK)):
                x, y = coming.result()
                if start + Data.BLOCK < steps:
                    coming = ahead.submit(self._block, index + 1)
                yield start, x[:, : steps - start], y[:, : steps - start]

    # Threads do not inherit this.
    @torch.no_grad()
    def _block(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 0:
            return self.first
        x, y = self._join([source.block(index) for source in self.distinct], Data.BLOCK)
        if x.shape != self.first[0].shape:
            raise InputError("data", allowed="alike in every block", given=f"block {index} unlike")
        return x, y

    def _join(self, given: Sequence[Labelled], *lead: int) -> tuple[Tensor, Tensor]:
        inputs, labels = zip(*(self._arrange(x, y, lead) for x, y in given), strict=True)
        shapes = sorted({tuple(x.shape[-2:]) for x in inputs})
        if len(shapes) > 1:
            allowed = "of equally many tokens and samples for all networks"
            raise InputError("data", allowed=allowed, given=f"tokens and samples {shapes}")
        return torch.stack(inputs), torch.stack(labels)

    def _arrange(self, x: Any, y: Any, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        x = _checks.real_tensor("data's inputs", x, min_dims=1)
        D = self.stack.inputs
        form = [*lead, "samples", D, "tokens"] if self.sequences else [*lead, D, "samples"]
        if x.ndim != len(form) or x.shape[: len(lead)] != lead or x.shape[-2] != D:
            allowed = f"of shape [{', '.join(map(str, form))}]"
            raise InputError("data's inputs", allowed=allowed, given=tuple(x.shape))
        if self.classes:
            samples = x.shape[len(lead)] if self.sequences else x.shape[-1]
            return self._features(x), self._one_hot(y, (*lead, samples))
        if isinstance(y, Tensor) and y.dtype in _checks.INTEGERS:
            allowed = "float32 or float64 where no classes are given"
            remedy = f"say for which class each output votes, classes=range({self.stack.outputs})"
            raise InputError("data's labels", allowed=allowed, given=y.dtype, remedy=remedy)
        y = _checks.real_tensor("data's labels", y, min_dims=1)
        self._check_labels(y, (*x.shape[:-2], self.stack.outputs, x.shape[-1]))
        if self.one_sided and y.min() < 0:
            allowed = "at least 0 for the one-sided loss, as outputs of a ReLU are"
            raise InputError("data's labels", allowed=allowed, given=float(y.min()))
        return self._features(x), self._features(y)

    def _features(self, values: Tensor) -> Float[Tensor, "*lead D tokens samples"]:
        values = values.movedim(-3, -1) if self.sequences else values.unsqueeze(-2)
        padding = self.stack.width - values.shape[-3]
        return torch.nn.functional.pad(values, (0, 0, 0, 0, 0, padding)).to("cpu", torch.float32)

    def _one_hot(self, y: Any, shape: tuple[int, ...]) -> Float[Tensor, "*lead classes 1 samples"]:
        y = torch.as_tensor(y, device="cpu")
        self._check_labels(y, shape)
        integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if not integers or y.min() < 0 or y.max() >= self.classes:
            allowed = f"classes, integers from 0 to {self.classes - 1}"
            given = f"{y.dtype} from {y.min()} to {y.max()}"
            raise InputError("data's labels", allowed=allowed, given=given)
        hot = torch.nn.functional.one_hot(y.long(), self.classes)
        return hot.movedim(-1, -2).unsqueeze(-2).to(torch.float32)

    def _check_labels(self, y: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(y.shape) != shape:
            allowed = f"of shape {shape}, to fit inputs"
            raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))
