"""Descent by L-BFGS: of any loss, and of one network's adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..lowrank import LowRank
from ..networks.base import Network

# `descend` looks at the validation error after so many iterations, and ends after so many looks
# that did not lower it by this share.
CHUNK, PATIENCE, PROGRESS = 25, 4, 1e-3

# Inputs and outputs.
Pair = tuple[Tensor, Tensor]


@torch.enable_grad()
def lbfgs(
    loss: Callable[..., Tensor],
    *starts: Tensor,
    iterations: int = 20_000,
    history: int = 20,
    look: Callable[[list[Tensor]], None] | None = None,
) -> scipy.optimize.OptimizeResult:
    """Descend by scipy's L-BFGS from given tensors, until nothing moves or for so many iterations.

    ``loss`` takes as many tensors and is differentiable with torch; what it does not use stays. The
    method keeps ``history`` pairs of steps and changes of the slope. ``look`` is called with the
    tensors after each iteration and may end the descent by raising `StopIteration`. What is
    returned has the last tensors as ``parts``, the loss there as ``loss``, and the largest entry of
    its slope as ``slope``.

    Examples
    --------
    The best product of rank 1 for a diagonal matrix keeps its largest entry:

    >>> import torch
    >>> from lorapower.training import lbfgs
    >>> target, start = torch.diag(torch.tensor([3.0, 1.0]).double()), torch.ones(2, 1).double()
    >>> end = lbfgs(lambda A, B: (A @ B.T - target).square().sum(), start, 2 * start)
    >>> round(end.loss, 6)
    1.0
    """
    sizes = [start.numel() for start in starts]

    def shape(flat: NDArray[np.float64]) -> list[Tensor]:
        parts = torch.from_numpy(flat.copy()).split(sizes)
        pairs = zip(parts, starts, strict=True)
        return [part.to(start.dtype).reshape(start.shape) for part, start in pairs]

    def value_and_slope(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        parts = [part.requires_grad_() for part in shape(flat)]
        value = loss(*parts)
        slopes = torch.autograd.grad(value, parts, materialize_grads=True)
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
    has inputs of the network and the outputs that it should give, and all is of one type. The
    descent ends before ``iterations`` where the error on ``validation`` stops falling.
    """
    # Balanced factors share a step alike.
    factors = [f for u in adapters.balanced().updates for f in (u.left, u.right)]
    count, start = len(factors), [*factors, *adapters.bias_updates]
    moves = [True] * len(start)
    if adapters.tuned is not None and adapters.bias_updates:
        moves[count:] = adapters.tuned.biases.tolist()
    if not iterations or not any(part.numel() for part in compress(start, moves)):
        return adapters

    def error(pair: Pair, parts: Sequence[Tensor]) -> Tensor:
        triples = zip(network.weights, parts[:count:2], parts[1:count:2], strict=True)
        # There are no changes where no bias is tuned.
        biases = [b + change for b, change in zip(network.biases, parts[count:], strict=False)]
        weights = [W + A @ B.mT for W, A, B in triples]
        tuned = network.with_parameters(weights, biases or None, checked=False)
        return (tuned(pair[0]) - pair[1]).square().mean()

    best, least = start, float(error(validation, start))
    done = waited = 0

    @torch.no_grad()
    def look(parts: list[Tensor]) -> None:
        nonlocal best, least, done, waited
        done += 1
        if done % CHUNK and done < iterations:
            return
        now = float(error(validation, parts))
        waited = 0 if now < least * (1 - PROGRESS) else waited + 1
        if now < least:
            best, least = parts, now
        if waited == PATIENCE:
            raise StopIteration

    def loss(*parts: Tensor) -> Tensor:
        pairs = zip(parts, start, moves, strict=True)
        return error(training, [part if moving else first for part, first, moving in pairs])

    lbfgs(loss, *start, iterations=iterations, history=30, look=look)
    updates = map(LowRank, best[:count:2], best[1:count:2])
    return Adapters(tuple(updates), tuple(best[count:]), adapters.tuned)
