"""Training steps compiled for processors: one run at a time, all its numbers in the cache.

`_reference` computes the same readably; the tests compare the two. This is fast because samples are
the last dimension, so that loops over them become vector instructions; tiles of samples fit the
cache; ``W_Kᵀ W_Q`` and ``W_O W_V`` are multiplied once; and a run computes only its own ranks. All
compiled code is in this file: numba compiles anew only when the file of `advance` changes.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
T = TypeVar("T")

_compiled = partial(
    njit,
    nogil=True,
    error_model="numpy",
    # Sums may be reordered, which vector instructions need; NaN and infinity stay what they are.
    fastmath={"reassoc", "contract", "nsz", "arcp"},
)
_F = np.float32
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8

# Sizes of matrices are multiples of this.
UNROLLED = 4
# At most so many numbers of a tile in each layer: several such arrays fit a core's cache.
TILE = 2**14
# Samples in a tile are a multiple of this, the single-precision numbers of a vector register.
LANES = 16


class Structure(NamedTuple):
    """What the runs of a batch have in common."""

    # How many of the first layers of a chain a ReLU follows.
    relus: int
    # Of a transformer; 0, 0 and 1 for a chain of layers.
    blocks: int
    heads: int
    tokens: int
    # How many coordinates of an output count in the squared error.
    outputs: int
    # Number of classes, or 0 for the squared error; the class of each output, or −1, ``[D]``.
    classes: int
    class_of: NDArray[np.int64]
    # Samples that go through the network together.
    tile: int
    # Steps of the whole training, over which a falling rate falls.
    steps: int


class State(NamedTuple, Generic[T]):
    """All runs of a batch, stacked along the first dimension: ``M`` weights, ``P`` biases."""

    # Each run's frozen network and data, by number; all networks' weights, ``[problems, M, D, D]``.
    problem: T
    source: T
    frozen: T
    # How many rows of factors count, −1 if a weight is tuned in full; tuned biases, ``[runs, P]``.
    ranks: T
    tuned: T
    # Learning rate, whether it falls as half a cosine, decay, A's rate over the others', whether
    # the training loss is one-sided.
    rate: T
    falling: T
    decay: T
    ratio: T
    one_sided: T
    # ``[runs, M, D, D]`` twice and ``[runs, P, D]``. A row of factors is one direction, ``ΔW = Σ_r
    # A[r] B[r]ᵀ``; where a weight is tuned in full, A holds the weight itself.
    A: T
    B: T
    b: T
    # What is taken from the inputs of weights, 0 but in centred runs, ``[runs, P, D]``.
    centre: T
    # Adam's first and second moments, ``[runs, M, 2, D, D]`` and ``[runs, P, 2, 1, D]``.
    A_moments: T
    B_moments: T
    b_moments: T
    # At the least validation loss.
    A_best: T
    B_best: T
    b_best: T
    # The part of the first validation loss at which a run stops, later that loss itself.
    goal: T
    best: T
    best_step: T
    # Because of its goal, or of a loss that is not finite.
    stopped: T
    # Loss curves, ``[runs, points]``.
    training: T
    validation: T


def tile(width: int, tokens: int) -> int:
    """Number of samples that go through the network together."""
    return max(TILE // (width * tokens) // LANES, 1) * LANES


def tiles(values: Float[Tensor, "*lead D tokens samples"], structure: Structure) -> Array:
    """``[..., D · tokens · samples]``: one tile after the other, of ``[D, tokens, samples]``."""
    return torch.cat([part.flatten(-3) for part in values.split(structure.tile, -1)], -1).numpy()


def scratch(structure: Structure, weights: int, width: int) -> int:
    """How many numbers are kept while a tile goes through the network and back."""
    layer = width * structure.tokens * structure.tile
    if not structure.blocks:
        return (weights + 2) * layer
    pairs = structure.blocks * structure.heads
    square = structure.tokens**2 * structure.tile
    return (3 * structure.blocks + 2 * pairs + 4) * layer + (pairs + 1) * square


@_compiled()
def _copy(values: Array, out: Array) -> None:
    # Much less code than an assignment, which allows for overlap.
    flat, to = values.reshape(-1), out.reshape(-1)
    for s in range(flat.size):
        to[s] = flat[s]


@_compiled()
def _apply(W: Array, x: Array, out: Array) -> None:
    """``out += W x``, four rows and columns of ``W`` at a time; its sizes are multiples of 4."""
    for i in range(0, W.shape[0], 4):
        o0, o1, o2, o3 = out[i], out[i + 1], out[i + 2], out[i + 3]
        for k in range(0, W.shape[1], 4):
            x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
            w00, w01, w02, w03 = W[i, k], W[i, k + 1], W[i, k + 2], W[i, k + 3]
            w10, w11, w12, w13 = W[i + 1, k], W[i + 1, k + 1], W[i + 1, k + 2], W[i + 1, k + 3]
            w20, w21, w22, w23 = W[i + 2, k], W[i + 2, k + 1], W[i + 2, k + 2], W[i + 2, k + 3]
            w30, w31, w32, w33 = W[i + 3, k], W[i + 3, k + 1], W[i + 3, k + 2], W[i + 3, k + 3]
            for s in range(x.shape[1]):
                p, q, r, t = x0[s], x1[s], x2[s], x3[s]
                o0[s] += w00 * p + w01 * q + w02 * r + w03 * t
                o1[s] += w10 * p + w11 * q + w12 * r + w13 * t
                o2[s] += w20 * p + w21 * q + w22 * r + w23 * t
                o3[s] += w30 * p + w31 * q + w32 * r + w33 * t


@_compiled()
def _outer(d: Array, x: Array, G: Array) -> None:
    """``G += d xᵀ``, four rows and columns at a time."""
    for i in range(0, d.shape[0], 4):
        d0, d1, d2, d3 = d[i], d[i + 1], d[i + 2], d[i + 3]
        for k in range(0, x.shape[0], 4):
            x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
            g00 = g01 = g02 = g03 = g10 = g11 = g12 = g13 = _F(0)
            g20 = g21 = g22 = g23 = g30 = g31 = g32 = g33 = _F(0)
            for s in range(x.shape[1]):
                p, q, r, t = x0[s], x1[s], x2[s], x3[s]
                e, f, g, h = d0[s], d1[s], d2[s], d3[s]
                g00 += e * p
                g01 += e * q
                g02 += e * r
                g03 += e * t
                g10 += f * p
                g11 += f * q
                g12 += f * r
                g13 += f * t
                g20 += g * p
                g21 += g * q
                g22 += g * r
                g23 += g * t
                g30 += h * p
                g31 += h * q
                g32 += h * r
                g33 += h * t
            for row, (a, b, c, e) in enumerate(
                (
                    (g00, g01, g02, g03),
                    (g10, g11, g12, g13),
                    (g20, g21, g22, g23),
                    (g30, g31, g32, g33),
                )
            ):
                G[i + row, k] += a
                G[i + row, k + 1] += b
                G[i + row, k + 2] += c
                G[i + row, k + 3] += e


@_compiled()
def _exp(x: Array) -> None:
    """Exponential of numbers of at most 0, in place, to single precision, vectorized."""
    for s in range(x.size):
        v = max(x[s], _F(-87))
        k = np.int32(v * _F(1.44269504) - _F(0.5))
        # The logarithm of 2 in two parts: the first times k is exact.
        u = v - _F(k) * _F(0.693359375) + _F(k) * _F(2.12194440e-4)
        p = _F(1 / 24) + u * (_F(1 / 120) + u * (_F(1 / 720) + u * _F(1 / 5040)))
        p = _F(1) + u * (_F(1) + u * (_F(1 / 2) + u * (_F(1 / 6) + u * p)))
        x[s] = p * np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled()
def _set_rows(bias: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = bias[i]


@_compiled()
def _add_rows(x: Array, sums: Array) -> None:
    for i in range(x.shape[0]):
        total = _F(0)
        row = x[i]
        for s in range(row.size):
            total += row[s]
        sums[i] += total


@_compiled()
def _relu(x: Array) -> None:
    flat = x.reshape(-1)
    for s in range(flat.size):
        # Not max(), which would turn NaN into 0.
        flat[s] = _F(0) if flat[s] < _F(0) else flat[s]


@_compiled()
def _one_sided(x: Array, y: Array) -> None:
    """A ReLU only where an output should be 0."""
    flat, goal = x.reshape(-1), y.reshape(-1)
    for s in range(flat.size):
        flat[s] = _F(0) if flat[s] < _F(0) and goal[s] <= _F(0) else flat[s]


@_compiled()
def _gate(active: Array, d: Array) -> None:
    """Gradient through a ReLU that returned ``active``."""
    a, flat = active.reshape(-1), d.reshape(-1)
    for s in range(flat.size):
        flat[s] = flat[s] if a[s] > _F(0) else _F(0)


@_compiled()
def _loss(out: Array, y: Array, samples: int, structure: Structure, d: Array) -> Any:
    """A tile's part of the mean loss over all samples; its gradient goes to ``d``."""
    if structure.classes == 0:
        total = _F(0)
        unit = _F(1) / _F(structure.outputs * structure.tokens * samples)
        o, g, f = out.reshape(-1), y.reshape(-1), d.reshape(-1)
        for s in range(o.size):
            difference = o[s] - g[s]
            total += difference * difference
            f[s] = _F(2) * unit * difference
        return total * unit
    return _cross_entropy(out, y, samples, structure, d)


@_compiled()
def _cross_entropy(out: Array, y: Array, samples: int, structure: Structure, d: Array) -> float:
    """Cross-entropy of the softmax of the classes' votes against probabilities ``y[c]``."""
    t = y.shape[1]
    votes = np.zeros((structure.classes, t), np.float32)
    for i in range(out.shape[0]):
        c = structure.class_of[i]
        if c >= 0:
            for s in range(out.shape[1]):
                votes[c, s % t] += out[i, s]
    total = 0.0
    for s in range(t):
        top = votes[0, s]
        for c in range(1, structure.classes):
            top = max(top, votes[c, s])
        normalizer = _F(0)
        for c in range(structure.classes):
            normalizer += np.exp(votes[c, s] - top)
        normalizer = np.log(normalizer) + top
        for c in range(structure.classes):
            if y[c, s] > 0:
                total += y[c, s] * (normalizer - votes[c, s])
            votes[c, s] = (np.exp(votes[c, s] - normalizer) - y[c, s]) / _F(samples)
    for i in range(out.shape[0]):
        c = structure.class_of[i]
        for s in range(out.shape[1]):
            d[i, s] = votes[c, s % t] if c >= 0 else _F(0)
    return total / samples


@_compiled()
def _chain(
    W: Array,
    b: Array,
    x: Array,
    y: Array,
    samples: int,
    structure: Structure,
    tuned: NDArray[np.bool_],
    one_sided: bool,
    work: Array,
    dW: Array,
    db: Array,
) -> float:
    """Loss of a chain of layers on a batch; adds ``tuned`` parts' gradients to ``dW``, ``db``."""
    depth, width = W.shape[0], W.shape[1]
    relus = depth - 1 if one_sided else structure.relus
    loss, first = 0.0, depth
    for l in range(depth - 1, -1, -1):
        if tuned[l]:
            first = l
    rows = structure.classes if structure.classes else width
    for start in range(0, samples, structure.tile):
        t = min(structure.tile, samples - start)
        inputs = x[start * width : (start + t) * width].reshape(width, t)
        goal = y[start * rows : (start + t) * rows].reshape(rows, t)
        size = width * t
        z = work[: depth * size].reshape(depth, width, t)
        d = work[depth * size : (depth + 2) * size].reshape(2, width, t)
        for l in range(depth):
            _set_rows(b[l], z[l])
            _apply(W[l], inputs if l == 0 else z[l - 1], z[l])
            if l < relus:
                _relu(z[l])
        if one_sided:
            # The error of what the ReLU cuts off is 0, and so is the gradient.
            _one_sided(z[depth - 1], goal)
        loss += _loss(z[depth - 1], goal, samples, structure, d[0])
        now = 0
        for l in range(depth - 1, first - 1, -1):
            if l < relus:
                _gate(z[l], d[now])
            if tuned[l]:
                _outer(d[now], inputs if l == 0 else z[l - 1], dW[l])
                _add_rows(d[now], db[l])
            if l > first:
                d[1 - now] = _F(0)
                _apply(W[l].T, d[now], d[1 - now])
                now = 1 - now
    return loss


@_compiled()
def _contract(x: Array, y: Array, n: int, out: Array) -> None:
    """``out[i, j] += Σ_d x[d, i] y[d, j]`` over pairs of ``n`` tokens, sample by sample."""
    t = x.shape[1] // n
    for k in range(0, x.shape[0], 4):
        for i in range(n):
            a, b = i * t, (i + 1) * t
            x0, x1, x2, x3 = x[k, a:b], x[k + 1, a:b], x[k + 2, a:b], x[k + 3, a:b]
            # Two tokens at a time, and the last one alone where their number is odd.
            for j in range(0, n - 1, 2):
                a, b, c = j * t, (j + 1) * t, (j + 2) * t
                y0, y1, y2, y3 = y[k, a:b], y[k + 1, a:b], y[k + 2, a:b], y[k + 3, a:b]
                z0, z1, z2, z3 = y[k, b:c], y[k + 1, b:c], y[k + 2, b:c], y[k + 3, b:c]
                o, q = out[i * n + j], out[i * n + j + 1]
                for s in range(t):
                    e, f, g, h = x0[s], x1[s], x2[s], x3[s]
                    o[s] += e * y0[s] + f * y1[s] + g * y2[s] + h * y3[s]
                    q[s] += e * z0[s] + f * z1[s] + g * z2[s] + h * z3[s]
            if n % 2:
                a, b = (n - 1) * t, n * t
                y0, y1, y2, y3 = y[k, a:b], y[k + 1, a:b], y[k + 2, a:b], y[k + 3, a:b]
                o = out[i * n + n - 1]
                for s in range(t):
                    o[s] += x0[s] * y0[s] + x1[s] * y1[s] + x2[s] * y2[s] + x3[s] * y3[s]


@_compiled()
def _mix(x: Array, p: Array, n: int, transposed: bool, out: Array) -> None:
    """``out[d, j] += Σ_i x[d, i] p[i, j]``, or with ``p[j, i]``, sample by sample."""
    t = x.shape[1] // n
    for k in range(0, x.shape[0], 4):
        for j in range(n):
            a, b = j * t, (j + 1) * t
            o0, o1, o2, o3 = out[k, a:b], out[k + 1, a:b], out[k + 2, a:b], out[k + 3, a:b]
            # Two tokens at a time, and the last one alone where their number is odd.
            for i in range(0, n - 1, 2):
                q = p[j * n + i] if transposed else p[i * n + j]
                r = p[j * n + i + 1] if transposed else p[(i + 1) * n + j]
                a, b, c = i * t, (i + 1) * t, (i + 2) * t
                x0, x1, x2, x3 = x[k, a:b], x[k + 1, a:b], x[k + 2, a:b], x[k + 3, a:b]
                y0, y1, y2, y3 = x[k, b:c], x[k + 1, b:c], x[k + 2, b:c], x[k + 3, b:c]
                for s in range(t):
                    e, f = q[s], r[s]
                    o0[s] = (o0[s] + x0[s] * e) + y0[s] * f
                    o1[s] = (o1[s] + x1[s] * e) + y1[s] * f
                    o2[s] = (o2[s] + x2[s] * e) + y2[s] * f
                    o3[s] = (o3[s] + x3[s] * e) + y3[s] * f
            if n % 2:
                i = n - 1
                q = p[j * n + i] if transposed else p[i * n + j]
                a, b = i * t, n * t
                x0, x1, x2, x3 = x[k, a:b], x[k + 1, a:b], x[k + 2, a:b], x[k + 3, a:b]
                for s in range(t):
                    e = q[s]
                    o0[s] += x0[s] * e
                    o1[s] += x1[s] * e
                    o2[s] += x2[s] * e
                    o3[s] += x3[s] * e


@_compiled()
def _softmax(p: Array, n: int) -> None:
    """Softmax of each column of the ``n × n`` scores of each sample, in place."""
    t = p.shape[1]
    top, total = np.empty(t, np.float32), np.empty(t, np.float32)
    for j in range(n):
        _copy(p[j], top)
        for i in range(1, n):
            row = p[i * n + j]
            for s in range(t):
                top[s] = max(top[s], row[s])
        total[:] = _F(0)
        for i in range(n):
            row = p[i * n + j]
            for s in range(t):
                row[s] -= top[s]
            _exp(row)
            for s in range(t):
                total[s] += row[s]
        for i in range(n):
            row = p[i * n + j]
            for s in range(t):
                row[s] /= total[s]


@_compiled()
def _softmax_gradient(p: Array, n: int, d: Array) -> None:
    """In place: ``d ← p (d − Σ_i p d)`` in each column."""
    total = np.empty(p.shape[1], np.float32)
    for j in range(n):
        total[:] = _F(0)
        for i in range(n):
            a, g = p[i * n + j], d[i * n + j]
            for s in range(total.size):
                total[s] += a[s] * g[s]
        for i in range(n):
            a, g = p[i * n + j], d[i * n + j]
            for s in range(total.size):
                g[s] = a[s] * (g[s] - total[s])


@_compiled()
def _transformer(
    W: Array,
    b: Array,
    x: Array,
    y: Array,
    samples: int,
    structure: Structure,
    tuned: NDArray[np.bool_],
    work: Array,
    dW: Array,
    db: Array,
) -> float:
    """Loss of a transformer on a batch; like `_chain`. Weights in `Transformer`'s order."""
    D, n, L, H = W.shape[1], structure.tokens, structure.blocks, structure.heads
    K, V, O, W_1, W_2 = L * H, 2 * L * H, 3 * L * H, 4 * L * H, 4 * L * H + L
    last = 4 * L * H + 2 * L
    backward = tuned.any()
    merged = np.zeros((4, L * H, D, D), np.float32)
    KQ, OV, dKQ, dOV = merged[0], merged[1], merged[2], merged[3]
    for h in range(L * H):
        _apply(W[K + h].T, W[h], KQ[h])
        _apply(W[O + h], W[V + h], OV[h])
    loss = 0.0
    classes = structure.classes
    for start in range(0, samples, structure.tile):
        t = min(structure.tile, samples - start)
        size, square = D * n * t, n * n * t
        inputs = x[start * D * n : (start + t) * D * n].reshape(D, n * t)
        if classes:
            goal = y[start * classes : (start + t) * classes].reshape(classes, t)
        else:
            goal = y[start * D * n : (start + t) * D * n].reshape(D, n * t)
        at = 0
        z = work[at : at + L * size].reshape(L, D, n * t)
        at += L * size
        u = work[at : at + L * H * size].reshape(L * H, D, n * t)
        at += L * H * size
        v = work[at : at + L * H * size].reshape(L * H, D, n * t)
        at += L * H * size
        attention = work[at : at + L * size].reshape(L, D, n * t)
        at += L * size
        hidden = work[at : at + L * size].reshape(L, D, n * t)
        at += L * size
        d = work[at : at + 4 * size].reshape(4, D, n * t)
        at += 4 * size
        p = work[at : at + L * H * square].reshape(L * H, n * n, t)
        at += L * H * square
        dp = work[at : at + square].reshape(n * n, t)
        for l in range(L):
            tokens = inputs if l == 0 else z[l - 1]
            attention[l] = _F(0)
            for h in range(l * H, (l + 1) * H):
                u[h] = _F(0)
                _apply(KQ[h], tokens, u[h])
                p[h] = _F(0)
                _contract(tokens, u[h], n, p[h])
                _softmax(p[h], n)
                v[h] = _F(0)
                _apply(OV[h], tokens, v[h])
                _mix(v[h], p[h], n, False, attention[l])
            _set_rows(b[l], hidden[l])
            _apply(W[W_1 + l], attention[l], hidden[l])
            _relu(hidden[l])
            _set_rows(b[L + l], z[l])
            _apply(W[W_2 + l], hidden[l], z[l])
        out, dout = d[0], d[1]
        out[:] = _F(0)
        _apply(W[last], z[L - 1], out)
        loss += _loss(out, goal, samples, structure, dout)
        if not backward:
            continue
        dz, dh = d[2], d[3]
        _outer(dout, z[L - 1], dW[last])
        dz[:] = _F(0)
        _apply(W[last].T, dout, dz)
        for l in range(L - 1, -1, -1):
            tokens = inputs if l == 0 else z[l - 1]
            _outer(dz, hidden[l], dW[W_2 + l])
            _add_rows(dz, db[L + l])
            dh[:] = _F(0)
            _apply(W[W_2 + l].T, dz, dh)
            _gate(hidden[l], dh)
            _outer(dh, attention[l], dW[W_1 + l])
            _add_rows(dh, db[l])
            dattention = d[0]
            dattention[:] = _F(0)
            _apply(W[W_1 + l].T, dh, dattention)
            dz[:] = _F(0)
            for h in range(l * H, (l + 1) * H):
                dp[:] = _F(0)
                _contract(v[h], dattention, n, dp)
                _softmax_gradient(p[h], n, dp)
                dv = d[1]
                dv[:] = _F(0)
                _mix(dattention, p[h], n, True, dv)
                _outer(dv, tokens, dOV[h])
                du = d[3]
                du[:] = _F(0)
                _mix(tokens, dp, n, False, du)
                _outer(du, tokens, dKQ[h])
                if l > 0:
                    _apply(OV[h].T, dv, dz)
                    _mix(u[h], dp, n, True, dz)
                    _apply(KQ[h].T, du, dz)
    if backward:
        for h in range(L * H):
            _apply(W[K + h], dKQ[h], dW[h])
            _outer(W[h], dKQ[h], dW[K + h])
            _apply(W[O + h].T, dOV[h], dW[V + h])
            _outer(dOV[h], W[V + h], dW[O + h])
    return loss


@_compiled()
def _adam(
    values: Array, gradient: Array, moments: Array, rate: float, decay: float, step: int, rows: int
) -> None:
    """One step of Adam with L2 penalty, as `torch.optim.Adam` takes it, of the first rows."""
    beta_1, beta_2 = _F(BETA_1), _F(BETA_2)
    length = _F(rate / (1 - BETA_1**step))
    root = _F(1 / (1 - BETA_2**step) ** 0.5)
    for i in range(rows):
        value, first, second, slope = values[i], moments[0, i], moments[1, i], gradient[i]
        for s in range(value.size):
            g = slope[s] + _F(decay) * value[s]
            first[s] = beta_1 * first[s] + (_F(1) - beta_1) * g
            second[s] = beta_2 * second[s] + (_F(1) - beta_2) * g * g
            value[s] -= length * first[s] / (np.sqrt(second[s]) * root + _F(EPSILON))


@_compiled()
def _weights(state: State[Any], run: int, W: Array, b: Array) -> None:
    """The adapted weights of a run, and its biases ``b``."""
    for m in range(W.shape[0]):
        rank = state.ranks[run, m]
        if rank < 0:
            _copy(state.A[run, m], W[m])
            continue
        _copy(state.frozen[state.problem[run], m], W[m])
        for r in range(rank):
            for i in range(W.shape[1]):
                a, row = state.A[run, m, r, i], state.B[run, m, r]
                for k in range(W.shape[1]):
                    W[m, i, k] += a * row[k]
    _copy(state.b[run], b)
    if state.centre[run].any():
        for l in range(W.shape[0]):
            for i in range(W.shape[1]):
                for k in range(W.shape[1]):
                    b[l, i] -= W[l, i, k] * state.centre[run, l, k]


@_compiled()
def _centre(state: State[Any], run: int, dW: Array, db: Array) -> None:
    """Gradients in weights whose inputs are centred, from those in weights and biases."""
    for l in range(dW.shape[0]):
        for i in range(dW.shape[1]):
            for k in range(dW.shape[1]):
                dW[l, i, k] -= db[l, i] * state.centre[run, l, k]


@_compiled()
def _update(state: State[Any], run: int, dW: Array, db: Array, step: int, steps: int) -> None:
    """Factors, full weights and biases of a run after one step down the gradient."""
    D = dW.shape[1]
    rate, decay = state.rate[run], state.decay[run]
    if state.falling[run]:
        rate *= _F((1 + np.cos(np.pi * (step - 1) / steps)) / 2)
    dA, dB = np.empty((D, D), np.float32), np.empty((D, D), np.float32)
    for m in range(dW.shape[0]):
        rank = state.ranks[run, m]
        A, B = state.A[run, m], state.B[run, m]
        if rank < 0:
            _adam(A, dW[m], state.A_moments[run, m], rate, decay, step, D)
        if rank <= 0:
            continue
        for r in range(rank):
            dB[r] = _F(0)
            for i in range(D):
                total = _F(0)
                for k in range(D):
                    total += dW[m, i, k] * B[r, k]
                    dB[r, k] += A[r, i] * dW[m, i, k]
                dA[r, i] = total
        _adam(A, dA, state.A_moments[run, m], rate * state.ratio[run], decay, step, rank)
        _adam(B, dB, state.B_moments[run, m], rate, decay, step, rank)
    b = state.b[run]
    for l in range(len(b)):
        if state.tuned[run, l]:
            value, slope = b[l].reshape(1, -1), db[l].reshape(1, -1)
            _adam(value, slope, state.b_moments[run, l], rate, decay, step, 1)


@_compiled()
def _validate(state: State[Any], run: int, loss: float, step: int, every: int) -> None:
    """Record a validation loss, keep the parameters if it is the least, stop at the goal."""
    state.validation[run, step // every] = loss
    if step == 0:
        state.goal[run] *= loss
    if not np.isfinite(loss):
        state.stopped[run] = True
    elif loss < state.best[run]:
        state.best[run], state.best_step[run] = loss, step
        _copy(state.A[run], state.A_best[run])
        _copy(state.B[run], state.B_best[run])
        _copy(state.b[run], state.b_best[run])
        if loss <= state.goal[run]:
            state.stopped[run] = True


@_compiled()
def _network(
    W: Array,
    b: Array,
    x: Array,
    y: Array,
    samples: int,
    structure: Structure,
    tuned: NDArray[np.bool_],
    one_sided: bool,
    work: Array,
    dW: Array,
    db: Array,
) -> float:
    """`_transformer` or `_chain`, as ``structure`` says."""
    if structure.blocks:
        return _transformer(W, b, x, y, samples, structure, tuned, work, dW, db)
    return _chain(W, b, x, y, samples, structure, tuned, one_sided, work, dW, db)


@_compiled()
def advance(
    structure: Structure,
    state: State[Any],
    runs: NDArray[np.int64],
    x: Array,
    y: Array,
    samples: int,
    x_validation: Array,
    y_validation: Array,
    validation_samples: int,
    start: int,
    every: int,
    work: Array,
) -> None:
    """Take the next steps of some runs; ``x[source, step]`` is arranged by `tiles`."""
    M, D = state.ranks.shape[1], state.frozen.shape[2]
    W, dW = np.empty((M, D, D), np.float32), np.empty((M, D, D), np.float32)
    b = np.empty(state.b.shape[1:], np.float32)
    db = np.empty(state.b.shape[1:], np.float32)
    none = np.zeros(M, np.bool_)
    for run in runs:
        source = state.source[run]
        tuned = state.ranks[run] != 0
        for l in range(state.tuned.shape[1]):
            # In a chain, the bias beside a weight; in a transformer all have gradients anyway.
            tuned[min(l, M - 1)] |= state.tuned[run, l]
        _weights(state, run, W, b)
        # The network is much code and stands here only twice: a step begins by recording the one
        # before.
        loss = 0.0
        for step in range(start, start + x.shape[1] + 1):
            if state.stopped[run]:
                break
            if step % every == 0 and (step > start or step == 0):
                if step > 0:
                    state.training[run, step // every] = loss
                loss = _network(
                    W, b, x_validation[source], y_validation[source], validation_samples,
                    structure, none, False, work, dW, db,
                )  # fmt: skip
                _validate(state, run, loss, step, every)
            if step == start + x.shape[1] or state.stopped[run]:
                break
            dW[:], db[:] = _F(0), _F(0)
            loss = _network(
                W, b, x[source, step - start], y[source, step - start], samples,
                structure, tuned, state.one_sided[run], work, dW, db,
            )  # fmt: skip
            if not np.isfinite(loss):
                state.stopped[run] = True
                break
            if state.centre[run].any():
                _centre(state, run, dW, db)
            _update(state, run, dW, db, step + 1, structure.steps)
            _weights(state, run, W, b)


# Machine code is kept for later processes if there is a folder for it.
with suppress(RuntimeError):
    advance.enable_caching()
