"""Training steps of all runs at once, by torch, on any device; `_compiled` is compared with it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..networks.base import Network
from ..networks.layers import FNN
from ._compiled import BETA_1, BETA_2, EPSILON, State, Structure


def outputs(
    network: Network,
    W: Float[Tensor, "runs M D D"],
    b: Float[Tensor, "runs P D"],
    x: Float[Tensor, "runs D n samples"],
) -> Float[Tensor, "runs outputs n samples"]:
    """Outputs, sample by sample, of networks of these numbers and of the given one's sizes."""
    weights = [W[:, m, : w.shape[-2], : w.shape[-1]] for m, w in enumerate(network.weights)]
    biases = [b[:, l, : bias.shape[-1]] for l, bias in enumerate(network.biases)]
    x = x[:, : network.weights[0].shape[-1]]
    if not network.sequences:
        return network.holding(weights, biases)(x.flatten(-2)).unflatten(-1, x.shape[-2:])
    tuned = network.holding([w[:, None] for w in weights], [part[:, None] for part in biases])
    return tuned(x.movedim(-1, 1)).movedim(1, -1)


def loss(
    out: Tensor, y: Tensor, structure: Structure, one_sided: Tensor | None = None
) -> Float[Tensor, " runs"]:
    """Mean squared error of the outputs, or cross-entropy of the classes' summed votes."""
    # Where some runs are one-sided, ``out`` are arguments of the last ReLU, which acts here: in
    # these runs where an output is to be 0, in others everywhere.
    if not structure.classes:
        labels = y[:, : structure.outputs].reshape(out.shape)
        if one_sided is not None:
            whole = one_sided[:, None, None, None] & (labels > 0)
            out = torch.where(whole, out, out.relu())
        return (out - labels).square().mean((1, 2, 3))
    class_of = torch.as_tensor(structure.class_of[: structure.outputs], device=out.device)
    counted = class_of >= 0
    votes = out.new_zeros(len(out), structure.classes, out.shape[-1])
    votes = votes.index_add(1, class_of[counted], out[:, counted].sum(2))
    return -(y.squeeze(2) * votes.log_softmax(1)).sum(1).mean(-1)


def losses(
    network: Network,
    structure: Structure,
    state: State[Tensor],
    W: Float[Tensor, "runs M D D"],
    b: Float[Tensor, "runs P D"],
    x: Float[Tensor, "runs D n samples"],
    y: Float[Tensor, "runs _ _ samples"],
) -> Float[Tensor, " runs"]:
    """The loss that each run is trained on, for networks of these numbers."""
    if not state.one_sided.any():
        return loss(outputs(network, W, b, x), y, structure)
    assert isinstance(network, FNN)
    return loss(outputs(network.without_last_relu(), W, b, x), y, structure, state.one_sided)


def weights(state: State[Tensor], A: Tensor, B: Tensor) -> Float[Tensor, "runs M D D"]:
    """``W_m + Σ_r A[r] B[r]ᵀ`` over the rows that count, or ``A`` where it is tuned in full."""
    rows = torch.arange(A.shape[-2], device=A.device) < state.ranks[..., None]
    updates = (A * rows[..., None]).mT @ B
    full = (state.ranks < 0)[..., None, None]
    return torch.where(full, A, state.frozen[state.problem] + updates)


def biases(
    state: State[Tensor], W: Float[Tensor, "runs M D D"], b: Float[Tensor, "runs P D"]
) -> Float[Tensor, "runs P D"]:
    """``b``, or ``b − W m`` where the inputs of weights are centred."""
    if not state.centre.any():
        return b
    return b - (W @ state.centre[..., None]).squeeze(-1)


@torch.no_grad()
def advance(
    network: Network,
    structure: Structure,
    state: State[Tensor],
    x: Float[Tensor, "sources steps D n samples"],
    y: Float[Tensor, "sources steps _ _ samples"],
    x_validation: Float[Tensor, "sources D n others"],
    y_validation: Float[Tensor, "sources _ _ others"],
    start: int,
    every: int,
) -> None:
    """Take the next steps of all runs, from step ``start`` on."""
    if start == 0:
        _validate(network, structure, state, x_validation, y_validation, 0, every)
    for step in range(start, start + x.shape[1]):
        tuned = [t.detach().requires_grad_() for t in (state.A, state.B, state.b)]
        with torch.enable_grad():
            inputs = x[state.source, step - start]
            W, labels = weights(state, *tuned[:2]), y[state.source, step - start]
            b = biases(state, W, tuned[2])
            now = losses(network, structure, state, W, b, inputs, labels)
            gradients = torch.autograd.grad(now.sum(), tuned, allow_unused=True)
        going = ~state.stopped & now.isfinite()
        state.stopped.logical_or_(~now.isfinite())
        rows = torch.arange(state.A.shape[-2], device=state.A.device)
        factor_rows = (rows < state.ranks[..., None])[..., None]
        full = (state.ranks < 0)[..., None, None]
        ratio = torch.where(full, 1, state.ratio[:, None, None, None])
        for values, moments, gradient, counts, faster in (
            (state.A, state.A_moments, gradients[0], factor_rows | full, ratio),
            (state.B, state.B_moments, gradients[1], factor_rows, 1),
            (state.b, state.b_moments[..., 0, :], gradients[2], state.tuned[..., None], 1),
        ):
            if gradient is not None:
                moves = counts & going.reshape(-1, *[1] * (values.ndim - 1))
                step_of = (step + 1, structure.steps)
                _adam(state, values, moments, gradient, moves, faster, *step_of)
        if (step + 1) % every == 0:
            point = (step + 1) // every
            state.training[going, point] = now[going].detach()
            _validate(network, structure, state, x_validation, y_validation, step + 1, every)


def _adam(
    state: State[Tensor],
    values: Tensor,
    moments: Tensor,
    slope: Tensor,
    moves: Tensor,
    faster: Tensor | int,
    step: int,
    steps: int,
) -> None:
    """One step of Adam with L2 penalty where ``moves``, ``faster`` times the rate."""
    one = (-1, *[1] * (values.ndim - 1))
    part = torch.where(state.falling, (1 + math.cos(math.pi * (step - 1) / steps)) / 2, 1.0)
    rate, decay = (state.rate * part).reshape(one), state.decay.reshape(one)
    first, second = moments.unbind(2)
    slope = slope + decay * values
    first.copy_(torch.where(moves, BETA_1 * first + (1 - BETA_1) * slope, first))
    second.copy_(torch.where(moves, BETA_2 * second + (1 - BETA_2) * slope.square(), second))
    denominator = second.sqrt() / (1 - BETA_2**step) ** 0.5 + EPSILON
    length = faster * rate / (1 - BETA_1**step)
    values.sub_(torch.where(moves, length * first / denominator, 0))


def _validate(
    network: Network,
    structure: Structure,
    state: State[Tensor],
    x: Tensor,
    y: Tensor,
    step: int,
    every: int,
) -> None:
    W = weights(state, state.A, state.B)
    out = outputs(network, W, biases(state, W, state.b), x[state.source])
    now = loss(out, y[state.source], structure)
    if step == 0:
        state.goal.mul_(now)
    going = ~state.stopped
    state.validation[going, step // every] = now[going]
    better = going & (now < state.best)
    state.best[better], state.best_step[better] = now[better], step
    for name in ("A", "B", "b"):
        getattr(state, f"{name}_best")[better] = getattr(state, name)[better]
    state.stopped.logical_or_(~now.isfinite() | (state.best <= state.goal))
