"""Descent by L-BFGS of any loss, and the training of fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..constructions.fitted import FittedAdaptation
from ..lowrank import LowRank
from ..regression import relative_error
from .engine import train
from .fused import train_fused
from .tuning import Fixed, Tuning

# `polish` looks at the error on other inputs after so many iterations, and ends after so many looks
# that did not lower it by this share.
CHUNK, PATIENCE, PROGRESS = 25, 4, 1e-3


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
def polish(
    fitted: FittedAdaptation,
    inputs: Tensor,
    held_out: Tensor,
    *,
    iterations: int = 300,
    steps: int = 2000,
    throw: bool = True,
) -> FittedAdaptation:
    """Train all segments of a fit together, and from LoRA's initialization; return the best.

    All factors and biases of the fused network take at most ``iterations`` of L-BFGS from the fit,
    none of which raises the error on ``inputs``. Adam takes ``steps`` from LoRA's initialization,
    in a fused network (`train_fused`) and in the frozen one; 0 leaves it out, and takes a tenth of
    the time. Of the results and the fit, the one of least error on the first half of ``held_out``
    is kept; the other half gives its error. ``fused_adapters`` are the best from the fit, and
    ``fitted`` is what `constructions.adapt_fitted` gave for the same ``inputs`` and ``held_out``.

    Source: the adapters are [def-adapter]'s; nothing is promised but what is measured.
    """
    iterations = _checks.integer("iterations", iterations, 0)
    steps = _checks.integer("steps", steps, 0)
    problem, network = fitted.fused, fitted.fused.network
    data = problem.split(inputs, held_out)
    # Balanced factors share a step alike.
    updates = [update.balanced() for update in fitted.fused_adapters.updates]
    factors = [factor for update in updates for factor in (update.left, update.right)]
    count, start = len(factors), [*factors, *fitted.fused_adapters.bias_updates]

    def error(x: Tensor, y: Tensor, *parts: Tensor) -> Tensor:
        triples = zip(network.weights, parts[:count:2], parts[1:count:2], strict=True)
        weights = [W + A @ B.mT for W, A, B in triples]
        # There are no changes where no bias is tuned.
        biases = [b + change for b, change in zip(network.biases, parts[count:], strict=False)]
        tuned = network.with_parameters(weights, biases or None, checked=False)
        return (tuned(x) - y).square().mean()

    on_fit, on_select = (partial(error, x, problem.target(x)) for x in (data.fit, data.select))
    best, least = start, float(on_select(*start))
    done = waited = 0

    @torch.no_grad()
    def look(parts: list[Tensor]) -> None:
        nonlocal best, least, done, waited
        done += 1
        if done % CHUNK and done < iterations:
            return
        now = float(on_select(*parts))
        waited = 0 if now < least * (1 - PROGRESS) else waited + 1
        if now < least:
            best, least = parts, now
        if waited == PATIENCE:
            raise StopIteration

    if iterations and any(part.numel() for part in start):
        lbfgs(on_fit, *start, iterations=iterations, history=30, look=look)
    polished = map(LowRank, best[:count:2], best[1:count:2])
    adapters = Adapters(tuple(polished), tuple(best[count:]))
    found = FittedAdaptation.measure(problem, adapters, fitted.region, data, throw=throw)
    if not steps or not any(problem.fused_ranks):
        return found
    frozen: Any = problem.frozen
    pairs = [(frozen.fill(x), problem.target(x)) for x in (data.fit, data.select, data.test)]
    given = Fixed(*pairs[:2], samples=min(256, data.fit.shape[-1]))
    options: Any = {"steps": steps, "every": min(20, steps)}
    tuning = Tuning(problem.ranks, learning_rate=1e-2, schedule="cosine")
    trained = [train(frozen, [tuning], given, **options).adapters[0].to(frozen.dtype)]
    options |= {"partition": problem.partition, "throw": throw}
    trained.append(train_fused(frozen, problem.ranks, given, **options).adapters)

    def errors(adapters: Adapters) -> list[float]:
        tuned = adapters.merge(frozen)
        return [float(relative_error(tuned(x), y)) for x, y in pairs[1:]]

    best_trained = min(trained, key=lambda adapters: errors(adapters)[0])
    selected, tested = errors(best_trained)
    if not selected < errors(found.adapters)[0]:
        return found
    measured, success = torch.full_like(found.error, tested), torch.ones_like(found.success)
    return replace(found, adapters=best_trained, error=measured, success=success)
