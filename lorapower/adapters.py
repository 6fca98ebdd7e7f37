"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks
from .errors import InputError
from .lowrank import LowRank
from .networks import Network

N = TypeVar("N", bound=Network)


@dataclass(frozen=True, eq=False)
class Adapters:
    """One low-rank update for each weight of a network, and tuned biases [def-adapter].

    Attributes
    ----------
    updates : factored updates in the order of the network's ``weights``, in a chain of layers the
        first layer first; a weight without an adapter has one of rank 0.
    bias_updates : vectors ``[..., out]`` that are added to the network's ``biases``, or none of
        them where the biases stay or the network has none.
    """

    updates: tuple[LowRank, ...]
    bias_updates: tuple[Float[Tensor, "*batch _"], ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each weight's update."""
        return tuple(update.rank for update in self.updates)

    @property
    def parameter_count(self) -> int:
        """Tunable numbers of one network: ``Σ_l R_l (out_l + in_l)``, and ``Σ_l out_l`` biases."""
        factors = sum(update.parameter_count for update in self.updates)
        return factors + sum(update.shape[-1] for update in self.bias_updates)

    def merge(self, network: N) -> N:
        """A new network with weights ``W_l + A_l B_lᵀ`` and biases ``b_l + Δb_l``.

        Raises `InputError` for no network, for one that the adapters do not fit, and where the
        sum is not finite.
        """
        return self._add(network, +1)

    def unmerge(self, network: N) -> N:
        """A new network with weights ``W_l − A_l B_lᵀ`` and biases ``b_l − Δb_l``.

        Undoes `merge` up to rounding.
        """
        return self._add(network, -1)

    def _add(self, network: N, sign: int) -> N:
        _checks.kind(Network, network=network)
        shapes = [(update.left.shape[-2], update.right.shape[-2]) for update in self.updates]
        expected = [tuple(weight.shape[-2:]) for weight in network.weights]
        if shapes != expected:
            raise InputError(
                "network", allowed=f"of weights {shapes}, as the adapters are", given=expected
            )
        weights = _sums(network.weights, [update.matrix() for update in self.updates], sign)
        if not self.bias_updates:
            return network.with_parameters(weights)
        if not network.biases:
            raise InputError("network", allowed="one with biases, which are tuned", given="none")
        return network.with_parameters(weights, _sums(network.biases, self.bias_updates, sign))


def _sums(values: Sequence[Tensor], updates: Sequence[Tensor], sign: int) -> tuple[Tensor, ...]:
    return tuple(torch.add(v, u, alpha=sign) for v, u in zip(values, updates, strict=True))
