"""The loss and gradient of a chain of layers, linear or ReLU, compiled for processors.

`_reference` computes the same readably, and the tests compare the two. This is fast because samples
are the last dimension, so that loops over them become vector instructions, and because samples go
through the network in tiles that fit the cache. `_attention` uses the same products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import njit

from ._state import Array, Batch, Booleans, Layers, Structure

compiled = partial(
    njit,
    nogil=True,
    error_model="numpy",
    # Sums may be reordered, which vector instructions need; NaN and infinity stay what they are.
    fastmath={"reassoc", "contract", "nsz", "arcp"},
)
F = np.float32


@compiled()
def copy(values: Array, out: Array) -> None:
    # Much less code than an assignment, which allows for overlap.
    flat, to = values.reshape(-1), out.reshape(-1)
    for s in range(flat.size):
        to[s] = flat[s]


@compiled()
def apply(W: Array, x: Array, out: Array) -> None:
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


@compiled()
def outer(d: Array, x: Array, G: Array) -> None:
    """``G += d xᵀ``, four rows and columns at a time."""
    for i in range(0, d.shape[0], 4):
        d0, d1, d2, d3 = d[i], d[i + 1], d[i + 2], d[i + 3]
        for k in range(0, x.shape[0], 4):
            x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
            g00 = g01 = g02 = g03 = g10 = g11 = g12 = g13 = F(0)
            g20 = g21 = g22 = g23 = g30 = g31 = g32 = g33 = F(0)
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
            sums = (g00, g01, g02, g03, g10, g11, g12, g13, g20, g21, g22, g23, g30, g31, g32, g33)
            for place, total in enumerate(sums):
                G[i + place // 4, k + place % 4] += total


@compiled()
def set_rows(bias: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = bias[i]


@compiled()
def add_rows(x: Array, sums: Array) -> None:
    for i in range(x.shape[0]):
        total = F(0)
        row = x[i]
        for s in range(row.size):
            total += row[s]
        sums[i] += total


@compiled()
def relu(x: Array) -> None:
    flat = x.reshape(-1)
    for s in range(flat.size):
        # Not max(), which would turn NaN into 0.
        flat[s] = F(0) if flat[s] < F(0) else flat[s]


@compiled()
def gate(active: Array, d: Array) -> None:
    """Take a gradient, in place, back through a ReLU that returned ``active``."""
    a, flat = active.reshape(-1), d.reshape(-1)
    for s in range(flat.size):
        flat[s] = flat[s] if a[s] > F(0) else F(0)


@compiled()
def _one_sided(x: Array, y: Array) -> None:
    """Apply a ReLU only where an output should be 0 [def-one-sided]."""
    flat, goal = x.reshape(-1), y.reshape(-1)
    for s in range(flat.size):
        flat[s] = F(0) if flat[s] < F(0) and goal[s] <= F(0) else flat[s]


@compiled()
def loss(out: Array, y: Array, samples: int, structure: Structure, d: Array) -> Any:
    """Return a tile's part of the mean loss over all samples; its gradient goes to ``d``.

    With classes ``y[c]`` are probabilities, compared with the softmax of the classes' votes.
    """
    if structure.classes == 0:
        squares = F(0)
        unit = F(1) / F(structure.outputs * structure.tokens * samples)
        o, g, f = out.reshape(-1), y.reshape(-1), d.reshape(-1)
        for s in range(o.size):
            difference = o[s] - g[s]
            squares += difference * difference
            f[s] = F(2) * unit * difference
        return squares * unit
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
        normalizer = F(0)
        for c in range(structure.classes):
            normalizer += np.exp(votes[c, s] - top)
        normalizer = np.log(normalizer) + top
        for c in range(structure.classes):
            if y[c, s] > 0:
                total += y[c, s] * (normalizer - votes[c, s])
            votes[c, s] = (np.exp(votes[c, s] - normalizer) - y[c, s]) / F(samples)
    for i in range(out.shape[0]):
        c = structure.class_of[i]
        for s in range(out.shape[1]):
            d[i, s] = votes[c, s % t] if c >= 0 else F(0)
    return total / samples


@compiled()
def chain(
    layers: Layers,
    batch: Batch,
    structure: Structure,
    tuned: Booleans,
    one_sided: bool,
    slopes: Layers,
) -> float:
    """Return the loss on a batch; add the gradient of the ``tuned`` layers to ``slopes``.

    Layers below the first tuned one are not differentiated.
    """
    W, b = layers.W, layers.b
    depth, width = W.shape[0], W.shape[1]
    relus = depth - 1 if one_sided else structure.relus
    first = np.argmax(tuned) if tuned.any() else depth
    total = 0.0
    rows = structure.classes if structure.classes else width
    for start in range(0, batch.samples, structure.tile):
        t = min(structure.tile, batch.samples - start)
        inputs = batch.x[start * width : (start + t) * width].reshape(width, t)
        goal = batch.y[start * rows : (start + t) * rows].reshape(rows, t)
        z = np.empty((depth, width, t), np.float32)
        d, below = np.empty((width, t), np.float32), np.empty((width, t), np.float32)
        for l in range(depth):
            set_rows(b[l], z[l])
            apply(W[l], inputs if l == 0 else z[l - 1], z[l])
            if l < relus:
                relu(z[l])
        if one_sided:
            # The error of what the ReLU cuts off is 0, and so is the gradient.
            _one_sided(z[depth - 1], goal)
        total += loss(z[depth - 1], goal, batch.samples, structure, d)
        for l in range(depth - 1, first - 1, -1):
            if l < relus:
                gate(z[l], d)
            if tuned[l]:
                outer(d, inputs if l == 0 else z[l - 1], slopes.W[l])
                add_rows(d, slopes.b[l])
            if l > first:
                below[:] = F(0)
                apply(W[l].T, d, below)
                d, below = below, d
    return total
