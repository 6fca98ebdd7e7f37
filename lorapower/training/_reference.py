"""The losses that runs are trained on, by torch: readable, of any network, differentiated by torch.

The tests compare the kernels with it, and networks without a kernel are trained by it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..networks.base import Network
from . import _steps
from ._state import Layers, State, Structure


def outputs(
    network: Network,
    W: Float[Tensor, "runs M D D"],
    b: Float[Tensor, "runs P D"],
    x: Float[Tensor, "runs D n samples"],
) -> Float[Tensor, "runs outputs n samples"]:
    """Compute outputs of networks of these numbers and of the given one's sizes."""
    weights = [W[:, m, : w.shape[-2], : w.shape[-1]] for m, w in enumerate(network.weights)]
    biases = [b[:, l, : bias.shape[-1]] for l, bias in enumerate(network.biases)]
    x = x[:, : network.weights[0].shape[-1]]
    if not network.sequences:
        tuned = network.with_parameters(weights, biases, checked=False)
        return tuned(x.flatten(-2)).unflatten(-1, x.shape[-2:])
    weights, biases = [w[:, None] for w in weights], [part[:, None] for part in biases]
    tuned = network.with_parameters(weights, biases, checked=False)
    return tuned(x.movedim(-1, 1)).movedim(1, -1)


def losses(
    network: Network,
    structure: Structure,
    W: Float[Tensor, "runs M D D"],
    b: Float[Tensor, "runs P D"],
    x: Float[Tensor, "D n samples"],
    y: Float[Tensor, "_ _ samples"],
    one_sided: Tensor | None = None,
) -> Float[Tensor, " runs"]:
    """Compute each run's mean squared error, or cross-entropy of the classes' summed votes.

    Where a run is ``one_sided``, the last ReLU acts only where an output should be 0.
    """
    x, y = (part.expand(len(W), *part.shape) for part in (x, y))
    if one_sided is None or not one_sided.any():
        return _mean(outputs(network, W, b, x), y, structure)
    before = outputs(network.without_last_relu(), W, b, x)  # type: ignore[attr-defined]
    wanted = y[:, : structure.outputs].reshape(before.shape) > 0
    is_open = one_sided[:, None, None, None] & wanted
    return _mean(torch.where(is_open, before, before.relu()), y, structure)


def _mean(out: Tensor, y: Tensor, structure: Structure) -> Float[Tensor, " runs"]:
    if not structure.classes:
        labels = y[:, : structure.outputs].reshape(out.shape)
        return (out - labels).square().mean((1, 2, 3))
    class_of = torch.as_tensor(structure.class_of[: structure.outputs], device=out.device)
    votes = out.new_zeros(len(out), structure.classes, out.shape[-1])
    votes = votes.index_add(1, class_of, out.sum(2))
    return -(y.squeeze(2) * votes.log_softmax(1)).sum(1).mean(-1)


def merged(state: State) -> Layers:
    """Return the layers of all runs, each with its adapters."""
    layers = Layers(np.empty_like(state.parameters.A), np.empty_like(state.parameters.b))
    for run in range(len(layers.W)):
        _steps.merge(state, run, Layers(layers.W[run], layers.b[run]))
    return layers


def advance(
    network: Network,
    state: State,
    batches: tuple[Float[Tensor, "steps D n samples"], Float[Tensor, "steps ..."]],
    validation: tuple[Float[Tensor, "D n others"], Float[Tensor, ...]],
    start: int,
) -> None:
    """Take the next steps of all runs, from step ``start`` on."""
    structure, course = state.structure, state.course
    one_sided = torch.as_tensor(state.frozen.one_sided)
    if start == 0:
        _record(network, state, validation, 0)
    for step, (x, y) in enumerate(zip(*batches, strict=True), start + 1):
        W, b = (torch.from_numpy(part).requires_grad_() for part in merged(state))
        with torch.enable_grad():
            now = losses(network, structure, W, b, x, y, one_sided)
            slopes = torch.autograd.grad(
                now.sum(), (W, b), allow_unused=True, materialize_grads=True
            )
        now = now.detach()
        course.stopped[:] |= ~now.isfinite().numpy()
        for run in np.flatnonzero(~course.stopped).tolist():
            own = Layers(*(slope[run].numpy() for slope in slopes))
            _steps.update(state, run, own, step)
            if step % structure.every == 0:
                course.training[run, step // structure.every] = now[run]
        if step % structure.every == 0:
            _record(network, state, validation, step)


def _record(network: Network, state: State, validation: tuple[Tensor, Tensor], step: int) -> None:
    W, b = (torch.from_numpy(part) for part in merged(state))
    now = losses(network, state.structure, W, b, *validation)
    for run in np.flatnonzero(~state.course.stopped).tolist():
        _steps.record(state, run, float(now[run]), step)
