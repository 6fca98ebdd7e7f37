"""Where training starts, if not where the study's experiments do."""

from __future__ import annotations

from collections.abc import Sequence
from operator import gt

import torch
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..constructions import fnn
from ..errors import InputError
from ..networks.layers import FNN
from ..networks.partition import Partition
from ..regions import Ball
from . import _reference
from ._state import Array, Stack, State
from .tuning import MARGIN, Tuning

# A spectral start tries lengths halved up to so often, and takes the best on the first batch.
HALVINGS = 24


def put_starts(stack: Stack, state: State, tunings: Sequence[Tuning]) -> None:
    """Replace the start ``"study"`` of all runs where another one is asked for."""
    for i, tuning in enumerate(tunings):
        runs = slice(i * stack.members, (i + 1) * stack.members)
        if isinstance(tuning.start, Adapters):
            caps, ranks = stack.ranks(tuning), tuning.start.ranks
            if len(ranks) != len(caps) or any(map(gt, ranks, caps)):
                allowed = f"adapters of ranks up to {caps}"
                raise InputError("start", allowed=allowed, given=tuning.start)
            _put(stack, state, runs, tuning.start)
        elif tuning.start == "linearized":
            _put(stack, state, runs, _linearized(stack, tuning.blocks))
        elif tuning.start == "spectral":
            _spectral(stack, state, runs)
        if tuning.centred:
            _centre(stack, state, runs)
    for best, start in zip(state.best, state.parameters, strict=True):
        best[:] = start


def _put(stack: Stack, state: State, runs: slice, start: Adapters) -> None:
    """Replace as many of the study's factors as there are adapters', and their biases."""
    batch = stack.network.batch_shape
    if torch.broadcast_shapes(start.batch_shape, batch) != batch:
        raise InputError("start", allowed=f"of batch shape {tuple(batch)}", given=start)
    start.merge(stack.network)

    def flat(values: Tensor, dims: int) -> Array:
        rest = values.shape[values.ndim - dims :]
        every = values.expand(*batch, *rest).reshape(stack.members, *rest)
        return every.to("cpu", torch.float32).numpy()

    A, B, b = state.parameters
    for m, update in enumerate(start.updates):
        for factors, given in ((A, update.left), (B, update.right)):
            factors[runs, m, : update.rank, : given.shape[-2]] = flat(given.mT, 2)
    for l, change in enumerate(start.bias_updates):
        b[runs, l, : change.shape[-1]] += flat(change, 1)


def _linearized(stack: Stack, blocks: int) -> Adapters:
    """Find biases with which inner ReLUs idle in a ball that holds the inputs seen so far."""
    network = stack.network
    if not isinstance(network, FNN):
        allowed = "'study', 'spectral' or adapters, but for ReLU networks"
        raise InputError("start", allowed=allowed, given=f"'linearized' for {network}")
    blocks = _checks.integer("blocks", blocks, 1, network.depth, limit="the depth")
    partition = Partition.uniform(network.depth, blocks)
    # All inputs of the first batches, side by side.
    first = stack.first[0].movedim(0, -1).flatten(-2)
    inputs = torch.cat([stack.validation[0], first], -1)[: stack.inputs, 0]
    ball = Ball.about(inputs.double(), MARGIN)
    return fnn.idle(network.to(torch.float64, "cpu"), ball, partition)


def _centre(stack: Stack, state: State, runs: slice) -> None:
    """Write layers as ``W (z − m) + c``, ``m`` the mean of ``z`` on the first batches."""
    if not isinstance(stack.network, FNN):
        given = f"True for {stack.network}"
        raise InputError("centred", allowed="False, but for ReLU networks", given=given)
    W, b = (torch.from_numpy(part[runs]).double() for part in _reference.merged(state))
    z = stack.first[0].movedim(0, -1).flatten(-3).double()
    for l in range(len(stack.shapes)):
        centre = z.mean(-1)
        z = W[:, l] @ z + b[:, l, :, None]
        z = z.relu() if l < stack.network.relus else z
        state.frozen.centre[runs, l] = centre.numpy()
        state.parameters.b[runs, l] += (W[:, l] @ centre[..., None]).squeeze(-1).numpy()


def _spectral(stack: Stack, state: State, runs: slice) -> None:
    """Put ``t U_R S_R V_Rᵀ`` of each weight's first gradient, shared equally by both factors."""
    network, frozen = stack.network.to(device="cpu"), state.frozen
    x, y = (part[0] for part in stack.first)
    A, B, b = (torch.from_numpy(part[runs]) for part in state.parameters)
    one_sided = torch.from_numpy(frozen.one_sided[runs])

    def losses(W: Tensor) -> Tensor:
        return _reference.losses(network, state.structure, W, b, x, y, one_sided)

    W = torch.from_numpy(frozen.weights[frozen.network[runs]])
    with torch.enable_grad():
        slopes = torch.autograd.grad(losses(W.requires_grad_()).sum(), W)[0]
    W = W.detach()
    U, S, Vh = torch.linalg.svd(-slopes)
    rows = torch.arange(W.shape[-1]) < torch.from_numpy(frozen.ranks[runs])[..., None]
    S = S * rows / S.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)
    direction = (U * S[..., None, :]) @ Vh
    lengths = W.new_tensor([0.5**k for k in range(HALVINGS)])
    tried = torch.stack([losses(W + t * direction) for t in lengths]).nan_to_num(torch.inf)
    # A direction without a gradient keeps the study's factors, and so does a run that no length
    # helps.
    learned = (S > 0) & (tried.amin(0) < losses(W))[:, None, None]
    root = (lengths[tried.argmin(0)][:, None, None] * S).sqrt()[..., None]
    A[:] = torch.where(learned[..., None], root * U.mT, A)
    B[:] = torch.where(learned[..., None], root * Vh, B)
