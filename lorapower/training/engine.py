"""Gradient training of many adapters at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..adapters import Adapters, N, Tuned
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from . import _reference, _steps
from ._starts import put_starts
from ._state import Batch, Stack, State, require_relu_end
from .tuning import Data, Training, Tuning

# The first call of compiled code compiles it, which must not happen in several threads at once.
_FIRST = Lock()


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

    Each of ``tunings`` runs on each frozen network, and its result does not depend on the other
    runs. All see the same inputs, and runs of one network share their first factors, of which a run
    of rank ``R`` has the first ``R`` columns. ``seed`` draws the first factors: one seed for the
    whole batch, or one for each member. The validation loss is taken every ``every`` steps. Results
    lie on the frozen network's device.

    Training runs on all processors and gives the same wherever it is repeated. Chains of layers and
    plain transformers have gradients of their own in compiled code; other transformers are slower.

    Raises `InputError` where there are no tunings, for ranks or layers out of range, for data that
    does not fit the network or the loss, and for a loss or start that the network does not have.
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
    stack, state = _prepare(frozen, tunings, data, classes, seed, steps, every, until)
    _run(stack, state)
    return _results(stack, state)


@torch.no_grad()
@_checks.flushing()
def begin(
    frozen: Network,
    tunings: Sequence[Tuning],
    data: Data,
    *,
    classes: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
) -> Adapters:
    """Return the adapters that `train` starts from, given the same.

    They have batch shape ``[tunings, *batch]`` and single precision; ``[0]``, of the first tuning,
    is a start for `newton` and `descend`. Raises what `train` raises.
    """
    return _results(*_prepare(frozen, tunings, data, classes, seed)).adapters


def _prepare(
    frozen: Network,
    tunings: Sequence[Tuning],
    data: Data,
    classes: Sequence[int],
    seed: int | Sequence[int],
    steps: int = 1,
    every: int = 1,
    until: float = 0.0,
) -> tuple[Stack, State]:
    """Make all runs at their starts."""
    _checks.kind(Network, frozen=frozen)
    until = _checks.tolerance("until", until)
    if isinstance(tunings, Tuning) or not tunings:
        allowed = "a list of Tuning, such as [Tuning(ranks=4)]"
        raise InputError("tunings", allowed=allowed, value=tunings)
    one_sided = any(tuning.loss == "one-sided" for tuning in tunings)
    if one_sided:
        require_relu_end(frozen, classes)
    stack = Stack(frozen, data, classes, one_sided)
    seeds = seed if isinstance(seed, Sequence) else [seed] * stack.members
    if len(seeds) != stack.members:
        allowed = f"one, or one for each of {stack.members} networks"
        raise InputError("seed", allowed=allowed, given=len(seeds))
    state = stack.state(tunings, [*map(_checks.seed, seeds)], steps, every, until)
    put_starts(stack, state, tunings)
    return stack, state


def _run(stack: Stack, state: State) -> None:
    """Take all steps, on all processors by a kernel or, where there is none, by torch."""
    # Only some systems say which processors this process may use.
    has_affinity = hasattr(os, "sched_getaffinity")
    threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    runs = np.arange(len(state.frozen.network))
    # More parts than threads: runs differ in cost.
    parts = np.array_split(runs, min(4 * threads, len(runs)))
    structure, network = state.structure, stack.network.to(device="cpu")
    validation = Batch.of(*stack.validation, structure)
    with ThreadPoolExecutor(threads, initializer=_checks.flush) as pool:
        for start, x, y in stack.blocks(structure.steps):
            if stack.has_kernel:
                batches = Batch.of(x, y, structure)
                advance = partial(_steps.advance, state, batches, validation, start)
                if start == 0:
                    with _FIRST:
                        advance(runs[:0])
                list(pool.map(advance, parts))
            else:
                _reference.advance(network, state, (x, y), stack.validation, start)
            if state.course.stopped.all():
                break


def _results(stack: Stack, state: State) -> Training[Any]:
    """Return the runs' parameters and networks at the least validation loss of each."""
    network = stack.network

    def shape(values: Any) -> Tensor:
        values = torch.as_tensor(values, device=network.device)
        return values.reshape(-1, *network.batch_shape, *values.shape[1:])

    frozen, course = state.frozen, state.course
    A, B, b = map(shape, state.best)
    full = shape(frozen.ranks < 0)
    updates, weights = [], []
    for m, (outer, inner) in enumerate(stack.shapes):
        rows = slice(0, min(outer, inner))
        adapted = ~full[..., m, None, None]
        # Rows past a run's rank hold zeros in A.
        left, right = A[..., m, rows, :outer] * adapted, B[..., m, rows, :inner] * adapted
        updates.append(LowRank(left.mT, right.mT))
        sums = network.weights[m] + updates[m].matrix()
        weights.append(torch.where(adapted, sums, A[..., m, :outer, :inner]))
    biases = [b[..., l, : old.shape[-1]] for l, old in enumerate(stack.biases)]
    if frozen.centre.any():
        centres = shape(frozen.centre).double().unbind(-2)
        for l, (W, centre) in enumerate(zip(weights, centres, strict=True)):
            moved = W.double() @ centre[..., : W.shape[-1], None]
            biases[l] = biases[l] - moved.squeeze(-1).to(b)
    changes = tuple(new - old for new, old in zip(biases, stack.biases, strict=True))
    tuned = Tuned(shape(frozen.ranks.clip(0)), shape(frozen.biases)[..., : len(biases)])
    best = shape(course.best_loss)
    return Training(
        network.with_parameters(weights, biases),
        Adapters.trimmed(updates, changes, tuned),
        steps=torch.arange(course.training.shape[1], device=best.device) * state.structure.every,
        training_loss=shape(course.training),
        validation_loss=shape(course.validation),
        best_loss=best,
        best_step=shape(course.best_step),
        diverged=shape(course.stopped) & ~(best <= shape(course.goal)),
    )
