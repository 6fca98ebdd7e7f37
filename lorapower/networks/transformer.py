"""Transformers: attention and a ReLU layer in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from ._layers import uniform
from .stacked import Stacked


class BlockTrace(NamedTuple):
    """What happens in a block.

    Attributes
    ----------
    patterns : Tensor
        What the softmax returns, ``[..., heads, N, N]``; columns sum to 1.
    preactivations : Tensor
        What the ReLU receives, ``[..., hidden, N]``.
    outputs : Tensor
        Of the block, ``[..., width, N]``.
    """

    patterns: Float[Tensor, "*batch heads n n"]
    preactivations: Float[Tensor, "*batch hidden n"]
    outputs: Float[Tensor, "*batch width n"]


@dataclass(frozen=True, eq=False, repr=False)
class Transformer(Stacked):
    """``L`` blocks of attention with ``H`` heads and a ReLU layer, and an output matrix.

    Block ``l`` maps the columns of ``Z`` (one for each token) to ``W_2 ReLU(W_1 Attn(Z) + b_1) +
    b_2``, where ``Attn(Z) = Σ_h W_O^h W_V^h Z softmax(Zᵀ W_K^hᵀ W_Q^h Z)`` with the softmax of each
    column. The network's output is ``W_out Z_L``. No residual connections, no normalization
    [def-transformer].

    Tensors, arrays or nested lists, all float32 or all float64; batch dimensions broadcast.

    Parameters
    ----------
    W_Q, W_K, W_V
        ``[..., L, H, d, D]``; the size ``d`` of the heads is that of queries and keys for the first
        two, of values for the third. The paper's heads are square, ``d = D``.
    W_O
        ``[..., L, H, D, d]``.
    W_1, b_1
        ``[..., L, F, D]``, ``[..., L, F]``.
    W_2, b_2
        ``[..., L, D, F]``, ``[..., L, D]``.
    W_out
        ``[..., out, D]``.

    Raises
    ------
    InputError
        Sizes that do not fit, mixed or unusable types, entries not finite.
    """

    W_Q: Float[Tensor, "*batch blocks heads query width"]
    W_K: Float[Tensor, "*batch blocks heads query width"]
    W_V: Float[Tensor, "*batch blocks heads value width"]
    W_O: Float[Tensor, "*batch blocks heads width value"]
    W_1: Float[Tensor, "*batch blocks hidden width"]
    b_1: Float[Tensor, "*batch blocks hidden"]
    W_2: Float[Tensor, "*batch blocks width hidden"]
    b_2: Float[Tensor, "*batch blocks width"]
    W_out: Float[Tensor, "*batch out width"]

    SHAPES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "W_Q": ("blocks", "heads", "query size", "width"),
        "W_K": ("blocks", "heads", "query size", "width"),
        "W_V": ("blocks", "heads", "value size", "width"),
        "W_O": ("blocks", "heads", "width", "value size"),
        "W_1": ("blocks", "hidden", "width"),
        "b_1": ("blocks", "hidden"),
        "W_2": ("blocks", "width", "hidden"),
        "b_2": ("blocks", "width"),
        "W_out": ("outputs", "width"),
    }
    weight_kinds: ClassVar[tuple[str, ...]] = ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2", "W_out")
    bias_kinds: ClassVar[tuple[str, ...]] = ("b_1", "b_2")

    def __init__(
        self,
        W_Q: Any,
        W_K: Any,
        W_V: Any,
        W_O: Any,
        W_1: Any,
        b_1: Any,
        W_2: Any,
        b_2: Any,
        W_out: Any,
    ) -> None:
        values = (W_Q, W_K, W_V, W_O, W_1, b_1, W_2, b_2, W_out)
        self._set(dict(zip(self.SHAPES, values, strict=True)))

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        scale: float = 1.0,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> Transformer:
        """Attention weights normal of standard deviation ``scale``, the others ``±1/√D``.

        The paper's attention weights have ``scale = 1``; ``D^{-1/2}`` keeps scores of moderate
        size. All others, biases too, are drawn as `torch.nn.Linear` draws its own. Transformers
        of one seed and different purposes are independent.
        """
        sizes = cls._drawn_sizes(depth, width, heads, head_size, None, usual=1)
        scale = _checks.positive("scale", scale)
        batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
        generator = randomness.generator(seed, "transformer", purpose)

        def draw(name: str) -> Tensor:
            shape = (*batch_shape, *(sizes[side] for side in cls.SHAPES[name]))
            if "heads" not in cls.SHAPES[name]:
                return uniform(*shape, width=width, generator=generator, dtype=dtype)
            return (scale * randomness.normal(generator, *shape)).to(dtype)

        return cls(**{name: draw(name) for name in cls.SHAPES})

    @property
    def sides(self) -> str:
        """Blocks, heads, the size of these, and the sizes along a block and of an output."""
        n = self.sizes
        heads = f"{n['heads']} heads of {n['query size']} and {n['value size']}"
        layers = f"{n['width']}→{n['hidden']}→{n['width']}, {n['outputs']} outputs"
        return f"{n['blocks']} blocks, {heads}, {layers}"

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of `weights` whether the theorem [thm-transformer] adapts it.

        It adapts all of the attention, ``W_2`` of the last block and ``W_out``.
        """
        frozen = [f"W_2 of block {l}" for l in range(1, self.depth)]
        return tuple(
            not name.startswith("W_1 ") and name not in frozen for name in self.weight_names
        )

    def trace(self, x: Float[Tensor, "*#batch width n"]) -> list[BlockTrace]:
        """What happens in each block, first block first."""
        z, found = self.as_inputs(x), []
        for l in range(self.depth):
            attending = scores(self, l, z)
            hidden = mixed(self, l, z, attending)
            z = fed_forward(self, l, hidden)
            found.append(BlockTrace(attending.softmax(-2), hidden, z))
        return found

    def __call__(self, x: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch out n"]:
        """``W_out Z_L``, token by token; leading dimensions of ``x`` broadcast with the batch."""
        return behind(self, 0, self.as_inputs(x))


def scores(
    network: Transformer, l: int, z: Float[Tensor, "*#batch width n"]
) -> Float[Tensor, "*batch heads n n"]:
    """``Zᵀ W_K^hᵀ W_Q^h Z`` of block ``l``, counted from 0: of keys, in rows, and queries."""
    tokens = z.unsqueeze(-3)
    Q, K = (w[..., l, :, :, :] for w in (network.W_Q, network.W_K))
    return (K @ tokens).mT @ (Q @ tokens)


def mixed(
    network: Transformer,
    l: int,
    z: Float[Tensor, "*#batch width n"],
    attending: Float[Tensor, "*#batch heads n n"],
) -> Float[Tensor, "*batch hidden n"]:
    """What the ReLU of block ``l`` receives where tokens attend by these scores."""
    V, O = (w[..., l, :, :, :] for w in (network.W_V, network.W_O))
    attention = (O @ (V @ z.unsqueeze(-3) @ attending.softmax(-2))).sum(-3)
    return network.W_1[..., l, :, :] @ attention + network.b_1[..., l, :, None]


def fed_forward(
    network: Transformer, l: int, hidden: Float[Tensor, "*#batch hidden n"]
) -> Float[Tensor, "*batch width n"]:
    """The tokens that block ``l`` makes of what its ReLU receives."""
    return network.W_2[..., l, :, :] @ hidden.relu() + network.b_2[..., l, :, None]


def behind(
    network: Transformer, l: int, z: Float[Tensor, "*#batch width n"]
) -> Float[Tensor, "*batch out n"]:
    """The outputs for tokens that enter block ``l``; gradients flow through."""
    for block in range(l, network.depth):
        hidden = mixed(network, block, z, scores(network, block, z))
        z = fed_forward(network, block, hidden)
    return network.W_out @ z
