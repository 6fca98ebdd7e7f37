"""The numbers of adapters as a list of tensors for an optimizer, and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..adapters import Adapters, Tuned
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network

Parts = Sequence[Tensor]
# Inputs and outputs.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Free:
    """Factors ``A`` and ``B`` of each weight in turn, then changes of biases, if they are tuned."""

    network: Any
    # The parts of the adapters, and which of them are tuned.
    start: Parts
    moves: Sequence[bool]
    tuned: Tuned | None

    @classmethod
    def of(cls, network: Network, adapters: Adapters) -> Free:
        """Take the numbers of one network's adapters; refuse batches and what does not fit."""
        require_fit(network, adapters)
        factors = [factor for u in adapters.updates for factor in (u.left, u.right)]
        parts = *factors, *adapters.bias_updates
        start = [part.detach().clone().to(network.weights[0]) for part in parts]
        moves = [bool(part.numel()) for part in start]
        if adapters.tuned is not None and adapters.bias_updates:
            moves[len(factors) :] = adapters.tuned.biases.tolist()
        return cls(network, start, moves, adapters.tuned)

    @property
    def count(self) -> int:
        """How many numbers are tuned."""
        return sum(part.numel() for part in self.select(self.start))

    def select(self, parts: Parts) -> list[Tensor]:
        """Pick the parts that are tuned."""
        return [part for part, moves in zip(parts, self.moves, strict=True) if moves]

    def insert(self, tuned: Parts) -> list[Tensor]:
        """Return all parts, with the tuned ones replaced by these."""
        each = iter(tuned)
        pairs = zip(self.start, self.moves, strict=True)
        return [next(each) if moves else part for part, moves in pairs]

    def fill(self, flat: Float[Tensor, " count"]) -> list[Tensor]:
        """Return all parts, with the tuned ones set to these numbers."""
        tuned = self.select(self.start)
        each = flat.split([part.numel() for part in tuned])
        pairs = zip(each, tuned, strict=True)
        return self.insert([new.reshape(old.shape) for new, old in pairs])

    def adapters_of(self, parts: Parts) -> Adapters:
        """Return adapters of these parts, which may have batch dimensions."""
        factors = 2 * len(self.network.weights)
        values = [part.detach() for part in parts]
        updates = map(LowRank, values[:factors:2], values[1:factors:2])
        return Adapters(tuple(updates), tuple(values[factors:]), self.tuned)

    def merge(self, parts: Parts) -> Any:
        """Make the network with these parts, open to gradients."""
        network, count = self.network, 2 * len(self.network.weights)
        triples = zip(network.weights, parts[:count:2], parts[1:count:2], strict=True)
        weights = [W + A @ B.mT for W, A, B in triples]
        # There are no changes where no bias is tuned.
        pairs = zip(network.biases, parts[count:], strict=False)
        biases = [b + change for b, change in pairs] or None
        return network.with_parameters(weights, biases, checked=False)

    def error(self, parts: Parts, pair: Pair) -> Tensor:
        """Compute the mean squared error of the network with these parts."""
        return (self.merge(parts)(pair[0]) - pair[1]).square().mean()


def require_fit(network: Network, adapters: Adapters) -> None:
    """Refuse adapters that do not fit the network, and batches."""
    adapters.merge(network)
    if adapters.batch_shape or network.batch_shape:
        raise InputError("adapters", allowed="of a single network", given=adapters)


def labelled(network: Network, name: str, pair: Pair) -> Pair:
    """Return inputs and outputs in the network's type; `InputError` where they do not fit."""
    x = network.as_inputs(pair[0], name)
    y = _checks.real_tensor(name, pair[1], min_dims=2).to(network.weights[0])
    shape = tuple(network(x).shape)
    if tuple(y.shape) != shape:
        raise InputError(name, allowed=f"outputs of shape {shape}", given=tuple(y.shape))
    return x, y
