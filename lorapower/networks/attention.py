"""What all transformers share: stacks of parameters over blocks and heads, how they compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import compress
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .. import _checks, randomness
from ..errors import InputError
from .base import Network, Outputs

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["layer", "rms"]
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
GAINS, SHIFTS = ("g_1", "g_2", "g_f"), ("s_1", "s_2", "s_f")
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
    """What a transformer does with its parameters [def-residual], [def-decoder].

    Raises `InputError` for unknown norms and activations, and for numbers out of range.

    Parameters
    ----------
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
        ``σ``; ``"gelu_tanh"`` approximates the GELU.
    causal : bool
        Whether a token attends only to itself and to earlier ones.
    residual : bool
        Whether attention and feed-forward layers add to what they read.
    norm : {"layer", "rms"}, optional
        The norm before attention and before the feed-forward layer; by default none.
    final_norm : bool
        Whether a norm follows the last block.
    gated : bool
        Whether ``W_3 N_2(U) + b_3`` multiplies what the activation gives.
    rotary : float, optional
        The base of rotary positions, such as 10000; by default there are none.
    eps : float
        ``ε`` of the norms, at least 0.
    """

    activation: Activation = "relu"
    causal: bool = False
    residual: bool = False
    norm: Norm | None = None
    final_norm: bool = False
    gated: bool = False
    rotary: float | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _checks.choice("activation", self.activation, get_args(Activation))
        if self.norm is not None:
            _checks.choice("norm", self.norm, get_args(Norm))
        elif self.final_norm:
            raise InputError("final_norm", allowed="False without a norm", given=True)
        if self.rotary is not None:
            _checks.number("rotary", self.rotary, 1)
        _checks.number("eps", self.eps, 0)


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Network):
    """A network of blocks of attention and feed-forward layers, of the kinds of its `settings`.

    Each parameter is also an attribute, such as ``network.W_Q``. Raises `InputError` for sizes that
    do not fit, other or mixed types, non-finite entries, and parameters that the settings exclude.
    """

    parameters: Mapping[str, Any]
    settings: Settings

    sequences: ClassVar[bool] = True
    # How random networks are drawn: the stream, the hidden units for each coordinate of a token,
    # and the deviation of attention weights, where these are normal.
    _stream: ClassVar[str]
    _widening: ClassVar[int]
    _scale: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", self._usable(self.parameters))

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        hidden: int | None = None,
        groups: int | None = None,
        scale: float | None = None,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> Self:
        """Draw a network of some `Settings`, by seed and purpose.

        Matrices and biases are uniform on ``±1/√n``, with ``n`` the columns of the matrix (``D``
        for ``b_O``), gains on ½ to 1½, shifts on ±½. Attention weights of a `Transformer`, or with
        a ``scale``, are normal of this deviation, by default 1 as in the paper; ``D^{-1/2}`` keeps
        scores moderate. ``head_size`` is ``d``, by default the width; ``hidden`` is ``F``, by
        default the width in a `Transformer`, twice the width in a `Decoder`. The heads of each of
        the ``groups`` share keys and values; by default each has its own.

        Examples
        --------
        >>> from lorapower.networks import Decoder, Transformer
        >>> network = Transformer.random(2, 8, 2, head_size=4, scale=8**-0.5)
        >>> network.W_Q.shape, network.depth, network.heads
        (torch.Size([2, 2, 4, 8]), 2, 2)
        >>> llama = {"residual": True, "norm": "rms", "gated": True, "rotary": 1e4, "causal": True}
        >>> network = Decoder.random(2, 8, 4, groups=2, head_size=2, activation="silu", **llama)
        >>> network.W_Q.shape, network.W_K.shape, network.W_3.shape
        (torch.Size([2, 4, 2, 8]), torch.Size([2, 2, 2, 8]), torch.Size([2, 16, 8]))
        """
        chosen, d = Settings(**settings), width if head_size is None else head_size
        deviation = cls._scale if scale is None else scale
        sizes = {
            **{"blocks": depth, "heads": heads, "groups": heads if groups is None else groups},
            **{"query size": d, "value size": d, "width": width, "outputs": width},
            "hidden": cls._widening * width if hidden is None else hidden,
        }
        generator = randomness.generator(seed, cls._stream, purpose)

        def draw(kind: str) -> Tensor:
            shape = (*batch_shape, *(sizes[side] for side in SHAPES[kind]))
            if deviation is not None and kind in PARTS["attention"]:
                return deviation * randomness.normal(generator, *shape)
            drawn = randomness.uniform(generator, *shape)
            if kind in GAINS or kind in SHIFTS:
                return drawn + (0.5 if kind in GAINS else -0.5)
            columns = "width" if kind == "b_O" else WEIGHTS[kind.replace("b", "W")][-1]
            return (2 * drawn - 1) / sizes[columns] ** 0.5

        return cls({kind: draw(kind).to(dtype) for kind in cls._kinds(chosen)}, chosen)

    @classmethod
    @abstractmethod
    def _kinds(cls, settings: Settings) -> tuple[str, ...]:
        """Say which kinds of parameters there are, in the order in which they are drawn."""

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
    def weight_kinds(self) -> tuple[str, ...]:
        """The kinds that are matrices, in the order of ``weights``."""
        return tuple(kind for kind in self.parameters if kind in WEIGHTS)

    @property
    def bias_kinds(self) -> tuple[str, ...]:
        """The kinds that are vectors, in the order of ``biases``."""
        return tuple(kind for kind in self.parameters if kind in VECTORS)

    @property
    def adapted_kinds(self) -> tuple[str, ...]:
        """The kinds of weights that the theorem adapts [thm-transformer], [thm-residual]."""
        return tuple(dict.fromkeys(compress(self.kind_of_weight, self.adapted)))

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

    def _rebuilt(self, weights: Sequence[Tensor], biases: Sequence[Tensor], checked: bool) -> Self:
        remaining = iter((*weights, *biases))
        stacks = {}
        for kind in (*self.weight_kinds, *self.bias_kinds):
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

    def __call__(self, x: Tokens) -> Outputs:
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

    def normalize(self, z: Tokens) -> Tokens:
        """Compute ``n``: tokens without mean (LayerNorm) and of mean square 1, up to ``ε``."""
        if self.settings.norm == "layer":
            z = z - z.mean(-2, keepdim=True)
        square = z.square().mean(-2, keepdim=True) + self.settings.eps
        return z * torch.where(square > 0, square, 1).rsqrt()

    def _norm(self, place: Literal[1, 2], l: int, z: Tensor) -> Tensor:
        """Compute ``N_1(z)`` or ``N_2(z)`` of block ``l``, counted from 0."""
        if self.settings.norm is None:
            return z
        g, s = (self._of_block(f"{kind}_{place}", l)[..., None] for kind in "gs")
        return g * self.normalize(z) + s

    def _of_block(self, kind: str, l: int) -> Tensor:
        return self.parameters[kind].select(-len(SHAPES[kind]), l)

    def _affine(self, name: str, l: int, x: Tensor) -> Tensor:
        """Compute ``W x + b`` of block ``l``, where there is a ``b``; for each head if of heads."""
        W = self._of_block(f"W_{name}", l)
        if len(SHAPES[f"W_{name}"]) == 3:
            return self._plus(times(W, x), f"b_{name}", l)
        by_head = times(W.flatten(-3, -2), x).unflatten(-2, W.shape[-3:-1])
        return self._plus(by_head, f"b_{name}", l)

    def _plus(self, x: Tensor, bias: str, l: int) -> Tensor:
        return x + self._of_block(bias, l)[..., None] if bias in self.parameters else x

    def scores(self, l: int, z: Tokens) -> Scores:
        """Compute ``N_1(Z)ᵀ W_Kᵀ (W_Q N_1(Z) + b_Q)`` of block ``l``, counted from 0.

        There is a row per key, a column per query. With rotary positions keys get ``b_K``, and both
        are rotated before they are multiplied.
        """
        tokens = self._norm(1, l, z)
        queries, keys = (self._affine(name, l, tokens) for name in "QK")
        if self.settings.rotary is not None:
            queries, keys = self.rotate(queries), self.rotate(keys)
        return self.each_head(keys).mT @ queries

    def rotate(self, x: Float[Tensor, "*batch size n"]) -> Float[Tensor, "*batch size n"]:
        """Rotate queries or keys by their positions."""
        assert self.settings.rotary is not None
        half, n = x.shape[-2] // 2, x.shape[-1]
        steps, positions = (torch.arange(count, dtype=x.dtype).to(x.device) for count in (half, n))
        angles = self.settings.rotary ** -(steps / half)[:, None] * positions
        (first, second), c, s = x.chunk(2, -2), angles.cos(), angles.sin()
        return torch.cat([first * c - second * s, second * c + first * s], -2)

    def patterns(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """Compute the softmax of each column; if ``causal``, over the token and earlier ones."""
        if self.settings.causal:
            later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(-1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-2)

    def attend(self, l: int, z: Tokens, patterns: Scores) -> Tokens:
        """Compute ``U`` of block ``l`` from tokens and attention patterns."""
        values = self._affine("V", l, self._norm(1, l, z))
        mixed = (self.each_head(values) @ patterns).flatten(-3, -2)
        u = times(self._of_block("W_O", l).transpose(-3, -2).flatten(-2), mixed)
        return self._plus(z + u if self.settings.residual else u, "b_O", l)

    def hidden(self, l: int, u: Tokens) -> Hidden:
        """Compute ``W_1 N_2(U) + b_1`` of block ``l``, which the activation receives."""
        return self._affine("1", l, self._norm(2, l, u))

    def activate(self, p: Hidden) -> Hidden:
        """Compute ``σ(p)``."""
        return ACTIVATIONS[self.settings.activation](p)

    def feed_forward(self, l: int, u: Tokens, hidden: Hidden) -> Tokens:
        """Compute ``Y`` of block ``l``, which the next block reads, from ``U`` and `hidden`."""
        active = self.activate(hidden)
        if self.settings.gated:
            active = active * self._affine("3", l, self._norm(2, l, u))
        y = times(self._of_block("W_2", l), active)
        return self._plus(u + y if self.settings.residual else y, "b_2", l)

    def output(self, z: Tokens) -> Outputs:
        """Compute the outputs for the tokens that leave the last block."""
        if self.settings.final_norm:
            z = self.g_f[..., None] * self.normalize(z) + self.s_f[..., None]
        return times(self.W_out, z) if "W_out" in self.parameters else z

    def each_head(self, stack: Tensor, dim: int = -3) -> Tensor:
        """Repeat the members of a stack, one for each group, for each head of the group."""
        repeats = self.heads // self.groups
        return stack if repeats == 1 else stack.repeat_interleave(repeats, dim)

    def _usable(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Complete parameters as the settings ask, all of one type and batch shape."""
        kinds = self._kinds(self.settings)
        for kind in given:
            _checks.choice("parameters", kind, kinds)
        needed = {kind for kind in kinds if kind in WEIGHTS and kind != "W_out"} | {*given}
        tensors = {
            kind: _checks.real_tensor(kind, given[kind], min_dims=len(SHAPES[kind]), copy=True)
            for kind in kinds
            if kind in needed
        }
        sizes = _sizes(tensors)
        sizes.setdefault("outputs", sizes["width"])
        if sizes["heads"] % sizes["groups"]:
            allowed = f"as many as heads, {sizes['heads']}, or a part of these that divides them"
            raise InputError("groups of W_K and W_V", allowed=allowed, given=sizes["groups"])
        like = tensors["W_Q"]
        for kind in {*kinds} - needed:
            shape, value = [sizes[side] for side in SHAPES[kind]], float(kind.startswith("g"))
            default = torch.eye(sizes["width"]) if kind == "W_out" else torch.full(shape, value)
            tensors[kind] = default.to(like)
        parts = [(tensors[kind], len(SHAPES[kind])) for kind in kinds]
        return dict(zip(kinds, _checks.one_batch(parts), strict=True))


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
