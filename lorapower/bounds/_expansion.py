"""The error of an adapted network to first order in what its segments differ by."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.functional import jvp

from ..networks.base import Network
from ..networks.layers import FNN
from ..networks.transformer import Transformer
from .layers import variance

# From what one stage of a network leaves to what the next one leaves.
_Stage = Callable[..., tuple[Tensor, ...]]


def first_order(
    adapted: Network, target: Network, inputs: Float[Tensor, "*batch width n"]
) -> Float[Tensor, ""]:
    """Compute ``E‖Σ_s J_s δ_s‖²`` over the variance of the target's outputs: a relative error.

    At the target's activations, ``δ_s`` is the difference of segment ``s`` between the adapted
    network and the target, and ``J_s`` the derivative of what follows ``s`` in the adapted network.
    A segment ends before a ReLU, a softmax, or the next block. The error is exact for linear
    networks, and not finite where the target is constant on the inputs.

    The networks are of one kind, of equal sizes and without batches, as in a
    `constructions.fused.Fused`. Inputs are columns ``[in, samples]`` or, for transformers,
    sequences ``[..., width, tokens]``. Source: [prop-first-order].
    """
    state: tuple[Tensor, ...] = (target.as_inputs(inputs, "inputs"),)
    moved = torch.zeros((), dtype=target.dtype, device=target.device)
    stages = _stages(adapted)
    for s, target_stage in enumerate(_stages(target)):
        reached, state = stages[s](*state), target_stage(*state)

        def follow(*state: Tensor, s: int = s) -> Tensor:
            return reduce(lambda state, stage: stage(*state), stages[s + 1 :], state)[0]

        missed = tuple(a - b for a, b in zip(reached, state, strict=True))
        # Twice backward: forward, torch would compile what it deprecates.
        moved = moved + jvp(follow, state, missed)[1]
    return moved.square().mean() / variance(state[0])


def _stages(network: Network) -> list[_Stage]:
    """Cut the network into a chain of stages that end where segments end."""
    if isinstance(network, Transformer):
        return _transformer_stages(network)
    if isinstance(network, FNN):
        return _fnn_stages(network)
    return [lambda x: (network(x),)]


def _fnn_stages(network: FNN) -> list[_Stage]:
    def layer(l: int) -> _Stage:
        W, b = network.weights[l], network.biases[l][:, None]
        return lambda z: (W @ (z.relu() if l else z) + b,)

    stages = [layer(l) for l in range(network.depth)]
    return stages if network.linear_last else [*stages, lambda p: (p.relu(),)]


def _transformer_stages(network: Transformer) -> list[_Stage]:
    def block(l: int) -> list[_Stage]:
        def score(z: Tensor) -> tuple[Tensor, Tensor]:
            return network.scores(l, z), z

        def attend(scores: Tensor, z: Tensor) -> Tensor:
            return network.attend(l, z, network.patterns(scores))

        if network.is_plain:
            # Attention and W_1 are one segment, and nothing is added to what is fed forward.
            return [
                score,
                lambda scores, z: (network.hidden(l, attend(scores, z)),),
                lambda p: (network.feed_forward(l, p, p),),
            ]
        return [
            score,
            lambda scores, z: (attend(scores, z),),
            lambda u: (network.hidden(l, u), u),
            lambda p, u: (network.feed_forward(l, u, p),),
        ]

    blocks = [stage for l in range(network.depth) for stage in block(l)]
    return [*blocks, lambda z: (network.output(z),)]
