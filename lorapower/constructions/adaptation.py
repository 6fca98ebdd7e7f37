"""What the adaptations of all kinds of networks have in common."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from ..adapters.core import Adapters


@dataclass(frozen=True, eq=False, repr=False)
class Adaptation:
    """Adapters, and whether they are what they should be.

    Attributes
    ----------
    adapters : Adapters
        ``ΔW_l = A_l B_lᵀ`` of rank at most ``R_l``, and ``Δb_l`` where biases are tuned;
        `Adapters.merge` applies them.
    success : Tensor
        Whether all is adapted acceptably; ``[...]``. Where it is not, the adapters are the best
        that were found.
    """

    adapters: Adapters
    success: Bool[Tensor, "*batch"]

    def __repr__(self) -> str:
        good, members = int(self.success.sum()), self.success.numel()
        return f"{type(self).__name__}({self.adapters}, success of {good} in {members})"
