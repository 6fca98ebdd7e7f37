"""Descent from given adapters on given samples: by L-BFGS, or by Levenberg–Marquardt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks
from .._subnormal import flushing
from ..adapters.core import Adapters
from ..errors import InputError
from ..networks.base import Network
from .free import Free, Parts, labelled
from .tuning import Loss, require_relu_end

Pair = tuple[Tensor, Tensor]
# After so many iterations the held-out error is looked at; it may stand still so many times.
CHUNK, PATIENCE, STILL = 25, 4, 1e-3
# Numbers that `newton` tunes, at most: it solves a linear system of as many.
LARGEST_SYSTEM = 4096
# Derivatives that are held at a time, and the first damping and the last, in units of the largest
# second derivative.
CHUNK_OF_DERIVATIVES, DAMPING, LARGEST_DAMPING = 2**22, 1e-3, 1e12


@torch.no_grad()
@flushing()
def descend(
    network: Network, adapters: Adapters, training: Pair, validation: Pair, iterations: int = 300
) -> Adapters:
    """Adapters after L-BFGS on the mean squared error: the best on ``validation`` that it met.

    All factors move, and the biases that the adapters tune. No iteration makes the error on
    ``training`` larger.

    Raises `InputError` for adapters that do not fit the network, and for batches.

    Parameters
    ----------
    network : Network
        The one that the adapters are for.
    adapters : Adapters
        Where it starts.
    training, validation : Pair
        Inputs as the network takes them, with the outputs that are wanted.
    iterations : int
        At most; it ends before, where the error on ``validation`` stops falling.
    """
    free = Free.of(network, adapters, balanced=True)
    iterations = _checks.integer("iterations", iterations, 0)
    pairs = labelled(network, "training", training), labelled(network, "validation", validation)
    parameters = [part.clone(memory_format=torch.contiguous_format) for part in free.start]
    tuned = [p.requires_grad_() for p, moves in zip(parameters, free.moves, strict=True) if moves]
    if not tuned:
        return adapters

    def loss(pair: Pair) -> Tensor:
        return (free.merged(parameters)(pair[0]) - pair[1]).square().mean()

    optimizer = torch.optim.LBFGS(
        tuned,
        history_size=30,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(pairs[0])
        value.backward()
        return value

    best, kept = float(loss(pairs[1])), [part.detach().clone() for part in parameters]
    waited = 0
    for done in range(0, iterations, CHUNK):
        optimizer.param_groups[0]["max_iter"] = min(CHUNK, iterations - done)
        with torch.enable_grad():
            optimizer.step(closure)
        now = float(loss(pairs[1]))
        waited = 0 if now < best * (1 - STILL) else waited + 1
        if now < best:
            best, kept = now, [part.detach().clone() for part in parameters]
        if waited == PATIENCE:
            break
    return free.adapters_of(kept)


@dataclass(frozen=True, eq=False, repr=False)
class Newton:
    """What `newton` found.

    Attributes
    ----------
    adapters : Adapters
        Those of the least error on the validation samples.
    training_loss, validation_loss : Tensor
        Mean squared errors, whatever the loss, before the first iteration and after each one, those
        of members that have ended before staying as they were.
    """

    adapters: Adapters
    training_loss: Float[Tensor, "*batch points"]
    validation_loss: Float[Tensor, "*batch points"]

    def __repr__(self) -> str:
        (*batch, points) = self.training_loss.shape
        return f"Newton({self.adapters}, batch {batch}, {points - 1} iterations)"


@torch.no_grad()
@flushing()
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

    ``r`` are the errors of all outputs on ``training`` and ``J`` their derivatives in all that is
    tuned. The damping ``λ`` falls where a step does what its linear model says, and rises where it
    does not; a step that makes the loss on ``training`` larger is not taken. Where an exact fit is
    near, it comes to it in few steps.

    Raises `InputError` for adapters that tune more than 4096 numbers, for a one-sided loss of
    networks that do not end with a ReLU or of negative outputs, and for what `descend` refuses.

    Source: the algorithm is that of Marquardt; the damping is Nielsen's.

    Parameters
    ----------
    network, adapters
        The network, and where it starts, such as from `begin`; or batches, whose members are
        adapted one after the other.
    training, validation : Pair
        Pairs of inputs as the network takes them and the outputs that are wanted, such as
        `Fresh.test` gives; for a batch each member's own, or the same. All is computed in the
        network's precision.
    iterations : int
        At most; a member ends before, where no damping helps.
    loss : Loss
        ``"one-sided"`` [def-one-sided] lets errors be those before the last ReLU, where an output
        is to be positive.
    """
    _checks.kind(Network, network=network)
    _checks.kind(Adapters, adapters=adapters)
    adapters.merge(network)
    iterations = _checks.integer("iterations", iterations, 0)
    _checks.choice("loss", loss, get_args(Loss))
    batch = _checks.common_shape(
        "network and adapters", [network.batch_shape, adapters.batch_shape]
    )
    if not prod(batch):
        raise InputError("network", allowed="at least one", given=f"batch shape {tuple(batch)}")
    pairs = labelled(network, "training", training), labelled(network, "validation", validation)
    if loss == "one-sided":
        require_relu_end(network)
    samples = [
        _spread(network, name, pair, batch, loss)
        for name, pair in zip(("training", "validation"), pairs, strict=True)
    ]
    members = []
    for index in product(*map(range, batch)):
        one = network[index] if network.batch_shape else network
        start = adapters[index] if adapters.batch_shape else adapters
        free = Free.of(one, start, balanced=True)
        if free.count > LARGEST_SYSTEM:
            raise InputError(
                "adapters",
                allowed=f"of at most {LARGEST_SYSTEM} numbers, as many as the linear systems have",
                given=f"{free.count} of them",
                remedy="use descend",
            )
        members.append((free, [(x[index], y[index]) for x, y in samples]))
    shapes = {tuple(part.shape for part in free.start) for free, _ in members}
    if len(shapes) > 1:
        raise InputError("adapters", allowed="of equal ranks in all members", given=adapters)
    found = [_newton(free, own, iterations, loss == "one-sided") for free, own in members]

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([*parts]).reshape(*batch, *parts[0].shape)

    parts, curves, held_out = zip(*found, strict=True)
    together = [stacked(each) for each in zip(*parts, strict=True)]
    # Members may tune different biases.
    merged = replace(members[0][0].adapters_of(together), tuned=adapters.tuned)
    return Newton(merged, stacked(curves), stacked(held_out))


def _spread(network: Network, name: str, pair: Pair, batch: torch.Size, loss: Loss) -> Pair:
    """Samples for each member of a batch; outputs of at least 0 where the loss is one-sided."""
    if loss == "one-sided" and pair[1].min() < 0:
        allowed = "outputs of at least 0 for the one-sided loss"
        raise InputError(name, allowed=allowed, given=float(pair[1].min()))
    own = 3 if network.sequences else 2
    shapes = [tuple(part.shape[: part.ndim - own]) for part in pair]
    if _checks.common_shape(f"batch and {name}", [batch, *shapes]) != batch:
        raise InputError(
            name, allowed=f"of a batch shape that broadcasts to {tuple(batch)}", given=shapes[0]
        )
    x, y = (part.expand(*batch, *part.shape[part.ndim - own :]) for part in pair)
    return x, y


def _newton(
    free: Free, pairs: Sequence[Pair], iterations: int, one_sided: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Parts of least validation error, and both errors after each iteration."""
    training, validation = pairs

    def error(parts: Parts, pair: Pair) -> Tensor:
        return (free.merged(parts)(pair[0]) - pair[1]).square().mean()

    def objective(parts: Parts) -> Tensor:
        return _missed(free, parts, training, one_sided).square().mean()

    now, value = [*free.start], objective(free.start)
    best, least = now, error(now, validation)
    curves = [(error(now, training), least)]
    size, damping, growth = 0.0, 0.0, 2.0
    for done in range(iterations if free.count else 0):
        slope, curvature = _model(free, now, training, one_sided)
        if not done:
            size = float(curvature.diagonal().amax())
            damping = DAMPING * size
        # Where no error depends on anything, nothing is to be done.
        while size and damping <= LARGEST_DAMPING * size:
            system = curvature + damping * torch.eye(len(slope)).to(slope)
            factor, singular = torch.linalg.cholesky_ex(system)
            if not singular:
                step = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
                tried = free.moved(now, step)
                new = objective(tried)
                if new < value:
                    gain = float(value - new) / float(step @ (damping * step - slope))
                    damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                    break
            damping, growth = damping * growth, 2 * growth
        else:
            break
        now, value = tried, new
        curves.append((error(now, training), error(now, validation)))
        if curves[-1][1] < least:
            best, least = now, curves[-1][1]
    curves += [curves[-1]] * (iterations + 1 - len(curves))
    of_training, of_validation = (torch.stack(curve) for curve in zip(*curves, strict=True))
    return [*best], of_training, of_validation


def _missed(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> Tensor:
    """Errors of all outputs, of those that are to be positive before the last ReLU."""
    x, y = pair
    if not one_sided:
        return free.merged(parts)(x) - y
    before = free.merged(parts, last_relu=False)(x)
    return torch.where(y > 0, before, before.relu()) - y


def _model(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Half of slope and curvature of the mean squared error, ``Jᵀr`` and ``JᵀJ`` over its terms.

    Each sample has copies of all parts, so that its derivatives come apart from the others'.
    """
    sequences = free.network.sequences
    x, y = pair if sequences else tuple(part.mT.unsqueeze(-1) for part in pair)
    outputs = y[0].numel()
    size = max(1, CHUNK_OF_DERIVATIVES // max(1, outputs * free.count))
    like = free.network.weights[0]
    slope, curvature = like.new_zeros(free.count), like.new_zeros(free.count, free.count)
    for samples in zip(x.split(size), y.split(size), strict=True):
        with torch.enable_grad():
            copies = [part.detach().expand(len(samples[0]), *part.shape).clone() for part in parts]
            tuned = [
                c.requires_grad_() for c, moves in zip(copies, free.moves, strict=True) if moves
            ]
            missed = _missed(free, copies, samples, one_sided).flatten(1)
            derivatives = missed.new_empty(*missed.shape, free.count)
            for k in range(outputs):
                rows = torch.autograd.grad(missed[:, k].sum(), tuned, retain_graph=True)
                derivatives[:, k] = torch.cat([row.flatten(1) for row in rows], 1)
        J = derivatives.flatten(0, 1)
        slope += missed.detach().flatten() @ J
        curvature += J.mT @ J
    return slope / y.numel(), curvature / y.numel()
