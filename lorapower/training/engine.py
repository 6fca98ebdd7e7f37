"""Gradient training of many adapters at once, by batched torch on the frozen network's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, randomness
from ..adapters import Adapters, N, Tuned
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from ._task import Task
from .tuning import Data, Training, Tuning

# Standard deviation of B's entries at the start, where A is 0.
FACTOR_SCALE = 0.25
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@torch.no_grad()
@_checks.flushing()
def train(
    frozen: N,
    tunings: Sequence[Tuning],
    data: Data,
    *,
    steps: int = 5000,
    every: int = 1,
    classes: Sequence[int] = (),
    until: float = 0.0,
    seed: int | Sequence[int] = 0,
) -> Training[N]:
    """Tune adapters, final layers or whole networks by Adam, all runs at once, in single precision.

    Each of ``tunings`` runs on each frozen network; but for rounding, its result does not depend on
    the other runs. All see the same inputs, and runs of one network share their first factors, of
    which a run of rank ``R`` has the first ``R`` columns. ``seed`` draws the first factors: one
    seed for the whole batch, or one for each member. The validation loss is taken every ``every``
    steps. All is computed on the frozen network's device.

    Raises `InputError` where there are no tunings, for ranks or layers out of range, for data that
    does not fit the network or the loss, and for a loss that the network does not have.
    Source: the protocol of the study's experiments.

    Parameters
    ----------
    classes : sequence of int
        The class, counted from 0, for which each output votes. The softmax of the votes, summed
        over outputs and tokens, is compared with the label by cross-entropy. Without classes the
        loss is the mean squared error over outputs, tokens and samples.
    until : float
        A run ends when its validation loss is at most this part of the one before the first step.
    """
    steps = _checks.integer("steps", steps, 1)
    every = _checks.integer("every", every, 1, steps, limit="the steps")
    until = _checks.tolerance("until", until)
    runs = _Runs(frozen, tunings, data, classes, seed)
    return runs.results(runs.descend(steps, every, until))


class _Parts(NamedTuple):
    """The numbers that training moves, or what belongs to each of them, in one buffer ``flat``.

    ``W = base + A B`` with ``A`` ``[weights, runs, D, D]``, zeros past a run's rank, and ``B``
    alike, together ``factors``; ``b`` are biases ``[biases, runs, D]``. Smaller weights are padded
    with zeros to the largest size ``D``. Where a weight is tuned in full, its base is 0 and ``B``
    the identity.
    """

    flat: Tensor
    factors: Float[Tensor, "2 M runs D D"]
    A: Float[Tensor, "M runs D D"]
    B: Float[Tensor, "M runs D D"]
    b: Float[Tensor, "P runs D"]

    @classmethod
    def zeros(cls, like: Tensor, biases: int) -> _Parts:
        """Make them for weights ``[M, runs, D, D]`` and so many biases."""
        count, size = 2 * like.numel(), biases * like[0, ..., 0].numel()
        flat = like.new_zeros(count + size)
        factors, b = flat.split([count, size])
        factors = factors.view(2, *like.shape)
        return cls(flat, factors, factors[0], factors[1], b.view(biases, *like.shape[1:3]))


class _Course(NamedTuple):
    """What is recorded of each run."""

    steps: Tensor
    training: Float[Tensor, "runs points"]
    validation: Float[Tensor, "runs points"]
    best_loss: Float[Tensor, " runs"]
    best_step: Tensor
    best: _Parts
    diverged: Bool[Tensor, " runs"]


class _Runs:
    """All runs, tuning by tuning and for each the members of the frozen batch."""

    def __init__(
        self,
        frozen: Network,
        tunings: Sequence[Tuning],
        data: Data,
        classes: Sequence[int],
        seed: int | Sequence[int],
    ) -> None:
        _checks.kind(Network, frozen=frozen)
        if isinstance(tunings, Tuning) or not tunings:
            allowed = "a list of Tuning, such as [Tuning(ranks=4)]"
            raise InputError("tunings", allowed=allowed, value=tunings)
        members = frozen.batch_shape.numel()
        if not members:
            given = f"batch shape {tuple(frozen.batch_shape)}"
            raise InputError("frozen", allowed="at least one network", given=given)
        # The network's own checks refuse numbers too large for single precision.
        self.network: Any = frozen.to(torch.float32)
        self.tunings, self.members = tunings, members
        self.shapes = [tuple(weight.shape[-2:]) for weight in frozen.weights]
        one_sided = self._per_run(lambda tuning: tuning.loss == "one-sided")
        self.task = Task(self.network, data, classes, one_sided)
        seeds = seed if isinstance(seed, Sequence) else [seed] * members
        if len(seeds) != members:
            allowed = f"one, or one for each of {members} networks"
            raise InputError("seed", allowed=allowed, given=len(seeds))
        # [runs, weights] and [runs, biases].
        self.ranks = self._per_run(self._ranks)
        self.moves = self._per_run(self._moves).bool()
        self._start([*map(_checks.seed, seeds)])

    def _per_run(self, value: Callable[[Tuning], Any]) -> Tensor:
        values = torch.tensor([*map(value, self.tunings)], device=self.network.device)
        return values.repeat_interleave(self.members, 0)

    def _ranks(self, tuning: Tuning) -> list[int]:
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

    def _moves(self, tuning: Tuning) -> list[bool]:
        """Say which biases are tuned."""
        count, given = len(self.network.biases), tuning.biases
        if isinstance(given, tuple):
            if len(given) != count:
                allowed = f"True, False, or one of them for each of {count}"
                raise InputError("biases", allowed=allowed, given=f"{len(given)} of them")
            return list(given)
        if not tuning.final or tuning.final == len(self.shapes):
            return [given] * count
        # In a transformer the last weight is W_out, which has no bias beside it.
        first = count if self.network.sequences else count - tuning.final
        return [given and l >= first for l in range(count)]

    def _start(self, seeds: Sequence[int]) -> None:
        """Put all runs at their starts."""
        network, tunings, width = self.network, len(self.tunings), max(map(max, self.shapes))
        runs = tunings * self.members
        self.base = network.weights[0].new_zeros(len(self.shapes), runs, width, width)
        self.values = _Parts.zeros(self.base, len(network.biases))
        for base, weight in zip(self.base, network.weights, strict=True):
            out, into = weight.shape[-2:]
            base[:, :out, :into] = weight.reshape(-1, out, into).repeat(tunings, 1, 1)
        for b, bias in zip(self.values.b, network.biases, strict=True):
            b[:, : bias.shape[-1]] = bias.reshape(self.members, -1).repeat(tunings, 1)
        largest = self.ranks.amax(0).tolist()
        for m, ((out, into), rank) in enumerate(zip(self.shapes, largest, strict=True)):
            if rank > 0:
                factors = [self._first_factors(seed, m, min(out, into), into) for seed in seeds]
                B = torch.stack(factors).to(network.device).repeat(tunings, 1, 1)
                self.values.B[m, :, : B.shape[1], :into] = B
        places = torch.arange(width, device=network.device)
        self.values.B.mul_((places < self.ranks.mT[..., None])[..., None])
        full = self.ranks.mT < 0
        self.values.A[full], self.base[full] = self.base[full], 0.0
        self.values.B[full] = torch.eye(width, device=network.device)

    @staticmethod
    def _first_factors(seed: int, m: int, rank: int, into: int) -> Tensor:
        generator = randomness.generator(seed, "factors", m)
        return FACTOR_SCALE * randomness.normal(generator, rank, into, dtype=torch.float32)

    # Steps.

    def descend(self, steps: int, every: int, until: float) -> _Course:
        """Take all steps of Adam, with its L2 penalty as `torch.optim.Adam` has it."""
        now, biases = self.values, len(self.values.b)
        slopes, first, second = (_Parts.zeros(self.base, biases) for _ in range(3))
        rates = self._per_run(lambda tuning: tuning.learning_rate).float()
        decay = self._per_run(lambda tuning: tuning.weight_decay).float()
        falling = rates * self._per_run(lambda tuning: tuning.schedule == "cosine")
        has_decay, has_falling = bool(decay.any()), bool(falling.any())
        # Which slopes do not count: of B where it is the identity, and of biases that stay.
        full, fixed = self.ranks.mT < 0, ~self.moves.mT
        has_full, has_fixed = bool(full.any()), bool(fixed.any())
        tuned = (self.ranks != 0).any(0)
        if not self.network.sequences and biases:
            tuned |= self.moves.any(0)
        lowest = int(tuned.int().argmax()) if tuned.any() else len(tuned)
        W, dW = torch.empty_like(self.base), torch.zeros_like(self.base)
        base, A, B, all_W, all_dW, dA, dB = (
            part.flatten(0, 1) for part in (self.base, now.A, now.B, W, dW, slopes.A, slopes.B)
        )
        task = self.task.bind(W, now.b, dW, slopes.b)
        course = _Recorder(now, steps, every, until)
        torch.baddbmm(base, A, B, out=all_W)
        course.record(0, task.losses(task.validation))
        for step, batch in enumerate(task.batches(steps), 1):
            loss = task.slopes(batch, lowest)
            torch.bmm(all_dW, B.mT, out=dA)
            torch.bmm(A.mT, all_dW, out=dB)
            if has_decay:
                slopes.factors.addcmul_(decay[:, None, None], now.factors)
                slopes.b.addcmul_(decay[:, None], now.b)
            if has_full:
                slopes.B.masked_fill_(full[..., None, None], 0.0)
            if has_fixed:
                slopes.b.masked_fill_(fixed[..., None], 0.0)
            first.flat.lerp_(slopes.flat, 1 - BETA_1)
            second.flat.mul_(BETA_2).addcmul_(slopes.flat, slopes.flat, value=1 - BETA_2)
            # The slopes are used, and their place is free. torch.sqrt is ten times slower on zeros.
            move = torch.rsqrt(second.flat, out=slopes.flat).reciprocal_()
            move.mul_((1 - BETA_2**step) ** -0.5).add_(EPSILON)
            torch.div(first.flat, move, out=move)
            rate = rates
            if has_falling:
                rate = rates.add(falling, alpha=(cos(pi * (step - 1) / steps) - 1) / 2)
            value = -1 / (1 - BETA_1**step)
            now.factors.addcmul_(slopes.factors, rate[:, None, None], value=value)
            now.b.addcmul_(slopes.b, rate[:, None], value=value)
            torch.baddbmm(base, A, B, out=all_W)
            course.follow(step, loss)
            if step % every == 0:
                course.record(step, task.losses(task.validation))
                if not course.running.any():
                    break
        return course.course()

    # Results.

    def results(self, course: _Course) -> Training[Any]:
        """Return the runs' parameters and networks at the least validation loss of each."""
        network, adapters = self.tuned(course.best)
        return Training(
            network,
            adapters,
            steps=course.steps,
            training_loss=self._shape(course.training),
            validation_loss=self._shape(course.validation),
            best_loss=self._shape(course.best_loss),
            best_step=self._shape(course.best_step),
            diverged=self._shape(course.diverged),
        )

    def _shape(self, values: Tensor) -> Tensor:
        return values.reshape(len(self.tunings), *self.network.batch_shape, *values.shape[1:])

    def tuned(self, values: _Parts) -> tuple[Any, Adapters]:
        """Return the networks with these numbers, and their adapters."""
        network, shape = self.network, self._shape
        updates, weights, biases = [], [], []
        for m, (out, into) in enumerate(self.shapes):
            A, B = values.A[m], values.B[m]
            is_full = self.ranks[:, m, None, None] < 0
            R = min(out, into)
            left, right = (
                torch.where(is_full, 0, part) for part in (A[:, :out, :R], B[:, :R, :into])
            )
            updates.append(LowRank(shape(left), shape(right).mT))
            sums = network.weights[m] + updates[m].matrix()
            weights.append(torch.where(shape(is_full), shape(A[:, :out, :into]), sums))
        biases = [
            shape(b)[..., : old.shape[-1]] for b, old in zip(values.b, network.biases, strict=True)
        ]
        changes = tuple(new - old for new, old in zip(biases, network.biases, strict=True))
        tuned = Tuned(shape(self.ranks.clamp(min=0)), shape(self.moves))
        return network.with_parameters(weights, biases), Adapters.trimmed(updates, changes, tuned)


class _Recorder:
    """Keeps losses, and the parameters at the least validation loss."""

    def __init__(self, now: _Parts, steps: int, every: int, until: float) -> None:
        self.now, self.every, self.until = now, every, until
        runs = now.b.shape[1]
        self.best = _Parts.zeros(now.A, len(now.b))
        self.best.flat.copy_(now.flat)
        self.training, self.validation = now.flat.new_full((2, runs, steps // every + 1), torch.nan)
        self.best_loss = now.flat.new_full((runs,), torch.inf)
        self.best_step = torch.zeros_like(self.best_loss, dtype=torch.long)
        self.goal = torch.zeros_like(self.best_loss)
        # Until a run is at its goal, or a loss is no finite number.
        self.running = torch.ones_like(self.best_loss, dtype=torch.bool)

    def follow(self, step: int, loss: Float[Tensor, " runs"]) -> None:
        """Take note of the losses that a step was taken on."""
        self.running &= loss < torch.inf
        if step % self.every == 0:
            point = step // self.every
            self.training[:, point] = torch.where(self.running, loss, torch.nan)

    def record(self, step: int, loss: Float[Tensor, " runs"]) -> None:
        """Record validation losses, keep parameters where they are the least, stop at goals."""
        if step == 0:
            self.goal = self.until * loss
        self.validation[:, step // self.every] = torch.where(self.running, loss, torch.nan)
        better = self.running & (loss < self.best_loss)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_step.masked_fill_(better, step)
        best, now = self.best, self.now
        torch.where(better[:, None, None], now.factors, best.factors, out=best.factors)
        torch.where(better[:, None], now.b, best.b, out=best.b)
        self.running &= (loss < torch.inf) & ~(better & (loss <= self.goal))

    def course(self) -> _Course:
        return _Course(
            steps=torch.arange(self.training.shape[1], device=self.goal.device) * self.every,
            training=self.training,
            validation=self.validation,
            best_loss=self.best_loss,
            best_step=self.best_step,
            best=self.best,
            diverged=~self.running & ~(self.best_loss <= self.goal),
        )
