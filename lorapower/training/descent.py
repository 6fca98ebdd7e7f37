"""Descent of one network's adapters on given samples: by L-BFGS, or by Levenberg–Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from ._free import Free, Pair, Parts, labelled
from ._task import require_relu_end
from .tuning import Loss

# `minimize` starts from so many random factors and takes at most so many iterations.
STARTS, ITERATIONS = 16, 2000
# `descend` looks at the validation error after so many iterations, and ends after so many looks
# that did not lower it by this share.
CHUNK, PATIENCE, PROGRESS = 25, 4, 1e-3
# `newton` tunes at most so many numbers, since it solves a linear system in them.
LARGEST_SYSTEM = 4096
# Derivatives held at a time; first and last damping, in units of the largest second derivative.
CHUNK_OF_DERIVATIVES, DAMPING, LARGEST_DAMPING = 2**22, 1e-3, 1e12


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
    """Adapt by Levenberg–Marquardt: each step solves ``(JᵀJ + λI) δ = −Jᵀ r``.

    ``r`` are the errors of all outputs on ``training`` and ``J`` their derivatives in all tuned
    numbers. The damping ``λ`` (Nielsen's) falls where a step does what its linear model predicts,
    and rises where it does not; a step that raises the loss on ``training`` is not taken. Near an
    exact fit it converges in few steps; it ends before ``iterations`` where no damping helps. All
    is computed in the network's precision. Returns the adapters of least error on ``validation``,
    and the mean squared errors, whatever the loss, on ``training`` (first column) and
    ``validation``, before the first iteration and after each one.

    The start may be from `begin`; pairs are as in `descend`. The loss ``"one-sided"``
    [def-one-sided] takes errors before the last ReLU where an output should be positive. Raises
    `InputError` for batches, for adapters that tune more than 4096 numbers, for a one-sided loss of
    networks that do not end with a ReLU or of negative outputs, and for what does not fit.
    """
    _checks.choice("loss", loss, get_args(Loss))
    free = Free.of(network, adapters.balanced())
    pairs = labelled(network, "training", training), labelled(network, "validation", validation)
    one_sided = loss == "one-sided"
    if one_sided:
        require_relu_end(network)
        if pairs[0][1].min() < 0:
            allowed = "outputs of at least 0 for the one-sided loss"
            raise InputError("training", allowed=allowed, given=float(pairs[0][1].min()))
    if free.count > LARGEST_SYSTEM:
        allowed = f"of at most {LARGEST_SYSTEM} numbers, as many as the linear systems have"
        given = f"{free.count} of them"
        raise InputError("adapters", allowed=allowed, given=given, remedy="use descend")
    errors, best, least = [], free.start, inf
    for parts in _marquardt(free, pairs[0], iterations, one_sided):
        errors.append(torch.stack([free.error(parts, pair) for pair in pairs]))
        if errors[-1][1] < least:
            best, least = parts, float(errors[-1][1])
    return free.adapters_of(best), torch.stack(errors)


def _marquardt(free: Free, pair: Pair, iterations: int, one_sided: bool) -> Iterator[Parts]:
    """Yield the parts on the course of Levenberg–Marquardt, from the start on."""

    def objective(parts: Parts) -> Tensor:
        return _residuals(free, parts, pair, one_sided).square().mean()

    parts, value = free.start, objective(free.start)
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


def _residuals(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> Tensor:
    """Compute errors of all outputs, before the last ReLU where an output should be positive."""
    network, (x, y) = free.merge(parts), pair
    if not one_sided:
        return network(x) - y
    before = network.without_last_relu()(x)
    return torch.where(y > 0, before, before.relu()) - y


def _model(free: Free, parts: Parts, pair: Pair, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Compute ``Jᵀr`` and ``JᵀJ`` over the number of residuals."""
    x, y = pair if free.network.sequences else tuple(part.mT.unsqueeze(-1) for part in pair)
    size = max(1, CHUNK_OF_DERIVATIVES // (y[0].numel() * free.count))
    slope = y.new_zeros(free.count)
    curvature = y.new_zeros(free.count, free.count)
    for samples in zip(x.split(size), y.split(size), strict=True):

        def residuals(copies: Any, samples: Any = samples) -> tuple[Tensor, Tensor]:
            each = _residuals(free, free.insert(copies), samples, one_sided).flatten(1)
            return each.sum(0), each

        # Each sample has its own copies of all that is tuned, so that derivatives stay separate.
        count = len(samples[0])
        copies = [part.expand(count, *part.shape) for part in free.select(parts)]
        derivatives, values = torch.func.jacrev(residuals, has_aux=True)(copies)
        J = torch.cat([d.flatten(2) for d in derivatives], 2).movedim(1, 0).flatten(0, 1)
        slope += values.flatten() @ J
        curvature += J.mT @ J
    return slope / y.numel(), curvature / y.numel()
