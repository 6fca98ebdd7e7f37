"""Where runs start, if not from the study's factors, which `Stack` draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters
from ..constructions import fnn
from ..errors import InputError
from ..networks.fnn import FNN
from ..networks.partition import Partition
from ..regions import Ball
from . import reference
from .compiled import Array, State, Structure
from .stack import Batches, Stack
from .tuning import Tuning

# Of lengths halved so often a spectral start has the one that lowers the first batch's loss most.
HALVINGS = 24


def put(
    stack: Stack[Any],
    structure: Structure,
    state: State[Any],
    tunings: Sequence[Tuning],
    batches: Batches,
) -> None:
    """The starts that are asked for in the place of the study's.

    Raises `InputError` for adapters that do not fit or exceed the ranks of their tuning, and for
    the linearized start of what is no ReLU network or has fewer layers than blocks.
    """
    for i, tuning in enumerate(tunings):
        runs = slice(i * stack.members, (i + 1) * stack.members)
        if isinstance(tuning.start, Adapters):
            most = stack.ranks(tuning)
            ranks = tuning.start.ranks
            if len(most) != len(ranks) or any(map(int.__gt__, ranks, most)):
                allowed = f"adapters of ranks up to {most}"
                raise InputError("start", allowed=allowed, given=tuning.start)
            _given(stack, state, runs, tuning.start)
        elif tuning.start == "linearized":
            _given(stack, state, runs, _linearized(stack, tuning.blocks, batches))
        elif tuning.start == "spectral":
            _spectral(stack, structure, state, runs, batches)
        # The best so far is the start.
        for best, values in (
            (state.A_best, state.A),
            (state.B_best, state.B),
            (state.b_best, state.b),
        ):
            best[runs] = values[runs]


def _given(stack: Stack[Any], state: State[Any], runs: slice, start: Adapters) -> None:
    """Adapters' factors in the place of as many of the study's, and their biases."""
    batch = stack.network.batch_shape
    if torch.broadcast_shapes(start.batch_shape, batch) != batch:
        raise InputError("start", allowed=f"of batch shape {tuple(batch)}", given=start)
    start.merge(stack.network)

    def flat(values: Tensor, dims: int) -> Array:
        rest = values.shape[values.ndim - dims :]
        every = values.expand(*stack.network.batch_shape, *rest)
        return every.reshape(stack.members, *rest).to("cpu", torch.float32).numpy()

    for m, update in enumerate(start.updates):
        for factors, given in ((state.A, update.left), (state.B, update.right)):
            factors[runs, m, : update.rank, : given.shape[-2]] = flat(given.mT, 2)
    for l, change in enumerate(start.bias_updates):
        state.b[runs, l, : change.shape[-1]] += flat(change, 1)


def _linearized(stack: Stack[Any], blocks: int, batches: Batches) -> Adapters:
    """Biases with which inner ReLUs are idle in a ball that holds the inputs seen so far."""
    network = stack.network
    if not isinstance(network, FNN):
        allowed = "'study', 'spectral' or adapters, but for ReLU networks"
        raise InputError("start", allowed=allowed, given=f"'linearized' for {network}")
    blocks = _checks.integer("blocks", blocks, 1, network.depth, limit="the depth")
    partition = Partition.uniform(network.depth, blocks)
    # Of the first batches all inputs beside one another.
    first = batches.first[0].movedim(1, -1).flatten(-2)
    seen = torch.cat([batches.validation[0], first], -1)
    of_source = Ball.about(seen[..., : stack.inputs, 0, :].double())
    sources, shape = batches.sources.tolist(), network.batch_shape
    centres = of_source.centre[sources, :, 0].reshape(*shape, -1)
    ball = Ball(of_source.radius[sources].reshape(shape), centres)
    # Of rank 0: all that the construction gives are biases.
    exact = network.to(torch.float64, "cpu")
    goal = exact.linearize(partition.slices)
    return fnn.adapt(exact, goal, 0, ball, partition, throw=False).adapters


def _spectral(
    stack: Stack[Any], structure: Structure, state: State[Any], runs: slice, batches: Batches
) -> None:
    """``t U_R S_R V_Rᵀ`` of each weight's first gradient, shared by both factors alike."""
    x, y = (
        torch.as_tensor(part)[torch.as_tensor(state.source[runs]), 0].to(stack.network.device)
        for part in batches.first
    )
    here: State[Tensor] = State(
        *(
            torch.as_tensor(part if name == "frozen" else part[runs]).to(stack.network.device)
            for name, part in state._asdict().items()
        )
    )

    def losses(W: Tensor) -> Tensor:
        return reference.losses(stack.network, structure, here, W, here.b, x, y)

    W = here.frozen[here.problem].clone()
    with torch.enable_grad():
        slopes = torch.autograd.grad(losses(W.requires_grad_()).sum(), W)[0]
    W = W.detach()
    U, S, Vh = torch.linalg.svd(-slopes)
    rows = torch.arange(W.shape[-1], device=W.device) < here.ranks[..., None]
    S = S * rows / S.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)
    direction = (U * S[..., None, :]) @ Vh
    lengths = W.new_tensor([0.5**k for k in range(HALVINGS)])
    tried = torch.stack([losses(W + t * direction) for t in lengths]).nan_to_num(torch.inf)
    # A direction of which nothing is learned keeps the study's factors, and so does a run that no
    # length helps.
    learned = (S > 0) & (tried.amin(0) < losses(W))[:, None, None]
    root = (lengths[tried.argmin(0)][:, None, None] * S).sqrt()[..., None]
    state.A[runs] = torch.where(learned[..., None], root * U.mT, here.A).cpu().numpy()
    state.B[runs] = torch.where(learned[..., None], root * Vh, here.B).cpu().numpy()
