"""The paper's transformer: attention and feed-forward layers, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..errors import InputError
from .attention import Attention, Settings

_RELU = Settings()


@final
@dataclass(frozen=True, eq=False, repr=False)
class Transformer(Attention):
    """``L`` blocks of attention with ``H`` heads and a feed-forward layer [def-transformer].

    A block maps the tokens, columns of ``Z``, to ``Y = W_2 σ(W_1 U + b_1) + b_2`` with
    ``U = Σ_h W_O^h W_V^h Z P_h`` and ``P_h = softmax(Zᵀ W_K^hᵀ W_Q^h Z)``, the softmax of each
    column. The network returns ``W_out Y`` of the last block.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        ``W_Q, W_K, W_V`` ``[..., L, H, d, D]``, ``W_O`` ``[..., L, H, D, d]``, with one ``d`` for
        queries and keys and perhaps another for values; ``W_1`` ``[..., L, F, D]``, ``W_2``
        ``[..., L, D, F]``; ``W_out`` ``[..., out, D]``, by default the identity; ``b_1``
        ``[..., L, F]`` and ``b_2`` ``[..., L, D]``, by default 0.
    settings : Settings
        With an activation, by default ReLUs, and perhaps causal.
    """

    settings: Settings = _RELU

    _stream = "transformer"
    _widening = 1
    _scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        others = replace(self.settings, activation="relu", causal=False)
        if others != _RELU:
            allowed, remedy = "an activation and causal alone", "a Decoder may have others"
            raise InputError("settings", allowed, self.settings, remedy)
        if self.groups != self.heads:
            allowed, remedy = f"{self.heads}, one for each head", "a Decoder may have groups"
            raise InputError("heads of W_K and W_V", allowed, self.groups, remedy)

    @classmethod
    def _kinds(cls, settings: Settings) -> tuple[str, ...]:
        return ("W_Q", "W_K", "W_V", "W_O", "W_1", "b_1", "W_2", "b_2", "W_out")

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of ``weights``, whether the theorem adapts it; ``W_2`` in the last block."""
        last = f"W_2 of block {self.depth}"
        return tuple(n == last or not n.startswith(("W_1", "W_2")) for n in self.weight_names)

    @property
    def missing_shift(self) -> Float[Tensor, "*batch _ width"]:
        """``c`` with ``W_{2,l} c = b_{2,l}`` for all blocks but the last; ``[..., L − 1, D]``."""
        W_2, b_2 = self.W_2[..., :-1, :, :], self.b_2[..., :-1, :, None]
        return lowrank.solve(W_2, b_2)[..., 0]
