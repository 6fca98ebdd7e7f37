"""What adapted networks miss on given inputs, to first order."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.functional import jvp

from .. import _checks
from ..networks.base import Network
from ..networks.fnn import FNN
from ..networks.linear import LinearNetwork
from ..networks.transformer import Transformer

# From what one stage of a network leaves to what the next one leaves.
_Stage = Callable[..., tuple[Tensor, ...]]


def first_order(
    adapted: Network, target: Network, inputs: Float[Tensor, "*batch width n"]
) -> Float[Tensor, ""]:
    """``E‖Σ_s J_s δ_s‖²`` over the variance of the target's outputs: an error to first order.

    ``δ_s`` is the difference between what segment ``s`` of the adapted network and that of the
    target make of the target's activations before it. ``J_s`` is the derivative of all that follows
    ``s`` in the adapted network, at the target's activations. A segment ends before a ReLU, a
    softmax, or the next block. The error is relative, as in `constructions.fitted`. Of linear
    networks it is exact. It is not finite where the target's outputs do not vary on the inputs.

    Raises `InputError` for networks of two kinds or of different sizes. Source: [prop-first-order].

    Parameters
    ----------
    adapted, target : Network
        Of one kind and of equal sizes, one of each, such as those of a `constructions.fused.Fused`.
    inputs : Tensor
        Columns ``[in, samples]``, of transformers sequences ``[..., width, tokens]``.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, adapted=adapted)
    _checks.kind(type(adapted), target=target)
    _checks.same_sizes(adapted, target)
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


def variance(outputs: Float[Tensor, "*samples out n"]) -> Float[Tensor, ""]:
    """The mean squared error of the best constant: each output's variance, and their mean.

    Over all samples and tokens. Raises `InputError` for numbers that are not finite.
    """
    y = _checks.real_tensor("outputs", outputs, min_dims=2)
    return y.movedim(-2, 0).flatten(1).var(-1, correction=0).mean()


def _stages(network: Network) -> list[_Stage]:
    """A network cut where segments end; together the stages are the network."""
    if isinstance(network, Transformer):
        return _transformer(network)
    if isinstance(network, FNN):
        return _fnn(network)
    return [lambda x: (network(x),)]


def _fnn(network: FNN) -> list[_Stage]:
    stages: list[_Stage] = []
    for l, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):

        def layer(z: Tensor, l: int = l, W: Tensor = weight, b: Tensor = bias) -> tuple[Tensor]:
            return (W @ (z.relu() if l else z) + b[:, None],)

        stages.append(layer)
    return stages if network.linear_last else [*stages, lambda p: (p.relu(),)]


def _transformer(network: Transformer) -> list[_Stage]:
    stages: list[_Stage] = []
    for l in range(network.depth):
        stages.append(lambda z, l=l: (network.scores(l, network.reads(z, "1", l)), z))

        def attend(scores: Tensor, z: Tensor, l: int = l) -> tuple[Tensor]:
            return (network.attend(l, z, network.patterns(scores)),)

        def hidden(u: Tensor, l: int = l) -> tuple[Tensor, Tensor]:
            return network.hidden(l, u), u

        def attend_and_hidden(scores: Tensor, z: Tensor, l: int = l) -> tuple[Tensor]:
            return (network.hidden(l, network.attend(l, z, network.patterns(scores))),)

        if network.is_plain:
            # Attention and W_1 are one segment, and nothing is added to what is fed forward.
            stages += [attend_and_hidden, lambda p, l=l: (network.feed_forward(l, p, p),)]
        else:
            stages += [attend, hidden, lambda p, u, l=l: (network.feed_forward(l, u, p),)]
    return [*stages, lambda z: (network.end(z),)]
