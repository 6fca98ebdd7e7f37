"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import _checks
from .errors import InputError
from .lowrank import LowRank
from .networks.base import Network

N = TypeVar("N", bound=Network)


class Tuned(NamedTuple):
    """What each member of a batch tunes: ``ranks`` of each weight's adapter, and which ``biases``.

    Columns past a rank are zeros. The update of a bias that is not tuned stays what it was.
    """

    ranks: Int[Tensor, "*batch weights"]
    biases: Bool[Tensor, "*batch biases"]


@dataclass(frozen=True, eq=False, repr=False)
class Adapters:
    """One low-rank update for each weight of a network, and tuned biases [def-adapter].

    ``updates`` are in the order of the network's ``weights``, of rank 0 for a weight without an
    adapter. ``bias_updates`` are vectors ``[..., out]``, added to the network's ``biases``; empty
    where none is tuned. ``tuned`` says what each member of a batch tunes, as in training runs;
    ``None`` where all columns and biases are.
    """

    updates: tuple[LowRank, ...]
    bias_updates: tuple[Float[Tensor, "*batch _"], ...] = ()
    tuned: Tuned | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each weight's update; in a batch the largest."""
        return tuple(update.rank for update in self.updates)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(out, in)`` of each weight."""
        return [(update.left.shape[-2], update.right.shape[-2]) for update in self.updates]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: the networks that these adapters are for."""
        factors = [f.shape[:-2] for update in self.updates for f in (update.left, update.right)]
        return torch.broadcast_shapes(*factors, *(b.shape[:-1] for b in self.bias_updates))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the factors."""
        return self.updates[0].left.dtype

    @property
    def parameter_count(self) -> int:
        """Tunable numbers of one network: ``Σ_l R_l (out_l + in_l)`` and ``Σ_l out_l`` biases.

        Biases count if they are tuned. Raises `InputError` for a batch whose members differ in this
        number.
        """
        sides = torch.tensor([sum(shape) for shape in self.shapes])
        lengths = torch.tensor([u.shape[-1] for u in self.bias_updates], dtype=torch.long)
        ranks, biases = self.tuned or (torch.tensor(self.ranks), torch.ones_like(lengths))
        each = (ranks.cpu() * sides).sum(-1) + (biases.cpu() * lengths).sum(-1)
        counts = {*each.flatten().tolist()}
        if len(counts) != 1:
            raise InputError(
                "adapters",
                allowed="of one network, or of several that tune equally many numbers",
                given=f"some that tune {sorted(counts)}",
                remedy="pick one first, adapters[i]",
            )
        return counts.pop()

    def __repr__(self) -> str:
        parts = ["ranks " + ", ".join(map(str, self.ranks[:8]))]
        if len(self.ranks) > 8:
            parts.append("…")
        if self.bias_updates:
            parts.append("biases tuned")
        if self.batch_shape:
            parts.append(f"batch {[*self.batch_shape]}")
        return f"Adapters({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')})"

    def __getitem__(self, index: Any) -> Adapters:
        """Pick members of the batch, as in `Network`, without what none of them tunes."""
        batch = self.batch_shape
        count = torch.arange(batch.numel(), device=self.updates[0].left.device)
        members = count.reshape(batch)[index]

        def pick(values: Tensor, dims: int) -> Tensor:
            rest = values.shape[values.ndim - dims :]
            return values.expand((*batch, *rest)).reshape(batch.numel(), *rest)[members]

        updates = [LowRank(pick(u.left, 2), pick(u.right, 2)) for u in self.updates]
        biases = [pick(update, 1) for update in self.bias_updates]
        if self.tuned is None:
            return Adapters(tuple(updates), tuple(biases))
        return Adapters.trimmed(updates, biases, Tuned(*(pick(part, 1) for part in self.tuned)))

    def __iter__(self) -> Iterator[Adapters]:
        """Go through the members along the first batch dimension."""
        if not self.batch_shape:
            raise TypeError("adapters of a single network have no members")
        return (self[i] for i in range(self.batch_shape[0]))

    @classmethod
    def trimmed(
        cls, updates: Sequence[LowRank], bias_updates: Sequence[Tensor], tuned: Tuned
    ) -> Adapters:
        """Make adapters without columns that no member tunes, and without biases that all stay."""
        ranks = tuned.ranks.reshape(-1, len(updates))
        largest = ranks.amax(0).tolist() if len(ranks) else [0] * len(updates)
        kept = tuple(update.leading(R) for update, R in zip(updates, largest, strict=True))
        if tuned.biases.any() or any(bool(update.any()) for update in bias_updates):
            return cls(kept, tuple(bias_updates), tuned)
        return cls(kept, (), tuned._replace(biases=tuned.biases[..., :0]))

    def to(self, dtype: torch.dtype) -> Adapters:
        """Round all numbers to ``dtype``."""
        updates = (LowRank(u.left.to(dtype), u.right.to(dtype)) for u in self.updates)
        biases = (update.to(dtype) for update in self.bias_updates)
        return replace(self, updates=tuple(updates), bias_updates=tuple(biases))

    def balanced(self) -> Adapters:
        """Rescale each column to be as long in one factor as in the other."""
        return replace(self, updates=tuple(update.balanced() for update in self.updates))

    def merge(self, network: N) -> N:
        """Make a new network with weights ``W_l + A_l B_lᵀ`` and biases ``b_l + Δb_l``.

        It keeps the network's type of numbers. Raises `InputError` for a network that the adapters
        do not fit, and for sums that are not finite.

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
        if self.shapes != shapes:
            allowed = f"of weights {self.shapes}, as the adapters are"
            raise InputError("network", allowed=allowed, given=shapes)
        if self.bias_updates and not network.biases:
            raise InputError("network", allowed="one with biases, which are tuned", given="none")

        def sums(values: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
            return [(v + update).to(v.dtype) for v, update in zip(values, updates, strict=True)]

        weights = sums(network.weights, [update.matrix() for update in self.updates])
        biases = sums(network.biases, self.bias_updates) if self.bias_updates else None
        return network.with_parameters(weights, biases)
