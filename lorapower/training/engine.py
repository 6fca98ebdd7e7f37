"""Gradient training of many adapters at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Integral
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters, N
from ..errors import InputError
from ..networks.base import Network
from . import _compiled, _reference
from ._compiled import State, Structure
from ._free import require_relu_end
from ._stack import Batches, Stack, put_starts
from .tuning import Data, Training, Tuning

# The first call of compiled code compiles it, which must not happen in several threads at once.
_FIRST = Lock()


@torch.no_grad()
@_checks.flushing()
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
    backend: Literal["compiled", "torch"] | None = None,
    device: str | torch.device | None = None,
) -> Training[N]:
    """Tune adapters, final layers or whole networks by Adam, all runs at once, in single precision.

    Each of ``tunings`` runs on each frozen network, and its result does not depend on the other
    runs. Runs of one network see the same inputs and share their first factors, of which a run of
    rank ``R`` has the first ``R`` columns. ``data``, and the ``seed`` of factors, are one for all
    members of the batch or one for each. The validation loss is taken every ``every``
    steps. Results lie on the frozen network's device.

    Raises `InputError` where there are no tunings, for ranks or layers out of range, for data that
    does not fit the network or the loss, for a loss or start that the network does not have, and
    for values without a meaning. Source: the protocol of the study's experiments.

    Parameters
    ----------
    classes : sequence of int
        The class, from 0, to which each output votes, −1 for none. The softmax of the votes, summed
        over outputs and tokens, is compared with the label by cross-entropy. Without classes the
        loss is the mean squared error over outputs, tokens and samples.
    until : float
        A run ends when its validation loss is at most this part of the one before the first step.
    threads : int, optional
        Runs that advance at a time, by default one on each processor.
    backend : {"compiled", "torch"}, optional
        ``"compiled"`` code for processors, the default, gives the same wherever a run is repeated;
        it does not cover residual transformers. ``"torch"`` does the same, slowly on processors, on
        a ``device`` that is by default the frozen network's.
    """
    steps = _checks.integer("steps", steps, 1)
    every = _checks.integer("every", every, 1, steps, limit="the steps")
    until = _checks.tolerance("until", until)
    if threads is None:
        # Only some systems say which processors this process may use.
        limited = hasattr(os, "sched_getaffinity")
        threads = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    threads = _checks.integer("threads", threads, 1)
    points = steps // every + 1
    stack, structure, state, batches = _ready(
        frozen, tunings, data, seed, classes, steps=steps, points=points, until=until
    )
    engine, place = _backend(backend, device, stack)
    if engine == "compiled":
        _run_compiled(structure, state, batches, steps, every, threads)
    else:
        _run_torch(stack.network, structure, state, batches, steps, every, place)
    return stack.training(state, every)


@torch.no_grad()
@_checks.flushing()
def begin(
    frozen: Network,
    tunings: Sequence[Tuning],
    data: Data | Sequence[Data],
    *,
    classes: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
) -> Adapters:
    """The adapters that `train` starts from, given the same; batch shape ``[tunings, *batch]``.

    In single precision; ``[0]``, of the first tuning, is a start for `newton` and `descend`. Raises
    what `train` raises.
    """
    stack, _, state, _ = _ready(frozen, tunings, data, seed, classes)
    return stack.training(state, 1).adapters


def _ready(
    frozen: N,
    tunings: Sequence[Tuning],
    data: Data | Sequence[Data],
    seed: int | Sequence[int],
    classes: Sequence[int],
    *,
    steps: int = 1,
    points: int = 2,
    until: float = 0.0,
) -> tuple[Stack[N], Structure, Any, Batches]:
    """All runs at their starts, with room for so many points of their loss curves."""
    # The third part is a `State`; checks at run time cannot check one within a tuple.
    _checks.kind(Network, frozen=frozen)
    stack = Stack(frozen)
    seeds = [_checks.seed(each) for each in _for_each("seed", seed, Integral, stack.members)]
    sources = _for_each("data", data, Data, stack.members)
    is_list = isinstance(tunings, Sequence) and bool(tunings)
    if not is_list or not all(isinstance(tuning, Tuning) for tuning in tunings):
        allowed = "a list of Tuning, such as [Tuning(ranks=4)]"
        raise InputError("tunings", allowed=allowed, value=tunings)
    one_sided = any(tuning.loss == "one-sided" for tuning in tunings)
    if one_sided:
        require_relu_end(frozen, classes)
    batches = Batches(sources, stack, classes, one_sided)
    structure = stack.structure(batches, steps)
    state = stack.state(tunings, seeds, batches.sources, points, until)
    put_starts(stack, structure, state, tunings, batches)
    return stack, structure, state, batches


def _for_each(name: str, given: Any, kind: type, members: int) -> list[Any]:
    """One value for each member of the batch, from one for all or as many."""
    values = [given] * members if isinstance(given, kind) else given
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise InputError(name, allowed=f"one {kind.__name__}, or several", value=given)
    if len(values) != members:
        allowed = f"one, or one for each of {members} networks"
        raise InputError(name, allowed=allowed, given=len(values))
    return list(values)


def _backend(
    backend: str | None, device: str | torch.device | None, stack: Stack[Any]
) -> tuple[str, torch.device]:
    """The backend and device that were asked for, or those that suit this kind of network."""
    if backend is None:
        backend = "compiled" if stack.is_covered else "torch"
    _checks.choice("backend", backend, ("compiled", "torch"))
    place = stack.network.device if device is None else _checks.device(device)
    if backend == "compiled" and not stack.is_covered:
        raise InputError("backend", allowed="'torch' for residual transformers", given=backend)
    if backend == "compiled" and device is not None and place.type != "cpu":
        remedy = "choose backend='torch' for another"
        raise InputError("device", allowed="cpu for compiled code", given=place, remedy=remedy)
    return backend, place


def _run_compiled(
    structure: Structure, state: State[Any], batches: Batches, steps: int, every: int, threads: int
) -> None:
    runs = np.arange(len(state.problem))
    # More parts than threads: runs differ in cost.
    parts = [part for part in np.array_split(runs, 4 * threads) if len(part)]
    scratch = _compiled.scratch(structure, *state.frozen.shape[1:3])
    x_others, y_others = (_compiled.tiles(part, structure) for part in batches.validation)
    samples, others = (part[0].shape[-1] for part in (batches.first, batches.validation))

    def advance(part: Any, x: Any, y: Any, start: int) -> None:
        work = np.empty(scratch, np.float32)
        _compiled.advance(
            structure, state, part, x, y, samples, x_others, y_others, others, start, every, work
        )

    with ThreadPoolExecutor(threads, initializer=_checks.flush) as pool:
        for start, *block in batches.blocks(steps):
            x, y = (_compiled.tiles(part, structure) for part in block)
            if start == 0:
                with _FIRST:
                    advance(runs[:0], x, y, start)
            list(pool.map(partial(advance, x=x, y=y, start=start), parts))
            if state.stopped.all():
                break


def _run_torch(
    network: Network,
    structure: Structure,
    state: State[Any],
    batches: Batches,
    steps: int,
    every: int,
    device: torch.device,
) -> None:
    there: State[Tensor] = State(*(torch.from_numpy(part).to(device) for part in state))
    x_validation, y_validation = (part.to(device) for part in batches.validation)
    for start, *block in batches.blocks(steps):
        x, y = (part.to(device) for part in block)
        _reference.advance(
            network, structure, there, x, y, x_validation, y_validation, start, every
        )
        if there.stopped.all():
            break
    for part, result in zip(state, there, strict=True):
        part[...] = result.cpu().numpy()
