"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import InputError
from .lowrank import LowRank
from .networks import LinearNetwork


@dataclass(frozen=True)
class Adapters:
    """One low-rank update for each layer of a network, first layer first.

    Attributes
    ----------
    updates : ``L`` factored updates; a layer without an adapter has one of rank 0.
    """

    updates: tuple[LowRank, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each layer's update."""
        return tuple(update.rank for update in self.updates)

    @property
    def parameter_count(self) -> int:
        """Tunable numbers of one network's adapters: ``Σ_l R_l (out_l + in_l)``."""
        return sum(update.parameter_count for update in self.updates)

    def merge(self, network: LinearNetwork) -> LinearNetwork:
        """A new network with weights ``W_l + A_l B_lᵀ``.

        Raises `InputError` when the adapters do not fit the network or the sum is not finite.
        """
        return self._add(network, +1)

    def unmerge(self, network: LinearNetwork) -> LinearNetwork:
        """A new network with weights ``W_l − A_l B_lᵀ``: undoes `merge` up to rounding."""
        return self._add(network, -1)

    def _add(self, network: LinearNetwork, sign: int) -> LinearNetwork:
        shapes = [(update.A.shape[-2], update.B.shape[-2]) for update in self.updates]
        expected = [tuple(weight.shape[-2:]) for weight in network.weights]
        if shapes != expected:
            raise InputError(
                "network", allowed=f"of weights {shapes}, as the adapters are", given=expected
            )
        return LinearNetwork(
            [
                torch.add(weight, update.matrix(), alpha=sign)
                for weight, update in zip(network.weights, self.updates, strict=True)
            ]
        )
