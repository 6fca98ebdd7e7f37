"""The loss and gradient of a plain transformer, compiled for processors.

`_reference` computes the same readably, and the tests compare the two. ``W_Kᵀ W_Q`` and ``W_O W_V``
are multiplied once a step, whatever the number of samples.
"""

from __future__ import annotations

import numpy as np

from ._chain import F, add_rows, apply, compiled, copy, gate, loss, outer, relu, set_rows
from ._state import Array, Batch, Layers, Structure


@compiled()
def _contract(x: Array, y: Array, n: int, out: Array) -> None:
    """``out[i, j] += Σ_d x[d, i] y[d, j]`` over pairs of ``n`` tokens, sample by sample."""
    t = x.shape[1] // n
    for k in range(0, x.shape[0], 4):
        for i in range(n):
            a, b = i * t, (i + 1) * t
            x0, x1, x2, x3 = x[k, a:b], x[k + 1, a:b], x[k + 2, a:b], x[k + 3, a:b]
            for j in range(n):
                a, b = j * t, (j + 1) * t
                y0, y1, y2, y3 = y[k, a:b], y[k + 1, a:b], y[k + 2, a:b], y[k + 3, a:b]
                o = out[i * n + j]
                for s in range(t):
                    o[s] += x0[s] * y0[s] + x1[s] * y1[s] + x2[s] * y2[s] + x3[s] * y3[s]


@compiled()
def _mix(x: Array, p: Array, n: int, transposed: bool, out: Array) -> None:
    """``out[d, j] += Σ_i x[d, i] p[i, j]``, or with ``p[j, i]``, sample by sample."""
    t = x.shape[1] // n
    for k in range(0, x.shape[0], 4):
        for j in range(n):
            a, b = j * t, (j + 1) * t
            o0, o1, o2, o3 = out[k, a:b], out[k + 1, a:b], out[k + 2, a:b], out[k + 3, a:b]
            for i in range(n):
                q = p[j * n + i] if transposed else p[i * n + j]
                a, b = i * t, (i + 1) * t
                x0, x1, x2, x3 = x[k, a:b], x[k + 1, a:b], x[k + 2, a:b], x[k + 3, a:b]
                for s in range(t):
                    e = q[s]
                    o0[s] += x0[s] * e
                    o1[s] += x1[s] * e
                    o2[s] += x2[s] * e
                    o3[s] += x3[s] * e


@compiled()
def _exp(x: Array) -> None:
    """Take the exponential of numbers of at most 0, in place, to single precision, vectorized."""
    for s in range(x.size):
        v = max(x[s], F(-87))
        k = np.int32(v * F(1.44269504) - F(0.5))
        # The logarithm of 2 in two parts: the first times k is exact.
        u = v - F(k) * F(0.693359375) + F(k) * F(2.12194440e-4)
        p = F(1 / 24) + u * (F(1 / 120) + u * (F(1 / 720) + u * F(1 / 5040)))
        p = F(1) + u * (F(1) + u * (F(1 / 2) + u * (F(1 / 6) + u * p)))
        x[s] = p * np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled()
def _softmax(p: Array, n: int) -> None:
    """Take the softmax of each column of the ``n × n`` scores of each sample, in place."""
    t = p.shape[1]
    top, total = np.empty(t, np.float32), np.empty(t, np.float32)
    for j in range(n):
        copy(p[j], top)
        for i in range(1, n):
            row = p[i * n + j]
            for s in range(t):
                top[s] = max(top[s], row[s])
        total[:] = F(0)
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


@compiled()
def _softmax_gradient(p: Array, n: int, d: Array) -> None:
    """Set ``d`` to ``p (d − Σ_i p d)`` in each column."""
    total = np.empty(p.shape[1], np.float32)
    for j in range(n):
        total[:] = F(0)
        for i in range(n):
            a, g = p[i * n + j], d[i * n + j]
            for s in range(total.size):
                total[s] += a[s] * g[s]
        for i in range(n):
            a, g = p[i * n + j], d[i * n + j]
            for s in range(total.size):
                g[s] = a[s] * (g[s] - total[s])


@compiled()
def transformer(
    layers: Layers, batch: Batch, structure: Structure, is_tuned: bool, slopes: Layers
) -> float:
    """Return the loss on a batch; if anything is tuned, add the whole gradient to ``slopes``.

    Weights are in `Transformer`'s order. Of a head ``h``, ``u = W_Kᵀ W_Q z`` and ``v = W_O W_V z``
    for the tokens ``z`` before its block, and ``p`` is the softmax of ``zᵀ u``.
    """
    W, b, dW, db = layers.W, layers.b, slopes.W, slopes.b
    D, n, L, H = W.shape[1], structure.tokens, structure.blocks, structure.heads
    heads = L * H
    W_Q, W_K, W_V, W_O = W[:heads], W[heads:], W[2 * heads :], W[3 * heads :]
    W_1, W_2, W_out = W[4 * heads :], W[4 * heads + L :], W[4 * heads + 2 * L]
    dW_Q, dW_K, dW_V, dW_O = dW[:heads], dW[heads:], dW[2 * heads :], dW[3 * heads :]
    dW_1, dW_2, dW_out = dW[4 * heads :], dW[4 * heads + L :], dW[4 * heads + 2 * L]
    KQ, OV = np.zeros((heads, D, D), np.float32), np.zeros((heads, D, D), np.float32)
    dKQ, dOV = np.zeros((heads, D, D), np.float32), np.zeros((heads, D, D), np.float32)
    for h in range(heads):
        apply(W_K[h].T, W_Q[h], KQ[h])
        apply(W_O[h], W_V[h], OV[h])
    total = 0.0
    rows = structure.classes if structure.classes else D * n
    for start in range(0, batch.samples, structure.tile):
        t = min(structure.tile, batch.samples - start)
        inputs = batch.x[start * D * n : (start + t) * D * n].reshape(D, n * t)
        goal = batch.y[start * rows : (start + t) * rows].reshape(
            -1, t if structure.classes else n * t
        )
        size, squares = (D, n * t), (heads, n * n, t)
        # Products are added to zeros.
        u, v = np.zeros((heads, *size), np.float32), np.zeros((heads, *size), np.float32)
        p, attention = np.zeros(squares, np.float32), np.zeros((L, *size), np.float32)
        hidden, z = np.empty((L, *size), np.float32), np.empty((L, *size), np.float32)
        for l in range(L):
            tokens = inputs if l == 0 else z[l - 1]
            for h in range(l * H, (l + 1) * H):
                apply(KQ[h], tokens, u[h])
                _contract(tokens, u[h], n, p[h])
                _softmax(p[h], n)
                apply(OV[h], tokens, v[h])
                _mix(v[h], p[h], n, False, attention[l])
            set_rows(b[l], hidden[l])
            apply(W_1[l], attention[l], hidden[l])
            relu(hidden[l])
            set_rows(b[L + l], z[l])
            apply(W_2[l], hidden[l], z[l])
        out, dout = np.zeros(size, np.float32), np.empty(size, np.float32)
        apply(W_out, z[L - 1], out)
        total += loss(out, goal, batch.samples, structure, dout)
        if not is_tuned:
            continue
        dz, dhidden = np.zeros(size, np.float32), np.empty(size, np.float32)
        dattention, dp = np.empty(size, np.float32), np.empty(squares[1:], np.float32)
        du, dv = np.empty(size, np.float32), np.empty(size, np.float32)
        outer(dout, z[L - 1], dW_out)
        apply(W_out.T, dout, dz)
        for l in range(L - 1, -1, -1):
            tokens = inputs if l == 0 else z[l - 1]
            outer(dz, hidden[l], dW_2[l])
            add_rows(dz, db[L + l])
            dhidden[:] = F(0)
            apply(W_2[l].T, dz, dhidden)
            gate(hidden[l], dhidden)
            outer(dhidden, attention[l], dW_1[l])
            add_rows(dhidden, db[l])
            dattention[:] = F(0)
            apply(W_1[l].T, dhidden, dattention)
            dz[:] = F(0)
            for h in range(l * H, (l + 1) * H):
                dp[:], du[:], dv[:] = F(0), F(0), F(0)
                _contract(v[h], dattention, n, dp)
                _softmax_gradient(p[h], n, dp)
                _mix(dattention, p[h], n, True, dv)
                outer(dv, tokens, dOV[h])
                _mix(tokens, dp, n, False, du)
                outer(du, tokens, dKQ[h])
                if l > 0:
                    apply(OV[h].T, dv, dz)
                    _mix(u[h], dp, n, True, dz)
                    apply(KQ[h].T, du, dz)
    for h in range(heads):
        apply(W_K[h], dKQ[h], dW_Q[h])
        outer(W_Q[h], dKQ[h], dW_K[h])
        apply(W_O[h].T, dOV[h], dW_V[h])
        outer(dOV[h], W_V[h], dW_O[h])
    return total
