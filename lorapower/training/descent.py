"""Descent from given adapters on given samples: by L-BFGS, or by Levenberg–Marquardt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from ..adapters.core import Adapters
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import LinearNetwork, product
from ._free import Free, Pair, Parts, labelled, lbfgs, require_fit, require_relu_end
from .tuning import Loss

# Of L-BFGS: iterations between two looks at the validation error, looks without progress that end
# it, and the least relative progress.
CHUNK, PATIENCE, STILL = 25, 4, 1e-3
# `newton` tunes at most so many numbers, since it solves a linear system in them.
LARGEST_SYSTEM = 4096
# Derivatives held at a time; first and last damping, in units of the largest second derivative.
CHUNK_OF_DERIVATIVES, DAMPING, LARGEST_DAMPING = 2**22, 1e-3, 1e12


@torch.no_grad()
@_checks.flushing()
def descend(
    network: Network, adapters: Adapters, training: Pair, validation: Pair, iterations: int = 300
) -> Adapters:
    """Adapters of the least error on ``validation`` on the way of L-BFGS on the mean squared error.

    All factors and all tuned biases move; no iteration raises the error on ``training``. Each pair
    has inputs of the network and the outputs that it should give. It ends before ``iterations``
    where the error on ``validation`` stops falling. Raises `InputError` for batches and for
    adapters that do not fit the network.
    """
    require_fit(network, adapters)
    iterations = _checks.integer("iterations", iterations, 0)
    pairs = [labelled(network, "training", training), labelled(network, "validation", validation)]
    free = Free.of(network, adapters, balanced=True)
    if not free.count:
        return adapters
    best, _ = _best(free, _quasi_newton(free, pairs[0], iterations), pairs, PATIENCE)
    return free.adapters_of(best)


@dataclass(frozen=True, eq=False, repr=False)
class Newton:
    """The adapters of `newton`, of least error on the validation samples, and its course.

    The losses are mean squared errors, whatever the loss, before the first iteration and after each
    one. A member of a batch that has ended repeats its last ones.
    """

    adapters: Adapters
    training_loss: Float[Tensor, "*batch points"]
    validation_loss: Float[Tensor, "*batch points"]

    def __repr__(self) -> str:
        (*batch, points) = self.training_loss.shape
        return f"Newton({self.adapters}, batch {batch}, {points - 1} iterations)"


@torch.no_grad()
@_checks.flushing()
def newton(
    network: Network,
    adapters: Adapters,
    training: Pair,
    validation: Pair,
    iterations: int = 50,
    *,
    loss: Loss = "squared",
) -> Newton:
    """Adapters after Levenberg–Marquardt: each step solves ``(JᵀJ + λI) δ = −Jᵀ r``.

    ``r`` are the errors of all outputs on ``training`` and ``J`` their derivatives in all tuned
    numbers. The damping ``λ`` (Nielsen's) falls where a step does what its linear model predicts,
    and rises where it does not; a step that raises the loss on ``training`` is not taken. Near an
    exact fit it converges in few steps; it ends before ``iterations`` where no damping helps. All
    is computed in the network's precision.

    The start may be from `begin`. Pairs are as in `descend`; members of a batch share one or have
    their own, and are adapted one by one. The loss ``"one-sided"`` [def-one-sided] takes errors
    before the last ReLU where an output should be positive. Raises `InputError` for adapters that
    tune more than 4096 numbers, for a one-sided loss of networks that do not end with a ReLU or of
    negative outputs, and for what does not fit.
    """
    require_fit(network, adapters, single=False)
    iterations = _checks.integer("iterations", iterations, 0)
    _checks.choice("loss", loss, get_args(Loss))
    shapes = [network.batch_shape, adapters.batch_shape]
    batch = _checks.common_shape("network and adapters", shapes)
    if not prod(batch):
        raise InputError("network", allowed="at least one", given=f"batch shape {tuple(batch)}")
    pairs = {
        "training": labelled(network, "training", training),
        "validation": labelled(network, "validation", validation),
    }
    one_sided = loss == "one-sided"
    if one_sided:
        require_relu_end(network)
    samples = [_spread(network, name, pair, batch, one_sided) for name, pair in pairs.items()]
    members = []
    for index in itertools.product(*map(range, batch)):
        free = Free.of(
            network[index] if network.batch_shape else network,
            adapters[index] if adapters.batch_shape else adapters,
            balanced=True,
        )
        if free.count > LARGEST_SYSTEM:
            allowed = f"of at most {LARGEST_SYSTEM} numbers, as many as the linear systems have"
            given = f"{free.count} of them"
            raise InputError("adapters", allowed=allowed, given=given, remedy="use descend")
        members.append((free, [(x[index], y[index]) for x, y in samples]))
    if len({tuple(part.shape for part in free.start) for free, _ in members}) > 1:
        raise InputError("adapters", allowed="of equal ranks in all members", given=adapters)
    found = [
        _best(free, _marquardt(free, pairs[0], iterations, one_sided), pairs)
        for free, pairs in members
    ]

    def stack(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([*values]).reshape(*batch, *values[0].shape)

    together = [stack(parts) for parts in zip(*(best for best, _ in found), strict=True)]
    errors = stack([torch.cat([e, e[-1:].expand(iterations + 1 - len(e), 2)]) for _, e in found])
    # Members may tune different biases.
    tuned = replace(members[0][0].adapters_of(together), tuned=adapters.tuned)
    return Newton(tuned, errors[..., 0], errors[..., 1])


@_checks.flushing()
def minimize(
    frozen: LinearNetwork,
    target: LinearNetwork,
    ranks: int | Sequence[int],
    *,
    starts: int = 16,
    iterations: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "*batch starts"]:
    """Frobenius errors ``‖∏(W_l + A_l B_lᵀ) − W̄‖_F`` that L-BFGS reaches from random factors.

    It competes with the constructions for linear networks and knows only the error and its
    gradient. Factors start at ``N(0, 0.25²)``; all members and starts are minimized as one sum.
    Raises `InputError` for a rank above a layer's smaller side and for networks that do not fit.
    """
    frozen, target = LinearNetwork.of(frozen), LinearNetwork.of(target)
    Gap(frozen, target)  # refuses what does not fit
    starts = _checks.integer("starts", starts, 1)
    iterations = _checks.integer("iterations", iterations, 1)
    ranks = _checks.ranks_per_layer(ranks, [tuple(w.shape[-2:]) for w in frozen.weights])
    generator = randomness.generator(seed, "starts")
    draw = partial(randomness.normal, generator, dtype=frozen.dtype, device=frozen.device)
    factors = [
        [0.25 * draw(*frozen.batch_shape, starts, size, R) for size in weight.shape[-2:]]
        for weight, R in zip(frozen.weights, ranks, strict=True)
    ]
    whole = target.product().unsqueeze(-3)

    def squared_errors() -> Tensor:
        adapted = [
            weight.unsqueeze(-3) + A @ B.mT
            for weight, (A, B) in zip(frozen.weights, factors, strict=True)
        ]
        return (product(adapted) - whole).square().sum((-2, -1))

    flat = [factor for pair in factors for factor in pair]
    if any(factor.numel() for factor in flat):
        lbfgs(flat, lambda: squared_errors().sum(), 50, max_eval=2 * iterations)(iterations)
    return squared_errors().detach().sqrt()


def _best(
    free: Free, course: Iterable[Parts], pairs: Sequence[Pair], patience: float = inf
) -> tuple[list[Tensor], Float[Tensor, "points pairs"]]:
    """Parts of least error on the second pair, and all errors, until ``patience`` runs out."""
    errors, best, waited = [], [*free.start], 0
    least = inf
    for parts in course:
        errors.append(torch.stack([free.error(parts, pair) for pair in pairs]))
        now = float(errors[-1][1])
        waited = 0 if now < least * (1 - STILL) or len(errors) == 1 else waited + 1
        if now < least:
            least, best = now, [part.detach().clone() for part in parts]
        if waited == patience:
            break
    return best, torch.stack(errors)


def _quasi_newton(free: Free, pair: Pair, iterations: int) -> Iterator[Parts]:
    """The course of L-BFGS, from the start on."""
    parts = [part.clone(memory_format=torch.contiguous_format) for part in free.start]
    advance = lbfgs(free.select(parts), lambda: free.error(parts, pair), 30, tolerance_grad=0)
    yield parts
    for done in range(0, iterations, CHUNK):
        advance(min(CHUNK, iterations - done))
        yield parts


def _marquardt(free: Free, pair: Pair, iterations: int, one_sided: bool) -> Iterator[Parts]:
    """The course of Levenberg–Marquardt, from the start on."""

    def objective(parts: Parts) -> Tensor:
        return _errors(free, parts, pair, one_sided).square().mean()

    parts, value = [*free.start], objective(free.start)
    yield parts
    size, damping, growth = 0.0, 0.0, 2.0
    for done in range(iterations if free.count else 0):
        slope, curvature = _model(free, parts, pair, one_sided)
        if not done:
            size = float(curvature.diagonal().amax())
            damping = DAMPING * size
        # If no error depends on any parameter, there is nothing to do.
        while size and damping <= LARGEST_DAMPING * size:
            system = curvature + damping * torch.eye(len(slope)).to(slope)
            factor, singular = torch.linalg.cholesky_ex(system)
            if not singular:
                step = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
                tried = free.move(parts, step)
                new = objective(tried)
                if new < value:
                    gain = float(value - new) / float(step @ (damping * step - slope))
                    damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                    break
            damping, growth = damping * growth, 2 * growth
        else:
            return
        parts, value = tried, new
        yield parts


def _errors(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> Tensor:
    """Errors of all outputs, before the last ReLU where an output should be positive."""
    x, y = pair
    if not one_sided:
        return free.merge(parts)(x) - y
    before = free.merge(parts, last_relu=False)(x)
    return torch.where(y > 0, before, before.relu()) - y


def _model(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Half of slope and curvature of the mean squared error, ``Jᵀr`` and ``JᵀJ`` over its terms."""
    x, y = pair if free.network.sequences else tuple(part.mT.unsqueeze(-1) for part in pair)
    size = max(1, CHUNK_OF_DERIVATIVES // max(1, y[0].numel() * free.count))
    slope = y.new_zeros(free.count)
    curvature = y.new_zeros(free.count, free.count)
    for samples in zip(x.split(size), y.split(size), strict=True):

        def errors(copies: Any, samples: Any = samples) -> tuple[Tensor, Tensor]:
            each = _errors(free, free.insert(copies), samples, one_sided).flatten(1)
            return each.sum(0), each

        # Each sample has its own copies of all that is tuned, so that derivatives stay separate.
        count = len(samples[0])
        copies = [part.expand(count, *part.shape) for part in free.select(parts)]
        derivatives, missed = torch.func.jacrev(errors, has_aux=True)(copies)
        J = torch.cat([d.flatten(2) for d in derivatives], 2).movedim(1, 0).flatten(0, 1)
        slope += missed.flatten() @ J
        curvature += J.mT @ J
    return slope / y.numel(), curvature / y.numel()


def _spread(network: Network, name: str, pair: Pair, batch: torch.Size, one_sided: bool) -> Pair:
    """Samples for each member of a batch; outputs of at least 0 where the loss is one-sided."""
    if one_sided and pair[1].min() < 0:
        allowed = "outputs of at least 0 for the one-sided loss"
        raise InputError(name, allowed=allowed, given=float(pair[1].min()))
    dims = 3 if network.sequences else 2
    shapes = [tuple(part.shape[: part.ndim - dims]) for part in pair]
    if _checks.common_shape(f"batch and {name}", [batch, *shapes]) != batch:
        allowed = f"of a batch shape that broadcasts to {tuple(batch)}"
        raise InputError(name, allowed=allowed, given=shapes[0])
    x, y = (part.expand(*batch, *part.shape[part.ndim - dims :]) for part in pair)
    return x, y
