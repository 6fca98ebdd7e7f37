"""Training steps of all runs at once, as one would write them down; on any device.

What `compiled` computes, run by run, on processors. Gradients are torch's own.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .compiled import BETA_1, BETA_2, EPSILON, State, Structure


def outputs(
    W: Float[Tensor, "runs M D D"],
    b: Float[Tensor, "runs P D"],
    x: Float[Tensor, "runs D n samples"],
    structure: Structure,
) -> Float[Tensor, "runs D n samples"]:
    """What networks return, sample by sample."""
    if structure.blocks:
        return _transformer(W, b, x, structure)
    z = x.flatten(-2)
    for l in range(W.shape[1]):
        z = W[:, l] @ z + b[:, l, :, None]
        z = z.relu() if l < structure.relus else z
    return z.unflatten(-1, x.shape[-2:])


def _transformer(W: Tensor, b: Tensor, x: Tensor, structure: Structure) -> Tensor:
    L, H = structure.blocks, structure.heads
    heads = W[:, : 4 * L * H].unflatten(1, (4, L, H))
    W_1, W_2 = W[:, 4 * L * H :][:, :L], W[:, 4 * L * H + L :][:, :L]
    z = x
    for l in range(L):
        Q, K, V, O = heads[:, :, l].unbind(1)
        queries, keys, values = (torch.einsum("rhij,rjns->rhins", w, z) for w in (Q, K, V))
        patterns = torch.einsum("rhiks,rhiqs->rhkqs", keys, queries).softmax(-3)
        mixed = torch.einsum("rhiks,rhkqs->rhiqs", values, patterns)
        attention = torch.einsum("rhij,rhjqs->riqs", O, mixed)
        hidden = torch.einsum("rij,rjns->rins", W_1[:, l], attention) + b[:, l, :, None, None]
        z = torch.einsum("rij,rjns->rins", W_2[:, l], hidden.relu())
        z = z + b[:, L + l, :, None, None]
    return torch.einsum("rij,rjns->rins", W[:, -1], z)


def loss(out: Tensor, y: Tensor, structure: Structure) -> Float[Tensor, " runs"]:
    """Mean squared error of the outputs, or cross-entropy of the classes' summed votes."""
    if not structure.classes:
        difference = (out - y.reshape(out.shape))[:, : structure.outputs]
        return difference.square().mean((1, 2, 3))
    class_of = torch.as_tensor(structure.class_of, device=out.device)
    counted = class_of >= 0
    votes = out.new_zeros(len(out), structure.classes, out.shape[-1])
    votes = votes.index_add(1, class_of[counted], out[:, counted].sum(2))
    return -(y.squeeze(2) * votes.log_softmax(1)).sum(1).mean(-1)


def weights(state: State[Tensor], A: Tensor, B: Tensor) -> Float[Tensor, "runs M D D"]:
    """``W_m + Σ_r A[r] B[r]ᵀ`` over the rows that count, or ``A`` where it is tuned in full."""
    rows = torch.arange(A.shape[-2], device=A.device) < state.ranks[..., None]
    updates = (A * rows[..., None]).mT @ B
    full = (state.ranks < 0)[..., None, None]
    return torch.where(full, A, state.frozen[state.problem] + updates)


@torch.no_grad()
def advance(
    structure: Structure,
    state: State[Tensor],
    x: Float[Tensor, "sources steps D n samples"],
    y: Float[Tensor, "sources steps _ _ samples"],
    x_validation: Float[Tensor, "sources D n others"],
    y_validation: Float[Tensor, "sources _ _ others"],
    start: int,
    every: int,
) -> None:
    """Some steps of all runs, from step ``start`` on."""
    if start == 0:
        _validate(structure, state, x_validation, y_validation, 0, every)
    for step in range(start, start + x.shape[1]):
        tuned = [t.detach().requires_grad_() for t in (state.A, state.B, state.b)]
        with torch.enable_grad():
            out = outputs(
                weights(state, *tuned[:2]), tuned[2], x[state.source, step - start], structure
            )
            losses = loss(out, y[state.source, step - start], structure)
            gradients = torch.autograd.grad(losses.sum(), tuned, allow_unused=True)
        going = ~state.stopped & losses.isfinite()
        state.stopped.logical_or_(~losses.isfinite())
        rows = torch.arange(state.A.shape[-2], device=state.A.device)
        factor_rows = (rows < state.ranks[..., None])[..., None]
        full = (state.ranks < 0)[..., None, None]
        for values, moments, gradient, counts in (
            (state.A, state.A_moments, gradients[0], factor_rows | full),
            (state.B, state.B_moments, gradients[1], factor_rows),
            (state.b, state.b_moments[..., 0, :], gradients[2], state.tuned[..., None]),
        ):
            if gradient is not None:
                moves = counts & going.reshape(-1, *[1] * (values.ndim - 1))
                _adam(state, values, moments, gradient, moves, step + 1, structure.steps)
        if (step + 1) % every == 0:
            point = (step + 1) // every
            state.training[going, point] = losses[going]
            _validate(structure, state, x_validation, y_validation, step + 1, every)


def _adam(
    state: State[Tensor],
    values: Tensor,
    moments: Tensor,
    slope: Tensor,
    moves: Tensor,
    step: int,
    steps: int,
) -> None:
    """One step of Adam with L2 penalty, where ``moves`` says so."""
    one = (-1, *[1] * (values.ndim - 1))
    part = torch.where(state.falling, (1 + math.cos(math.pi * (step - 1) / steps)) / 2, 1.0)
    rate, decay = (state.rate * part).reshape(one), state.decay.reshape(one)
    first, second = moments.unbind(2)
    slope = slope + decay * values
    first.copy_(torch.where(moves, BETA_1 * first + (1 - BETA_1) * slope, first))
    second.copy_(torch.where(moves, BETA_2 * second + (1 - BETA_2) * slope.square(), second))
    denominator = second.sqrt() / (1 - BETA_2**step) ** 0.5 + EPSILON
    values.sub_(torch.where(moves, rate / (1 - BETA_1**step) * first / denominator, 0))


def _validate(
    structure: Structure, state: State[Tensor], x: Tensor, y: Tensor, step: int, every: int
) -> None:
    out = outputs(weights(state, state.A, state.B), state.b, x[state.source], structure)
    losses = loss(out, y[state.source], structure)
    if step == 0:
        state.goal.mul_(losses)
    going = ~state.stopped
    state.validation[going, step // every] = losses[going]
    better = going & (losses < state.best)
    state.best[better], state.best_step[better] = losses[better], step
    for best, values in (
        (state.A_best, state.A),
        (state.B_best, state.B),
        (state.b_best, state.b),
    ):
        best[better] = values[better]
    state.stopped.logical_or_(~losses.isfinite() | (state.best <= state.goal))
