"""The paper's transformer: attention and feed-forward layers, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank, randomness
from ..errors import InputError
from .attention import PARTS, Activation, Attention, Settings, random_stacks

_RELU = Settings()
# Random parameters are drawn in this order.
_DRAWN = ("W_Q", "W_K", "W_V", "W_O", "W_1", "b_1", "W_2", "b_2", "W_out")


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
        By default with ReLUs, and not causal.
    """

    settings: Settings = _RELU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups != self.heads:
            allowed, remedy = f"{self.heads}, one for each head", "a Decoder may have groups"
            raise InputError("heads of W_K and W_V", allowed, self.groups, remedy)

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        hidden: int | None = None,
        scale: float = 1.0,
        activation: Activation = "relu",
        causal: bool = False,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> Transformer:
        """Draw a network by seed and purpose.

        Attention weights are normal of deviation ``scale``, 1 as in the paper; ``D^{-1/2}`` keeps
        scores moderate. Other matrices and biases are uniform on ``±1/√n``, with ``n`` the columns
        of the matrix. ``head_size`` is ``d``, ``hidden`` is ``F``, both by default the width.

        Examples
        --------
        >>> from lorapower.networks import Transformer
        >>> network = Transformer.random(2, 8, 2, head_size=4, scale=8**-0.5)
        >>> network.W_Q.shape, network.depth, network.heads
        (torch.Size([2, 2, 4, 8]), 2, 2)
        """
        d, F = (width if size is None else size for size in (head_size, hidden))
        sizes = {
            **{"blocks": depth, "width": width, "hidden": F, "outputs": width},
            **{"heads": heads, "groups": heads, "query size": d, "value size": d},
        }
        generator = randomness.generator(seed, "transformer", purpose)

        def draw(kind: str, shape: tuple[int, ...]) -> Tensor:
            if kind in PARTS["attention"]:
                return (scale * randomness.normal(generator, *shape)).to(dtype)
            columns = sizes["hidden" if kind in ("W_2", "b_2") else "width"]
            return ((2 * randomness.uniform(generator, *shape) - 1) / columns**0.5).to(dtype)

        return cls(random_stacks(_DRAWN, sizes, batch_shape, draw), Settings(activation, causal))

    @property
    def adapted_kinds(self) -> tuple[str, ...]:
        """The kinds of weights that the theorem adapts [thm-transformer]: all but ``W_1``."""
        return tuple(kind for kind in self.weight_kinds if kind != "W_1")

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of ``weights``, whether the theorem adapts it; ``W_2`` in the last block."""
        last = f"W_2 of block {self.depth}"
        names = zip(self.weight_names, self.kind_of_weight, strict=True)
        return tuple(kind not in ("W_1", "W_2") or name == last for name, kind in names)

    @property
    def missing_shift(self) -> Float[Tensor, "*batch _ width"]:
        """``c`` with ``W_{2,l} c = b_{2,l}`` for all blocks but the last; ``[..., L − 1, D]``."""
        W_2, b_2 = self.W_2[..., :-1, :, :], self.b_2[..., :-1, :, None]
        return lowrank.solve(W_2, b_2)[..., 0]
