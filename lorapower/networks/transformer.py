"""Transformers: attention and a ReLU layer in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, _objects, randomness
from ..errors import InputError
from .base import Network, uniform

# The last dimensions of every parameter; equal names are equal sizes.
SHAPES = {
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
WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2", "W_out")
BIASES = ("b_1", "b_2")


@_objects.held
class BlockTrace(NamedTuple):
    """What happens in a block.

    Attributes
    ----------
    patterns : what the softmax returns, ``[..., heads, N, N]``; columns sum to 1.
    preactivations : what the ReLU receives, ``[..., hidden, N]``.
    outputs : of the block, ``[..., width, N]``.
    """

    patterns: Float[Tensor, "*batch heads n n"]
    preactivations: Float[Tensor, "*batch hidden n"]
    outputs: Float[Tensor, "*batch width n"]


@dataclass(frozen=True, eq=False, repr=False)
class Transformer(Network):
    """``L`` blocks of attention with ``H`` heads and a ReLU layer, and an output matrix.

    Block ``l`` maps the columns of ``Z`` (one for each token) to ``W_2 ReLU(W_1 Attn(Z) + b_1) +
    b_2``, where ``Attn(Z) = Σ_h W_O^h W_V^h Z softmax(Zᵀ W_K^hᵀ W_Q^h Z)`` with the softmax of each
    column. The network's output is ``W_out Z_L``. No residual connections, no normalization
    [def-transformer].

    Parameters
    ----------
    W_Q, W_K, W_V : ``[..., L, H, d, D]``; the size ``d`` of the heads is that of queries and keys
        for the first two, of values for the third. The paper's heads are square, ``d = D``.
    W_O : ``[..., L, H, D, d]``.
    W_1, b_1 : ``[..., L, F, D]``, ``[..., L, F]``.
    W_2, b_2 : ``[..., L, D, F]``, ``[..., L, D]``.
    W_out : ``[..., out, D]``.

    Tensors, arrays or nested lists, all float32 or all float64; batch dimensions broadcast.

    Raises
    ------
    InputError : sizes that do not fit, mixed or unusable types, entries not finite.
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

    sequences: ClassVar[bool] = True

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
        given = {
            name: _checks.real_tensor(name, value, min_dims=len(shape), copy=True)
            for (name, shape), value in zip(SHAPES.items(), values, strict=True)
        }
        sizes: dict[str, int] = {}
        for name, shape in SHAPES.items():
            own = given[name].shape[-len(shape) :]
            wanted = tuple(sizes.setdefault(side, n) for side, n in zip(shape, own, strict=True))
            if tuple(own) != wanted:
                raise InputError(
                    name,
                    allowed=f"[..., {', '.join(shape)}] = [..., {', '.join(map(str, wanted))}]",
                    given=f"shape {tuple(given[name].shape)}",
                )
        if len({tensor.dtype for tensor in given.values()}) > 1:
            raise InputError(
                "weights and biases",
                allowed="all float32 or all float64",
                given="both",
                remedy="convert one",
            )
        batch = _checks.common_shape(
            "weights and biases",
            [given[name].shape[: -len(shape)] for name, shape in SHAPES.items()],
        )
        for name, shape in SHAPES.items():
            own = given[name].shape[-len(shape) :]
            object.__setattr__(self, name, given[name].expand(*batch, *own))

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
        depth = _checks.integer("depth", depth, 1)
        width = _checks.integer("width", width, 1)
        heads = _checks.integer("heads", heads, 1)
        head_size = width if head_size is None else _checks.integer("head_size", head_size, 1)
        scale = _checks.positive("scale", scale)
        batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
        generator = randomness.generator(seed, "transformer", purpose)
        sizes = {
            "blocks": depth,
            "heads": heads,
            "query size": head_size,
            "value size": head_size,
            "width": width,
            "hidden": width,
            "outputs": width,
        }

        def draw(name: str) -> Tensor:
            shape = (*batch_shape, *(sizes[side] for side in SHAPES[name]))
            if "heads" not in SHAPES[name]:
                return uniform(*shape, width=width, generator=generator, dtype=dtype)
            return (scale * randomness.normal(generator, *shape)).to(dtype)

        return cls(**{name: draw(name) for name in SHAPES})

    @property
    def depth(self) -> int:
        """Number of blocks ``L``."""
        return self.W_1.shape[-3]

    @property
    def heads(self) -> int:
        """Number of heads ``H`` in each block."""
        return self.W_Q.shape[-3]

    @property
    def width(self) -> int:
        """Size ``D`` of a token."""
        return self.W_1.shape[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its name: blocks, heads, query size, value size, width, hidden, outputs."""
        return {
            side: n
            for name, shape in SHAPES.items()
            for side, n in zip(shape, getattr(self, name).shape[-len(shape) :], strict=True)
        }

    @property
    def sides(self) -> str:
        """Blocks, heads, the size of these, and the sizes along a block and of an output."""
        n = self.sizes
        heads = f"{n['heads']} heads of {n['query size']} and {n['value size']}"
        layers = f"{n['width']}→{n['hidden']}→{n['width']}, {n['outputs']} outputs"
        return f"{n['blocks']} blocks, {heads}, {layers}"

    # Kept in stacks, so that both are read only.
    @cached_property
    def weights(self) -> tuple[Float[Tensor, "*batch _ _"], ...]:  # type: ignore[override]
        """All matrices, one by one: by kind in the order of parameters, then by block and head."""
        return tuple(w for name in WEIGHTS for w in self._unstacked(name, 2))

    @cached_property
    def biases(self) -> tuple[Float[Tensor, "*batch _"], ...]:  # type: ignore[override]
        """All vectors, one by one: ``b_1`` of every block, then ``b_2`` of every block."""
        return tuple(b for name in BIASES for b in self._unstacked(name, 1))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """For each of `weights` what it is, such as ``"W_Q of block 1, head 2"``."""
        blocks, heads = range(1, self.depth + 1), range(1, self.heads + 1)
        names: list[str] = []
        for name in WEIGHTS:
            if "heads" in SHAPES[name]:
                names += [f"{name} of block {l}, head {h}" for l in blocks for h in heads]
            elif "blocks" in SHAPES[name]:
                names += [f"{name} of block {l}" for l in blocks]
            else:
                names.append(name)
        return tuple(names)

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of `weights` whether the theorem [thm-transformer] adapts it.

        It adapts all of the attention, ``W_2`` of the last block and ``W_out``.
        """
        frozen = [f"W_2 of block {l}" for l in range(1, self.depth)]
        return tuple(
            not name.startswith("W_1 ") and name not in frozen for name in self.weight_names
        )

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> Transformer:
        for name, given, own in (
            ("weights", weights, self.weights),
            ("biases", biases, self.biases),
        ):
            if given is not None and len(given) != len(own):
                raise InputError(
                    name, allowed=f"{len(own)}, in the order of this network's", given=len(given)
                )
        tuned = self.biases if biases is None else biases
        return Transformer(**self._stacked(WEIGHTS, weights, 2), **self._stacked(BIASES, tuned, 1))

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Transformer:
        network = object.__new__(Transformer)
        stacks = self._stacked(WEIGHTS, weights, 2) | self._stacked(BIASES, biases, 1)
        for name, stack in stacks.items():
            object.__setattr__(network, name, stack)
        return network

    def _unstacked(self, name: str, dims: int) -> tuple[Tensor, ...]:
        stack: Tensor = getattr(self, name)
        first = stack.ndim - len(SHAPES[name])
        return stack.unsqueeze(first).flatten(first, -dims - 1).unbind(first)

    def _stacked(
        self, names: Sequence[str], values: Sequence[Tensor], dims: int
    ) -> dict[str, Tensor]:
        remaining, stacks = iter(values), {}
        for name in names:
            sizes = getattr(self, name).shape[-len(SHAPES[name]) : -dims]
            members = torch.broadcast_tensors(*(next(remaining) for _ in range(sizes.numel())))
            stack = torch.stack(members, -dims - 1)
            shape = (*stack.shape[: -dims - 1], *sizes, *stack.shape[-dims:])
            stacks[name] = stack.reshape(shape)
        return stacks

    def as_inputs(self, x: Any, name: str = "x") -> Float[Tensor, "*batch width n"]:
        x = super().as_inputs(x, name)
        _checks.common_shape(f"{name} and network", [tuple(x.shape[:-2]), tuple(self.batch_shape)])
        return x

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
