"""What all transformers share: stacks of parameters over blocks and heads, softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .. import _checks
from ..errors import InputError
from .base import Network

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Part = Literal["attention", "mlp", "all"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda p: functional.gelu(p, approximate="tanh"),
    "silu": functional.silu,
}
#: Kinds of weights by the part of a block that they belong to.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("W_Q", "W_K", "W_V", "W_O"),
    "mlp": ("W_1", "W_3", "W_2"),
    "all": ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_3", "W_2"),
}
#: The last dimensions of every kind of weight and vector; equal names are equal sizes.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "W_Q": ("blocks", "heads", "query size", "width"),
    "W_K": ("blocks", "groups", "query size", "width"),
    "W_V": ("blocks", "groups", "value size", "width"),
    "W_O": ("blocks", "heads", "width", "value size"),
    "W_1": ("blocks", "hidden", "width"),
    "W_3": ("blocks", "hidden", "width"),
    "W_2": ("blocks", "width", "hidden"),
    "W_out": ("outputs", "width"),
}
VECTORS: dict[str, tuple[str, ...]] = {
    "b_Q": ("blocks", "heads", "query size"),
    "b_K": ("blocks", "groups", "query size"),
    "b_O": ("blocks", "width"),
    "b_1": ("blocks", "hidden"),
    "b_3": ("blocks", "hidden"),
    **dict.fromkeys(("b_2", "g_1", "s_1", "g_2", "s_2"), ("blocks", "width")),
    **dict.fromkeys(("g_f", "s_f"), ("width",)),
}
SHAPES = WEIGHTS | VECTORS
Tokens = Float[Tensor, "*#batch width n"]
Hidden = Float[Tensor, "*#batch hidden n"]
Scores = Float[Tensor, "*#batch heads n n"]


class _BlockTrace(NamedTuple):
    """What a block computes.

    ``patterns`` are the softmax, ``[..., heads, N, N]``, columns summing to 1; ``preactivations``
    enter the activation, ``[..., hidden, N]``; ``outputs`` leave the block, ``[..., width, N]``.
    """

    patterns: Scores
    preactivations: Hidden
    outputs: Tokens


@dataclass(frozen=True)
class Settings:
    """What every transformer does with its parameters.

    Parameters
    ----------
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
        ``σ``; ``"gelu_tanh"`` approximates the GELU.
    causal : bool
        Whether a token attends only to itself and to earlier ones.
    """

    activation: Activation = "relu"
    causal: bool = False

    def __post_init__(self) -> None:
        _checks.choice("activation", self.activation, get_args(Activation))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parameters of a network with these settings, weights first."""
        return ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2", "W_out", "b_1", "b_2")


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Network):
    """A network of blocks of attention and feed-forward layers, of the kinds of its `settings`.

    Each parameter is also an attribute, such as ``network.W_Q``. Raises `InputError` for sizes that
    do not fit, other or mixed types, non-finite entries, and parameters that the settings exclude.
    """

    parameters: Mapping[str, Any]
    settings: Settings

    sequences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self._usable(self.parameters))

    def __getattr__(self, kind: str) -> Tensor:
        """Get a parameter by its kind."""
        if kind not in SHAPES or kind not in vars(self).get("parameters", {}):
            raise AttributeError(f"{type(self).__name__} has no {kind!r}")
        return self.parameters[kind]

    def replace(self, **changes: Any) -> Self:
        """Make the network with other parameters, named by their kinds, or other settings."""
        options = {field.name for field in fields(self.settings)} & {*changes}
        settings = replace(self.settings, **{name: changes.pop(name) for name in options})
        return type(self)({**self.parameters, **changes}, settings)

    # Parameters and sizes.

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its parameters, weights first."""
        return self.settings.kinds

    @property
    def weight_kinds(self) -> tuple[str, ...]:
        """The kinds that are matrices, in the order of ``weights``."""
        return tuple(kind for kind in self.kinds if kind in WEIGHTS)

    @property
    def bias_kinds(self) -> tuple[str, ...]:
        """The kinds that are vectors, in the order of ``biases``."""
        return tuple(kind for kind in self.kinds if kind in VECTORS)

    @property
    def adapted_kinds(self) -> tuple[str, ...]:
        """The kinds of weights that the theorem adapts [thm-transformer], [thm-residual]."""
        return self.weight_kinds

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of ``weights``, whether the theorem adapts it."""
        return (True,) * len(self.weights)

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its name, such as blocks, heads, query size, width and hidden."""
        return _sizes(self.parameters)

    @property
    def depth(self) -> int:
        """Number of blocks ``L``."""
        return self.W_Q.shape[-4]

    @property
    def heads(self) -> int:
        """Number of heads ``H`` in each block."""
        return self.W_Q.shape[-3]

    @property
    def groups(self) -> int:
        """Number of groups of heads with keys and values of their own; ``H`` unless grouped."""
        return self.W_K.shape[-3]

    @property
    def width(self) -> int:
        """Size ``D`` of a token."""
        return self.W_Q.shape[-1]

    @property
    def _sides(self) -> str:
        options = [
            f"{field.name} {value}"
            for field in fields(self.settings)
            if (value := getattr(self.settings, field.name)) != field.default
        ]
        return ", ".join([*(f"{n} {side}" for side, n in self.sizes.items()), *options])

    # Parameters are stored in stacks: the tuples are read only.
    @cached_property
    def weights(self) -> tuple[Float[Tensor, "*batch _ _"], ...]:  # type: ignore[override]
        """All matrices, one by one: by kind, then by block and head."""
        return self.one_by_one(self.weight_kinds, self.parameters)

    @cached_property
    def biases(self) -> tuple[Float[Tensor, "*batch _"], ...]:  # type: ignore[override]
        """All vectors, one by one: by kind, then by block and head."""
        return self.one_by_one(self.bias_kinds, self.parameters)

    @staticmethod
    def one_by_one(kinds: Sequence[str], stacks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Split stacks of some kinds of parameters by block and head."""
        members: list[Tensor] = []
        for kind in kinds:
            stack, dims = stacks[kind], 2 if kind in WEIGHTS else 1
            first = stack.ndim - len(SHAPES[kind])
            members += stack.unsqueeze(first).flatten(first, -dims - 1).unbind(first)
        return tuple(members)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """A name for each of ``weights``, such as ``"W_Q of block 1, head 2"``."""
        return tuple(name for kind in self.weight_kinds for name in self._names(kind))

    @property
    def bias_names(self) -> tuple[str, ...]:
        """A name for each of ``biases``, such as ``"b_1 of block 2"``."""
        return tuple(name for kind in self.bias_kinds for name in self._names(kind))

    @property
    def kind_of_weight(self) -> tuple[str, ...]:
        """The kind of each of ``weights``."""
        return tuple(name.split()[0] for name in self.weight_names)

    def _names(self, kind: str) -> list[str]:
        blocks, sides = range(1, self.depth + 1), SHAPES[kind]
        if "heads" in sides or "groups" in sides:
            count = self.heads if "heads" in sides else self.groups
            word = "head" if count == self.heads else "group"
            return [f"{kind} of block {l}, {word} {h + 1}" for l in blocks for h in range(count)]
        return [f"{kind} of block {l}" for l in blocks] if "blocks" in sides else [kind]

    def with_parameters(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        *,
        checked: bool = True,
    ) -> Self:
        remaining = iter((*weights, *(self.biases if biases is None else biases)))
        stacks = {}
        for kind in self.kinds:
            dims = 2 if kind in WEIGHTS else 1
            places = self.parameters[kind].shape[-len(SHAPES[kind]) : -dims]
            members = torch.broadcast_tensors(*(next(remaining) for _ in range(places.numel())))
            stack = torch.stack(members, -dims - 1)
            stacks[kind] = stack.reshape(*stack.shape[: -dims - 1], *places, *stack.shape[-dims:])
        if checked:
            return type(self)(stacks, self.settings)
        network = object.__new__(type(self))
        vars(network).update(parameters=stacks, settings=self.settings)
        return network

    def ranks(self, rank: int, part: Part = "all") -> tuple[int, ...]:
        """Give weights of a part of blocks one rank, up to their smaller sides; 0 to the others.

        In the order of ``weights``, as for `training.Tuning`. `InputError` for bad ranks and parts.
        """
        rank = _checks.integer("rank", rank, 0)
        _checks.choice("part", part, tuple(PARTS))
        return tuple(
            min(rank, *w.shape[-2:]) if kind in PARTS[part] else 0
            for kind, w in zip(self.kind_of_weight, self.weights, strict=True)
        )

    def require_like(
        self, frozen: Attention, settings: Sequence[str], sizes: Sequence[str] = ()
    ) -> None:
        """Refuse to be the target of a network that differs in one of these settings or sizes."""
        for name in settings:
            given, allowed = getattr(self.settings, name), getattr(frozen.settings, name)
            if given != allowed:
                words = f"with {name} {allowed!r}, like the frozen network"
                raise InputError("target", allowed=words, given=given)
        for side in sizes:
            if self.sizes[side] != frozen.sizes[side]:
                allowed = f"{frozen.sizes[side]}, as in the frozen network"
                raise InputError(f"target's {side}", allowed=allowed, given=self.sizes[side])
        _checks.like_frozen(self, frozen)
        shapes = [tuple(network.batch_shape) for network in (frozen, self)]
        _checks.common_shape("frozen and target", shapes)

    # Evaluation.

    def __call__(self, x: Tokens) -> Float[Tensor, "*batch out n"]:
        """Compute the output; leading dimensions of ``x`` broadcast with the batch."""
        z = self.as_inputs(x)
        for l in range(self.depth):
            z = self._block(l, z).outputs
        return self.output(z)

    def trace(self, x: Tokens) -> list[_BlockTrace]:
        """Compute what each block does, first block first."""
        z, blocks = self.as_inputs(x), []
        for l in range(self.depth):
            blocks.append(self._block(l, z))
            z = blocks[-1].outputs
        return blocks

    def _block(self, l: int, z: Tensor) -> _BlockTrace:
        patterns = self.patterns(self.scores(l, z))
        u = self.attend(l, z, patterns)
        hidden = self.hidden(l, u)
        return _BlockTrace(patterns, hidden, self.feed_forward(l, u, hidden))

    def scores(self, l: int, z: Tokens) -> Scores:
        """Compute ``Zᵀ W_Kᵀ W_Q Z`` of block ``l``, from 0: a row per key, a column per query."""
        queries, keys = (by_heads(w[..., l, :, :, :], z) for w in (self.W_Q, self.W_K))
        return keys.mT @ queries

    def patterns(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """Compute the softmax of each column; if ``causal``, over the token and earlier ones."""
        if self.settings.causal:
            later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(-1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-2)

    def attend(self, l: int, z: Tokens, patterns: Scores) -> Tokens:
        """Compute ``U`` of block ``l`` from tokens and attention patterns."""
        return self.mix(l, z, patterns)

    def mix(self, l: int, z: Tokens, patterns: Scores) -> Tokens:
        """Compute ``Σ_h W_O^h W_V^h Z P_h`` of block ``l``."""
        values = by_heads(self.W_V[..., l, :, :, :], z)
        mixed = (self.each_head(values) @ patterns).flatten(-3, -2)
        return times(self.W_O[..., l, :, :, :].transpose(-3, -2).flatten(-2), mixed)

    def hidden(self, l: int, u: Tokens) -> Hidden:
        """Compute the argument of block ``l``'s activation from ``U``."""
        return times(self.W_1[..., l, :, :], u) + self.b_1[..., l, :, None]

    def activate(self, p: Hidden) -> Hidden:
        """Compute ``σ(p)``."""
        return ACTIVATIONS[self.settings.activation](p)

    def feed_forward(self, l: int, u: Tokens, hidden: Hidden) -> Tokens:
        """Compute ``Y`` of block ``l``, which the next block reads, from ``U`` and `hidden`."""
        return times(self.W_2[..., l, :, :], self.activate(hidden)) + self.b_2[..., l, :, None]

    def output(self, z: Tokens) -> Float[Tensor, "*batch out n"]:
        """Compute the outputs for the tokens that leave the last block."""
        return times(self.W_out, z)

    def each_head(self, stack: Tensor, dim: int = -3) -> Tensor:
        """Repeat the members of a stack, one for each group, for each head of the group."""
        repeats = self.heads // self.groups
        return stack if repeats == 1 else stack.repeat_interleave(repeats, dim)

    def _usable(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Complete parameters as the settings ask, all of one type and batch shape."""
        for kind in given:
            _checks.choice("parameters", kind, self.kinds)
        needed = {kind for kind in self.weight_kinds if kind != "W_out"} | {*given}
        tensors = {
            kind: _checks.real_tensor(kind, given[kind], min_dims=len(SHAPES[kind]), copy=True)
            for kind in self.kinds
            if kind in needed
        }
        sizes = _sizes(tensors)
        sizes.setdefault("outputs", sizes["width"])
        if sizes["heads"] % sizes["groups"]:
            allowed = f"as many as heads, {sizes['heads']}, or a part of these that divides them"
            raise InputError("groups of W_K and W_V", allowed=allowed, given=sizes["groups"])
        like = tensors["W_Q"]
        for kind in {*self.kinds} - needed:
            shape, value = [sizes[side] for side in SHAPES[kind]], float(kind.startswith("g"))
            default = torch.eye(sizes["width"]) if kind == "W_out" else torch.full(shape, value)
            tensors[kind] = default.to(like)
        parts = [(tensors[kind], len(SHAPES[kind])) for kind in self.kinds]
        return dict(zip(self.kinds, _checks.one_batch(parts), strict=True))


def times(W: Float[Tensor, "*#batch out in"], x: Float[Tensor, "*#batch in n"]) -> Tensor:
    """Multiply columns by weights.

    Dimensions of ``x`` that the weights lack become columns: one large product is many times
    faster than many small ones.
    """
    shared, sizes = W.shape[:-2][::-1], x.shape[:-2][::-1]
    folded = next((i for i, size in enumerate(shared[: len(sizes)]) if size != 1), len(sizes))
    if not folded:
        return W @ x
    columns = x.movedim(-2, -2 - folded)
    W = W.reshape(*W.shape[: max(W.ndim - 2 - folded, 0)], *W.shape[-2:])
    y = W @ columns.flatten(-1 - folded)
    return y.unflatten(-1, columns.shape[-1 - folded :]).movedim(-2 - folded, -2)


def by_heads(W: Float[Tensor, "*#batch heads out in"], x: Tokens) -> Tensor:
    """Multiply tokens by the weights of each head; ``[..., heads, out, n]``."""
    return times(W.flatten(-3, -2), x).unflatten(-2, W.shape[-3:-1])


def random_stacks(
    kinds: Sequence[str],
    sizes: Mapping[str, int],
    batch_shape: tuple[int, ...],
    draw: Callable[[str, tuple[int, ...]], Tensor],
) -> dict[str, Tensor]:
    """Draw the stacks of some kinds of parameters in this order; ``draw`` takes kind and shape."""
    return {kind: draw(kind, (*batch_shape, *(sizes[s] for s in SHAPES[kind]))) for kind in kinds}


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Read every size by its name; refuse parameters that disagree."""
    sizes: dict[str, int] = {}
    for kind, tensor in parameters.items():
        sides = SHAPES[kind]
        given = tuple(tensor.shape[-len(sides) :])
        allowed = tuple(sizes.setdefault(side, n) for side, n in zip(sides, given, strict=True))
        if given != allowed:
            words = f"[..., {', '.join(sides)}] = [..., {', '.join(map(str, allowed))}]"
            raise InputError(kind, allowed=words, given=f"shape {tuple(tensor.shape)}")
    return sizes
