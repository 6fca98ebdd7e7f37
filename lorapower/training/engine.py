"""Gradient training of many adapters at once, on the frozen network's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import cos, pi
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .. import _checks, randomness
from ..adapters import Adapters, N
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from ._objective import Objective
from .tuning import Data, Training, Tuning

# Standard deviation of B's entries at the start, where A is 0.
FACTOR_SCALE = 0.25
# Bytes, below the 32 MiB above which glibc learns nothing from a block.
KEPT = 31 * 2**20


@torch.no_grad()
@_checks.flushing()
def train(
    frozen: N,
    tunings: Sequence[Tuning],
    data: Data,
    *,
    steps: int = 5000,
    every: int = 1,
    until: float = 0.0,
    seed: int | Sequence[int] = 0,
) -> Training[N]:
    """Tune adapters, final layers or whole networks by Adam, all runs at once, in single precision.

    Each of ``tunings`` runs on each frozen network; but for rounding, its result does not depend on
    the other runs. All see the same inputs, and runs of one network share their first factors, of
    which a run of rank ``R`` has the first ``R`` columns. ``seed`` draws the first factors: one
    seed for the whole batch, or one for each member. The validation loss is taken every ``every``
    steps. All is computed on the frozen network's device. The loss is the mean squared error over
    outputs, tokens and samples or, where labels are classes, the cross-entropy.

    Raises `InputError` for a loss that the network does not have. Source: the protocol of the
    study's experiments.

    Parameters
    ----------
    until : float
        A run ends when its validation loss is at most this part of the one before the first step.

    Examples
    --------
    >>> from lorapower.networks import LinearNetwork
    >>> from lorapower.training import Fresh, Tuning, train
    >>> frozen, target = LinearNetwork.random(2, 4), LinearNetwork.random(1, 4, seed=1)
    >>> tunings = [Tuning(ranks=rank, learning_rate=1e-2) for rank in (1, 2)]
    >>> runs = train(frozen, tunings, Fresh(target, (4,)), steps=500, every=10)
    >>> runs.adapters[1].ranks
    (2, 2)
    >>> bool(runs.best_loss[1] < runs.best_loss[0] / 10)
    True
    """
    steps = _checks.integer("steps", steps, 1)
    every = _checks.integer("every", every, 1, steps, limit="the steps")
    until = _checks.number("until", until, 0)
    runs = _Runs(frozen, tunings, seed)
    one_sided = runs.each(lambda tuning: tuning.loss == "one-sided")
    if_dead = runs.each(lambda tuning: tuning.loss == "one-sided-dead")
    objective = Objective(runs.frozen, data, one_sided, if_dead)
    optimizer = _Optimizer(runs, steps)
    # glibc keeps freed memory for reuse up to twice the largest block freed so far; beyond that
    # every step would ask the system for its pages, in a third of its time.
    torch.empty(KEPT, dtype=torch.uint8)
    curve = _Curve(runs.start, objective.validation_loss(runs.networks(runs.start)), until)
    for step, batch in zip(range(1, steps + 1), objective.batches(), strict=False):
        with torch.enable_grad():
            loss = objective.training_loss(runs.networks(optimizer.values()), batch)
        optimizer.descend(loss)
        curve.running &= loss < torch.inf
        if step % every == 0:
            values = optimizer.values()
            curve.record(step, loss, objective.validation_loss(runs.networks(values)), values)
            if not curve.running.any():
                break
    return runs.results(curve)


class _Optimizer:
    """Adam at each run's own rate: runs of one rate, decay and schedule are one of its groups.

    The sum of all losses is descended. As Adam moves each number by its own slopes alone, runs do
    not depend on each other; so must an optimizer that takes its place.
    """

    def __init__(self, runs: _Runs, steps: int) -> None:
        rows: dict[tuple[Any, ...], list[int]] = {}
        for i, tuning in enumerate(runs.tunings):
            pace = tuning.learning_rate, tuning.weight_decay, tuning.schedule
            rows.setdefault(pace, []).extend(range(i * runs.members, (i + 1) * runs.members))
        order = [row for group in rows.values() for row in group]
        self.places = torch.tensor(order, device=runs.start.device).argsort()
        self.leaves, groups = list[Tensor](), list[dict[str, Any]]()
        for (rate, decay, _), group in rows.items():
            leaf, tuned = runs.start[group].requires_grad_(), runs.tuned[group]
            if not tuned.all():
                leaf.register_hook(partial(torch.where, tuned, other=0.0))
            self.leaves.append(leaf)
            groups.append({"params": [leaf], "lr": rate, "weight_decay": decay})
        self.optimizer = torch.optim.Adam(groups, fused=True)

        def falling(step: int) -> float:
            return (1 + cos(pi * step / steps)) / 2

        paces = [falling if schedule == "cosine" else lambda step: 1.0 for _, _, schedule in rows]
        self.schedule = LambdaLR(self.optimizer, paces)

    def values(self) -> Float[Tensor, "runs parameters"]:
        if len(self.leaves) == 1:
            return self.leaves[0]
        return torch.cat(self.leaves).index_select(0, self.places)

    @torch.enable_grad()
    def descend(self, losses: Float[Tensor, " runs"]) -> None:
        self.optimizer.zero_grad()
        # Without anything to tune losses depend on nothing.
        if losses.requires_grad:
            losses.sum().backward()
        self.optimizer.step()
        self.schedule.step()


class _Runs:
    """All runs, tuning by tuning and for each the members of the frozen batch.

    A run's parameters are a row of numbers, at first of ``start``: for each weight ``A``, ``B`` and
    ``F``, of which it becomes ``W + A B`` or, tuned in full, ``F``; then the biases. They are added
    to ``weights`` and ``biases``, which are 0 where a run tunes them in full. Numbers that a run
    does not tune are 0: columns past its rank, in which slopes are 0, and what is not ``tuned``.
    """

    def __init__(
        self, frozen: Network, tunings: Sequence[Tuning], seed: int | Sequence[int]
    ) -> None:
        _checks.kind(Network, frozen=frozen)
        self.members, dims = frozen.batch_shape.numel(), len(frozen.batch_shape)
        seeds = seed if isinstance(seed, Sequence) else [seed] * self.members
        if len(seeds) != self.members:
            allowed = f"one, or one for each of {self.members} networks"
            raise InputError("seed", allowed=allowed, given=len(seeds))
        self.tunings, self.shape = tunings, (len(tunings), *frozen.batch_shape)

        def repeat(values: Tensor) -> Tensor:
            return torch.cat([values.reshape(self.members, *values.shape[dims:])] * len(tunings))

        # The network's own checks refuse numbers too large for single precision.
        self.frozen: Any = frozen.to(torch.float32).map(repeat)
        # [runs, weights], −1 where a weight is tuned in full, and [runs, biases].
        self.ranks = self.each(self._ranks)
        self.tuned_biases = self.each(self._tuned_biases).bool()
        self._start(seeds)

    def each(self, value: Callable[[Tuning], Any]) -> Tensor:
        """Compute a value of each run's tuning."""
        values = torch.tensor([*map(value, self.tunings)], device=self.frozen.device)
        return values.repeat_interleave(self.members, 0)

    def _ranks(self, tuning: Tuning) -> Sequence[int]:
        network, shapes = self.frozen, [weight.shape[-2:] for weight in self.frozen.weights]
        if tuning.final:
            count = len(shapes)
            last = _checks.integer("final", tuning.final, 0, count, limit="the number of weights")
            return [0] * (count - last) + [-1] * last
        ranks = _checks.ranks_per_layer(tuning.ranks, shapes)
        if network.sequences and np.ndim(tuning.ranks) == 0:
            pairs = zip(ranks, network.adapted, strict=True)
            return [rank if adapted else 0 for rank, adapted in pairs]
        return ranks

    def _tuned_biases(self, tuning: Tuning) -> list[bool]:
        """Say which biases are tuned."""
        count, biases = len(self.frozen.biases), tuning.biases
        if not isinstance(biases, bool):
            if len(biases) != count:
                allowed = f"True, False, or one of them for each of {count}"
                raise InputError("biases", allowed=allowed, given=f"{len(biases)} of them")
            return [bool(tuned) for tuned in biases]
        if not tuning.final or tuning.final == len(self.frozen.weights):
            return [biases] * count
        # In a transformer the last weight is W_out, which has no bias beside it.
        beside = 0 if self.frozen.sequences else tuning.final
        return [biases and l >= count - beside for l in range(count)]

    def _start(self, seeds: Sequence[int]) -> None:
        """Put all runs at their starts."""
        self.weights, self.biases = list[Tensor](), list[Tensor]()
        starts, tuned = list[Tensor](), list[Tensor]()
        for m, W in enumerate(self.frozen.weights):
            ranks, (runs, out, into) = self.ranks[:, m, None, None], W.shape
            largest, is_full = max(int(ranks.max()), 0), ranks < 0
            generators = [randomness.generator(seed, "factors", m) for seed in seeds]
            # All columns are drawn, so that runs of other ranks begin with the same ones.
            size = min(out, into), into
            drawn = [randomness.normal(g, *size, dtype=torch.float32) for g in generators]
            B = FACTOR_SCALE * torch.cat([torch.stack(drawn)[:, :largest]] * len(self.tunings))
            B = B.to(W).where(torch.arange(largest, device=W.device)[:, None] < ranks, 0.0)
            A = W.new_zeros(runs, out, largest)
            full = W.where(is_full, 0.0) if is_full.any() else W.new_zeros(runs, 0, into)
            starts += [A, B, full]
            tuned += [torch.ones_like(A), torch.ones_like(B), is_full.expand_as(full)]
            self.weights.append(W.where(~is_full, 0.0))
        for b, is_tuned in zip(self.frozen.biases, self.tuned_biases.mT[..., None], strict=True):
            starts.append(b.where(is_tuned, 0.0))
            tuned.append(is_tuned.expand_as(b))
            self.biases.append(b.where(~is_tuned, 0.0))
        self.sizes = [part.shape[1:] for part in starts]
        self.start = torch.cat([part.flatten(1) for part in starts], 1)
        self.tuned = torch.cat([part.flatten(1).bool() for part in tuned], 1)

    def _split(self, values: Tensor) -> tuple[list[Tensor], ...]:
        """Split parameters into ``A``, ``B`` and ``F`` of all weights, and the biases."""
        pieces = values.split([size.numel() for size in self.sizes], 1)
        parts = [p.view(len(p), *size) for p, size in zip(pieces, self.sizes, strict=True)]
        count = 3 * len(self.weights)
        return parts[:count:3], parts[1:count:3], parts[2:count:3], parts[count:]

    def networks(self, values: Float[Tensor, "runs parameters"]) -> Network:
        """Make the networks of all runs, a batch, through which gradients flow."""
        *of_weights, changes = self._split(values)
        weights = []
        for W, A, B, full in zip(self.weights, *of_weights, strict=True):
            base = W + full if full.numel() else W
            weights.append(torch.baddbmm(base, A, B) if A.numel() else base)
        biases = [b + change for b, change in zip(self.biases, changes, strict=True)]
        return self.frozen.with_parameters(weights, biases, checked=False)

    def results(self, curve: _Curve) -> Training[Any]:
        """Collect networks and adapters at the least validation loss of each run."""

        def shaped(values: Tensor) -> Tensor:
            return values.reshape(*self.shape, *values.shape[1:])

        network, (left, right, *_) = self.networks(curve.best), self._split(curve.best)
        updates = [LowRank(shaped(A), shaped(B).mT) for A, B in zip(left, right, strict=True)]
        pairs = zip(network.biases, self.frozen.biases, strict=True)
        adapters = Adapters(tuple(updates), tuple(shaped(new - old) for new, old in pairs))
        return Training(
            network.map(shaped),
            adapters.trimmed(),
            torch.tensor(curve.steps, device=network.device),
            training_loss=shaped(torch.stack(curve.training, 1)),
            validation_loss=shaped(torch.stack(curve.validation, 1)),
            best_loss=shaped(curve.best_loss),
            best_step=shaped(curve.best_step),
            diverged=shaped(~curve.running & ~(curve.best_loss <= curve.goal)),
        )


class _Curve:
    """Losses of all runs, and the parameters at the least validation loss of each."""

    def __init__(self, start: Tensor, loss: Float[Tensor, " runs"], until: float) -> None:
        self.steps, self.training, self.validation = [0], [torch.nan * loss], [loss]
        self.best, self.best_loss = start, loss.where(loss < torch.inf, torch.inf)
        self.best_step, self.goal = torch.zeros_like(loss, dtype=torch.long), until * loss
        # Until a run is at its goal, or a loss is no finite number.
        self.running = (loss < torch.inf) & ~(loss <= self.goal)

    def record(self, step: int, training: Tensor, validation: Tensor, values: Tensor) -> None:
        """Keep losses, and parameters where the validation loss is the least; stop at goals."""
        self.steps.append(step)
        self.training.append(training.where(self.running, torch.nan))
        self.validation.append(validation.where(self.running, torch.nan))
        better = self.running & (validation < self.best_loss)
        self.best_loss = validation.where(better, self.best_loss)
        self.best_step.masked_fill_(better, step)
        self.best = values.where(better[:, None], self.best)
        self.running &= (validation < torch.inf) & ~(better & (validation <= self.goal))
