"""Training steps of Adam, compiled for processors, on gradients of the kernels or of `_reference`.

With a kernel one run at a time takes its steps, all its numbers in the cache. A run computes only
its own ranks.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from . import _attention, _chain, _state
from ._attention import transformer
from ._chain import F, chain, compiled, copy
from ._state import Array, Batch, Booleans, Integers, Layers, State, Structure

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@compiled()
def merge(state: State, run: int, layers: Layers) -> None:
    """Set the layers to a run's ``W + Σ_r A[r] B[r]ᵀ``, or ``A``, and to ``b``, or ``b − W m``."""
    W, b = layers.W, layers.b
    frozen, parameters = state.frozen, state.parameters
    for m in range(W.shape[0]):
        rank = frozen.ranks[run, m]
        if rank < 0:
            copy(parameters.A[run, m], W[m])
            continue
        copy(frozen.weights[frozen.network[run], m], W[m])
        for r in range(rank):
            for i in range(W.shape[1]):
                a, row = parameters.A[run, m, r, i], parameters.B[run, m, r]
                for k in range(W.shape[1]):
                    W[m, i, k] += a * row[k]
    copy(parameters.b[run], b)
    if frozen.centre[run].any():
        for l in range(W.shape[0]):
            for i in range(W.shape[1]):
                for k in range(W.shape[1]):
                    b[l, i] -= W[l, i, k] * frozen.centre[run, l, k]


@compiled()
def _adam(
    values: Array, gradient: Array, moments: Array, rate: float, decay: float, step: int, rows: int
) -> None:
    """Take a step of Adam with L2 penalty, as `torch.optim.Adam` does, of the first rows."""
    beta_1, beta_2 = F(BETA_1), F(BETA_2)
    length = F(rate / (1 - BETA_1**step))
    root = F(1 / (1 - BETA_2**step) ** 0.5)
    for i in range(rows):
        value, first, second, slope = values[i], moments[0, i], moments[1, i], gradient[i]
        for s in range(value.size):
            g = slope[s] + F(decay) * value[s]
            first[s] = beta_1 * first[s] + (F(1) - beta_1) * g
            second[s] = beta_2 * second[s] + (F(1) - beta_2) * g * g
            value[s] -= length * first[s] / (np.sqrt(second[s]) * root + F(EPSILON))


@compiled()
def update(state: State, run: int, slopes: Layers, step: int) -> None:
    """Move factors, full weights and biases of a run one step down the gradient."""
    dW, db, D = slopes.W, slopes.b, slopes.W.shape[1]
    frozen, parameters, moments = state.frozen, state.parameters, state.moments
    rate, decay = frozen.learning_rate[run], frozen.weight_decay[run]
    if frozen.falling[run]:
        rate *= F((1 + np.cos(np.pi * (step - 1) / state.structure.steps)) / 2)
    if frozen.centre[run].any():
        # A weight also moves the bias b = c - W m.
        for l in range(dW.shape[0]):
            for i in range(D):
                for k in range(D):
                    dW[l, i, k] -= db[l, i] * frozen.centre[run, l, k]
    dA, dB = np.empty((D, D), np.float32), np.empty((D, D), np.float32)
    for m in range(dW.shape[0]):
        rank = frozen.ranks[run, m]
        A, B = parameters.A[run, m], parameters.B[run, m]
        if rank < 0:
            _adam(A, dW[m], moments.A[run, m], rate, decay, step, D)
        if rank <= 0:
            continue
        for r in range(rank):
            dB[r] = F(0)
            for i in range(D):
                total = F(0)
                for k in range(D):
                    total += dW[m, i, k] * B[r, k]
                    dB[r, k] += A[r, i] * dW[m, i, k]
                dA[r, i] = total
        _adam(A, dA, moments.A[run, m], rate * frozen.ratio[run], decay, step, rank)
        _adam(B, dB, moments.B[run, m], rate, decay, step, rank)
    for l in range(frozen.biases.shape[1]):
        if frozen.biases[run, l]:
            value, slope = parameters.b[run, l].reshape(1, -1), db[l].reshape(1, -1)
            _adam(value, slope, moments.b[run, l].reshape(2, 1, -1), rate, decay, step, 1)


@compiled()
def record(state: State, run: int, loss: float, step: int) -> None:
    """Record a validation loss, keep the parameters if it is the least, stop at the goal."""
    parameters, best, course = state.parameters, state.best, state.course
    course.validation[run, step // state.structure.every] = loss
    if step == 0:
        course.goal[run] *= loss
    if not np.isfinite(loss):
        course.stopped[run] = True
    elif loss < course.best_loss[run]:
        course.best_loss[run], course.best_step[run] = loss, step
        copy(parameters.A[run], best.A[run])
        copy(parameters.B[run], best.B[run])
        copy(parameters.b[run], best.b[run])
        if loss <= course.goal[run]:
            course.stopped[run] = True


@compiled()
def differentiate(
    layers: Layers,
    batch: Batch,
    structure: Structure,
    tuned: Booleans,
    one_sided: bool,
    slopes: Layers,
) -> float:
    """Return the loss on a batch; add the gradient of what is ``tuned`` to ``slopes``."""
    if structure.blocks:
        return transformer(layers, batch, structure, bool(tuned.any()), slopes)
    return chain(layers, batch, structure, tuned, one_sided, slopes)


@compiled()
def advance(state: State, batches: Batch, validation: Batch, start: int, runs: Integers) -> None:
    """Take the next steps of some runs by a kernel, from ``start`` on, a batch for each."""
    structure, frozen, course = state.structure, state.frozen, state.course
    every = structure.every
    M, D, P = frozen.ranks.shape[1], frozen.weights.shape[2], frozen.biases.shape[1]
    layers = Layers(np.empty((M, D, D), np.float32), np.empty((P, D), np.float32))
    slopes = Layers(np.empty((M, D, D), np.float32), np.empty((P, D), np.float32))
    nothing = np.zeros(M, np.bool_)
    stop = start + batches.x.shape[0]
    for run in runs:
        tuned = frozen.ranks[run] != 0
        for l in range(P):
            # In a chain, the bias beside a weight; in a transformer all have gradients anyway.
            tuned[min(l, M - 1)] |= frozen.biases[run, l]
        merge(state, run, layers)
        # The kernels are much code and stand here only twice: a step begins by recording the one
        # before.
        loss = 0.0
        for step in range(start, stop + 1):
            if course.stopped[run]:
                break
            if step % every == 0 and (step > start or step == 0):
                if step > 0:
                    course.training[run, step // every] = loss
                loss = differentiate(layers, validation, structure, nothing, False, slopes)
                record(state, run, loss, step)
            if step == stop or course.stopped[run]:
                break
            slopes.W[:], slopes.b[:] = F(0), F(0)
            batch = Batch(batches.x[step - start], batches.y[step - start], batches.samples)
            loss = differentiate(layers, batch, structure, tuned, frozen.one_sided[run], slopes)
            if not np.isfinite(loss):
                course.stopped[run] = True
                break
            update(state, run, slopes, step + 1)
            merge(state, run, layers)


# numba compiles anew when this file changes, but not when a file that it calls does. So their
# contents are part of the name under which it keeps machine code.
_files = [Path(str(module.__file__)).read_bytes() for module in (_state, _chain, _attention)]
_version = hashlib.sha256(b"".join(_files)).hexdigest()[:8]
for _entry in (advance, merge, update, record):
    _entry.py_func.__qualname__ += _version
    # There may be no folder that can be written.
    with suppress(RuntimeError):
        _entry.enable_caching()
