"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks
from .errors import InputError
from .lowrank import LowRank
from .networks.base import Network

N = TypeVar("N", bound=Network)


@dataclass(frozen=True, eq=False, repr=False)
class Adapters:
    """One low-rank update for each weight of a network, and tuned biases [def-adapter].

    ``updates`` are in the order of the network's ``weights``, of rank 0 for a weight without an
    adapter. ``bias_updates`` are vectors ``[..., out]``, added to the network's ``biases``; empty
    where none is tuned.
    """

    updates: tuple[LowRank, ...]
    bias_updates: tuple[Float[Tensor, "*batch _"], ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each weight's update; in a batch the largest."""
        return tuple(update.rank for update in self.updates)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: the networks that these adapters are for."""
        factors = [f.shape[:-2] for update in self.updates for f in (update.left, update.right)]
        return torch.broadcast_shapes(*factors, *(b.shape[:-1] for b in self.bias_updates))

    @property
    def parameter_count(self) -> int:
        """Count the numbers for one network: ``Σ_l R_l (out_l + in_l)``, and those for biases."""
        factors = sum(update.parameter_count for update in self.updates)
        return factors + sum(update.shape[-1] for update in self.bias_updates)

    def __repr__(self) -> str:
        more = ["…"] if len(self.ranks) > 8 else []
        biases = ["biases tuned"] if self.bias_updates else []
        batch = [f"batch {[*self.batch_shape]}"] if self.batch_shape else []
        dtype = str(self.updates[0].left.dtype).removeprefix("torch.")
        parts = [*map(str, self.ranks[:8]), *more, *biases, *batch, dtype]
        return f"Adapters(ranks {', '.join(parts)})"

    def __getitem__(self, index: Any) -> Adapters:
        """Pick members of the batch, as in `Network`, without what is 0 in all of them."""
        batch = self.batch_shape
        count = torch.arange(batch.numel(), device=self.updates[0].left.device)
        members = count.reshape(batch)[index]

        def pick(values: Tensor, dims: int) -> Tensor:
            rest = values.shape[values.ndim - dims :]
            return values.expand((*batch, *rest)).reshape(batch.numel(), *rest)[members]

        updates = tuple(LowRank(pick(u.left, 2), pick(u.right, 2)) for u in self.updates)
        return Adapters(updates, tuple(pick(update, 1) for update in self.bias_updates)).trimmed()

    def __iter__(self) -> Iterator[Adapters]:
        """Go through the members along the first batch dimension."""
        if not self.batch_shape:
            raise TypeError("adapters of a single network have no members")
        return (self[i] for i in range(self.batch_shape[0]))

    def trimmed(self) -> Adapters:
        """Leave out columns that are 0 for all members, and updates of biases if all are 0."""
        biases = self.bias_updates if any(b.any() for b in self.bias_updates) else ()
        return Adapters(tuple(update.trimmed() for update in self.updates), biases)

    def to(self, dtype: torch.dtype) -> Adapters:
        """Round all numbers to ``dtype``."""
        updates = (LowRank(u.left.to(dtype), u.right.to(dtype)) for u in self.updates)
        biases = (update.to(dtype) for update in self.bias_updates)
        return Adapters(tuple(updates), tuple(biases))

    def merge(self, network: N) -> N:
        """Make a new network with weights ``W_l + A_l B_lᵀ`` and biases ``b_l + Δb_l``.

        It keeps the network's type of numbers.

        Examples
        --------
        >>> import torch
        >>> from lorapower.adapters import Adapters
        >>> from lorapower.lowrank import LowRank
        >>> from lorapower.networks import LinearNetwork
        >>> frozen, ones = LinearNetwork([torch.eye(2)]), torch.ones(2, 1)
        >>> Adapters((LowRank(ones, ones),)).merge(frozen).weights[0]
        tensor([[2., 1.],
                [1., 2.]])
        """
        _checks.kind(Network, network=network)
        shapes = [tuple(weight.shape[-2:]) for weight in network.weights]
        if shapes != (wanted := [update.shape for update in self.updates]):
            allowed = f"of weights {wanted}, as the adapters are"
            raise InputError("network", allowed=allowed, given=shapes)
        if self.bias_updates and not network.biases:
            raise InputError("network", allowed="one with biases, which are tuned", given="none")

        def sums(values: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
            return [(v + update).to(v.dtype) for v, update in zip(values, updates, strict=True)]

        weights = sums(network.weights, [update.matrix() for update in self.updates])
        biases = sums(network.biases, self.bias_updates) if self.bias_updates else None
        return network.with_parameters(weights, biases)
