"""The numbers of adapters as one list of tensors that an optimizer may move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..adapters.core import Adapters, Tuned
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network

Parts = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Free:
    """Factors ``A`` and ``B`` of each weight in turn, then changes of biases, if these are tuned.

    Attributes
    ----------
    network
        The one that the adapters are for.
    start : tuple of Tensor
        The parts as the adapters have them.
    moves : tuple of bool
        Which parts hold numbers that are tuned.
    tuned : Tuned or None
        What `Adapters` says of it.
    """

    network: Any
    start: tuple[Tensor, ...]
    moves: tuple[bool, ...]
    tuned: Tuned | None

    @classmethod
    def of(cls, network: Network, adapters: Adapters, *, balanced: bool = False) -> Free:
        """Those of one network's adapters; balanced factors share a step alike.

        Raises `InputError` for batches, and for adapters that do not fit.
        """
        _checks.kind(Network, network=network)
        _checks.kind(Adapters, adapters=adapters)
        adapters.merge(network)
        if adapters.batch_shape or network.batch_shape:
            raise InputError("adapters", allowed="of a single network", given=adapters)
        like = network.weights[0]
        adapters = adapters.balanced() if balanced else adapters
        flat = [factor for u in adapters.updates for factor in (u.left, u.right)]
        start = tuple(part.detach().clone().to(like) for part in (*flat, *adapters.bias_updates))
        moves = [bool(part.numel()) for part in start]
        if adapters.tuned is not None and adapters.bias_updates:
            moves[len(flat) :] = adapters.tuned.biases.tolist()
        return cls(network, start, tuple(moves), adapters.tuned)

    @property
    def count(self) -> int:
        """How many numbers are tuned."""
        return sum(
            part.numel() for part, moves in zip(self.start, self.moves, strict=True) if moves
        )

    def moved(self, parts: Parts, step: Float[Tensor, " count"]) -> list[Tensor]:
        """The parts after a step of all that is tuned."""
        sizes = [part.numel() * moves for part, moves in zip(parts, self.moves, strict=True)]
        steps = zip(parts, step.split(sizes), self.moves, strict=True)
        return [part + by.reshape(part.shape) if moves else part for part, by, moves in steps]

    def adapters_of(self, parts: Parts) -> Adapters:
        """The adapters that these parts are; they may have batch dimensions."""
        weights = len(self.network.weights)
        values = [part.detach() for part in parts]
        pairs = zip(values[: 2 * weights : 2], values[1 : 2 * weights : 2], strict=True)
        updates = tuple(LowRank(*pair) for pair in pairs)
        return Adapters(updates, tuple(values[2 * weights :]), self.tuned)

    def merged(self, parts: Parts, *, last_relu: bool = True) -> Any:
        """The network with these parts, through which gradients flow, or without its last ReLU."""
        own = self.network if last_relu else self.network.without_last_relu()
        count = 2 * len(own.weights)
        factors = zip(parts[:count:2], parts[1:count:2], strict=True)
        weights = [w + A @ B.mT for w, (A, B) in zip(own.weights, factors, strict=True)]
        changes = parts[count:]
        biases = (
            [b + d for b, d in zip(own.biases, changes, strict=True)] if changes else own.biases
        )
        return own.holding(weights, biases)


def labelled(network: Network, name: str, pair: Any) -> tuple[Tensor, Tensor]:
    """Inputs and wanted outputs in the network's type; `InputError` where they do not fit."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(name, allowed="a pair of inputs and outputs", given=type(pair).__name__)
    x = network.as_inputs(pair[0], name)
    y = _checks.real_tensor(name, pair[1], min_dims=2).to(network.weights[0])
    wanted = tuple(network(x).shape)
    if tuple(y.shape) != wanted:
        raise InputError(name, allowed=f"outputs of shape {wanted}", given=tuple(y.shape))
    return x, y
