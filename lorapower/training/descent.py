"""Descent of one network's adapters on given samples: by L-BFGS, or by Levenberg–Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, get_args

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks, randomness
from ..adapters import Adapters
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import LinearNetwork, product
from ._free import Free, Pair, labelled
from ._task import require_relu_end
from .tuning import Loss

# `minimize` starts from so many random factors and takes at most so many iterations.
STARTS, ITERATIONS = 16, 2000
# `descend` looks at the validation error after so many iterations, and ends after so many looks
# that did not lower it by this share.
CHUNK, PATIENCE, PROGRESS = 25, 4, 1e-3
# `newton` tunes at most so many numbers, since it solves a linear system in them.
LARGEST_SYSTEM = 4096


@torch.enable_grad()
def settle(
    loss: Callable[..., Tensor],
    *starts: Tensor,
    iterations: int = 20_000,
    history: int = 20,
    look: Callable[[list[Tensor]], None] | None = None,
) -> scipy.optimize.OptimizeResult:
    """Descend by scipy's L-BFGS from given tensors, until nothing moves or for so many iterations.

    ``loss`` takes as many tensors and is differentiable with torch. The method keeps ``history``
    pairs of steps and changes of the slope. ``look`` is called with the tensors after each
    iteration and may end the descent by raising `StopIteration`. What is returned has the last
    tensors as ``parts``, the loss there as ``loss``, and the largest entry of its slope as
    ``slope``.
    """
    sizes = [start.numel() for start in starts]

    def shape(flat: NDArray[np.float64]) -> list[Tensor]:
        parts = torch.from_numpy(flat.copy()).split(sizes)
        pairs = zip(parts, starts, strict=True)
        return [part.to(start.dtype).reshape(start.shape) for part, start in pairs]

    def value_and_slope(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        parts = [part.requires_grad_() for part in shape(flat)]
        value = loss(*parts)
        slopes = torch.autograd.grad(value, parts)
        return value.item(), torch.cat([slope.flatten() for slope in slopes]).double().numpy()

    start = torch.cat([start.detach().flatten() for start in starts]).double().numpy()
    limits: dict[str, Any] = {"maxiter": iterations, "maxfun": 3 * iterations, "maxcor": history}
    limits |= {"ftol": 1e-30, "gtol": 1e-13}
    callback = None if look is None else (lambda flat: look(shape(flat)))
    end = scipy.optimize.minimize(
        value_and_slope, start, jac=True, method="L-BFGS-B", options=limits, callback=callback
    )
    end.parts, end.loss, end.slope = shape(end.x), float(end.fun), float(np.abs(end.jac).max())
    return end


@torch.no_grad()
@_checks.flushing()
def descend(
    network: Network, adapters: Adapters, training: Pair, validation: Pair, iterations: int = 300
) -> Adapters:
    """Lower the mean squared error by L-BFGS; return the adapters of least validation error.

    All factors and all tuned biases move; no iteration raises the error on ``training``. Each pair
    has inputs of the network and the outputs that it should give. The descent ends before
    ``iterations`` where the error on ``validation`` stops falling. Raises `InputError` for batches
    and for adapters that do not fit the network.
    """
    # Balanced factors share a step alike.
    free = Free.of(network, adapters.balanced())
    fit = labelled(network, "training", training)
    select = labelled(network, "validation", validation)
    if not free.count or not iterations:
        return adapters
    best, least = free.start, float(free.error(free.start, select))
    done = waited = 0

    @torch.no_grad()
    def look(tuned: list[Tensor]) -> None:
        nonlocal best, least, done, waited
        done += 1
        if done % CHUNK and done < iterations:
            return
        parts = free.insert(tuned)
        error = float(free.error(parts, select))
        waited = 0 if error < least * (1 - PROGRESS) else waited + 1
        if error < least:
            best, least = parts, error
        if waited == PATIENCE:
            raise StopIteration

    def loss(*tuned: Tensor) -> Tensor:
        return free.error(free.insert(tuned), fit)

    settle(loss, *free.select(free.start), iterations=iterations, history=30, look=look)
    return free.adapters_of(best)


@_checks.flushing()
def minimize(
    frozen: LinearNetwork, target: LinearNetwork, ranks: int | Sequence[int], *, seed: int = 0
) -> Float[Tensor, "*batch starts"]:
    """Find Frobenius errors ``‖∏(W_l + A_l B_lᵀ) − W̄‖_F`` by L-BFGS from 16 random starts.

    It competes with the constructions for linear networks and knows only the error and its
    gradient. Factors start at ``N(0, 0.25²)``; all members and starts are minimized as one sum.
    Raises `InputError` for a rank above a layer's smaller side and for networks that do not fit.
    """
    gap = Gap(frozen, target)
    frozen, target = gap.frozen, gap.target
    ranks = _checks.ranks_per_layer(ranks, [tuple(w.shape[-2:]) for w in frozen.weights])
    draw = partial(randomness.normal, randomness.generator(seed, "starts"), dtype=frozen.dtype)
    factors = [
        0.25 * draw(*frozen.batch_shape, STARTS, size, R).to(frozen.device)
        for weight, R in zip(frozen.weights, ranks, strict=True)
        for size in weight.shape[-2:]
    ]
    goal = target.product().unsqueeze(-3)

    def squared_errors(*factors: Tensor) -> Tensor:
        triples = zip(frozen.weights, factors[::2], factors[1::2], strict=True)
        adapted = [weight.unsqueeze(-3) + A @ B.mT for weight, A, B in triples]
        return (product(adapted) - goal).square().sum((-2, -1))

    if any(ranks):
        end = settle(
            lambda *factors: squared_errors(*factors).sum(),
            *factors,
            iterations=ITERATIONS,
            history=50,
        )
        factors = end.parts
    return squared_errors(*factors).sqrt()


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
) -> tuple[Adapters, Float[Tensor, "points 2"]]:
    """Adapt by scipy's method of Levenberg–Marquardt's kind, with a trust region.

    It lowers the squared errors of all outputs on ``training`` by their derivatives in all tuned
    numbers, in double precision, and converges in few steps near an exact fit; it ends before
    ``iterations`` where nothing moves. Returns the adapters of least error on ``validation``, and
    the mean squared errors, whatever the loss, on ``training`` (first column) and ``validation``,
    before the first iteration and after each one.

    The start may be from `begin`; pairs are as in `descend`. The loss ``"one-sided"``
    [def-one-sided] takes errors before the last ReLU where an output should be positive. Raises
    `InputError` for batches, for adapters that tune more than 4096 numbers, for a one-sided loss of
    networks that do not end with a ReLU or of negative outputs, and for what does not fit.
    """
    _checks.choice("loss", loss, get_args(Loss))
    free = Free.of(network, adapters.balanced())
    pairs = labelled(network, "training", training), labelled(network, "validation", validation)
    one_sided, (x, y) = loss == "one-sided", pairs[0]
    if one_sided:
        require_relu_end(network)
        if y.min() < 0:
            allowed = "outputs of at least 0 for the one-sided loss"
            raise InputError("training", allowed=allowed, given=float(y.min()))
    if free.count > LARGEST_SYSTEM:
        allowed = f"of at most {LARGEST_SYSTEM} numbers, as many as the linear systems have"
        given = f"{free.count} of them"
        raise InputError("adapters", allowed=allowed, given=given, remedy="use descend")

    if not network.sequences:
        # A sample for each member of a batch.
        x, y = x.mT.unsqueeze(-1), y.mT.unsqueeze(-1)

    def residuals(parts: Sequence[Tensor]) -> Tensor:
        tuned = free.merge(parts)
        if not one_sided:
            return (tuned(x) - y).flatten(1)
        before = tuned.without_last_relu()(x)
        return (torch.where(y > 0, before, before.relu()) - y).flatten(1)

    def derivatives(flat: Tensor) -> Tensor:
        # Each sample has its own copies of all that is tuned, so that derivatives stay separate.
        copies = [part.expand(len(x), *part.shape) for part in free.select(free.fill(flat))]
        each = torch.func.jacrev(lambda copies: residuals(free.insert(copies)).sum(0))(copies)
        return torch.cat([d.flatten(2) for d in each], 2).movedim(1, 0).flatten(0, 1)

    def as_tensor(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(y)

    errors, best, least = [], free.start, inf

    def look(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal best, least
        parts = free.fill(as_tensor(intermediate_result.x))
        errors.append(torch.stack([free.error(parts, pair) for pair in pairs]))
        if errors[-1][1] < least:
            best, least = parts, float(errors[-1][1])
        if len(errors) > iterations:
            raise StopIteration

    start = torch.cat([y.new_zeros(0), *(part.flatten() for part in free.select(free.start))])
    look(scipy.optimize.OptimizeResult(x=start.double().numpy()))
    if free.count and iterations:
        scipy.optimize.least_squares(
            lambda flat: residuals(free.fill(as_tensor(flat))).flatten().double().numpy(),
            start.double().numpy(),
            lambda flat: derivatives(as_tensor(flat)).double().numpy(),
            xtol=1e-15,
            ftol=None,
            gtol=None,
            callback=look,
        )
    return free.adapters_of(best), torch.stack(errors)
