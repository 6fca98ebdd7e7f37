"""Transformers: attention and feed-forward layers, with or without residuals and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .. import _checks, lowrank, randomness
from ..errors import InputError
from .base import Network

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
    "b_2": ("blocks", "width"),
    "g_1": ("blocks", "width"),
    "s_1": ("blocks", "width"),
    "g_2": ("blocks", "width"),
    "s_2": ("blocks", "width"),
    "g_f": ("width",),
    "s_f": ("width",),
}
SHAPES = WEIGHTS | VECTORS
GAINS, SHIFTS = ("g_1", "g_2", "g_f"), ("s_1", "s_2", "s_f")
Tokens = Float[Tensor, "*#batch width n"]
Hidden = Float[Tensor, "*#batch hidden n"]
Scores = Float[Tensor, "*#batch heads n n"]
# Random weights of plain transformers are drawn in this order.
_PLAIN_ORDER = ("W_Q", "W_K", "W_V", "W_O", "W_1", "b_1", "W_2", "b_2", "W_out")
# By whose root random weights and biases are divided, where it is not the width.
_SCALED_BY = {"W_O": "value size", "W_2": "hidden", "b_2": "hidden"}


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
    """What a `Transformer` does with its parameters [def-residual], [def-decoder].

    A transformer with neither residual connections nor norms is *plain* [def-transformer]: it has
    no other option than ``activation`` and ``causal``. Raises `InputError` for unknown norms
    and activations, numbers out of range, and options that exclude each other.

    Parameters
    ----------
    residual : bool
        Whether attention and feed-forward layers add to what they read.
    norm : {"layer", "rms"}, optional
        The norm before attention and before the feed-forward layer; by default none.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
        ``σ``; ``"gelu_tanh"`` approximates the GELU.
    final_norm : bool
        Whether a norm follows the last block.
    causal : bool
        Whether a token attends only to itself and to earlier ones.
    gated : bool
        Whether ``W_3 N_2(U) + b_3`` multiplies what the activation gives.
    rotary : float, optional
        The base of rotary positions, such as 10000; by default there are none.
    eps : float
        ``ε`` of the norms, at least 0.
    """

    residual: bool = False
    norm: Norm | None = None
    activation: Activation = "relu"
    final_norm: bool = False
    causal: bool = False
    gated: bool = False
    rotary: float | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.norm is not None:
            _checks.choice("norm", self.norm, get_args(Norm))
        elif self.final_norm:
            raise InputError("final_norm", allowed="False without a norm", given=True)
        _checks.choice("activation", self.activation, get_args(Activation))
        for name, given in (("gated", self.gated), ("rotary", self.rotary)):
            if given and self.is_plain:
                allowed = "left out without residual connections and norms"
                raise InputError(name, allowed=allowed, given=given)
        if self.rotary is not None:
            _checks.positive("rotary", self.rotary)
        _checks.finite("eps", self.eps, 0)

    @property
    def is_plain(self) -> bool:
        """Whether there are neither residual connections nor norms."""
        return not self.residual and self.norm is None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parameters of a network with these settings, weights first."""
        has = {
            "W_out": self.is_plain,
            **dict.fromkeys(("W_3", "b_3"), self.gated),
            **dict.fromkeys(("b_Q", "b_O"), not self.is_plain),
            "b_K": self.rotary is not None,
            **dict.fromkeys(("g_1", "s_1", "g_2", "s_2"), self.norm is not None),
            **dict.fromkeys(("g_f", "s_f"), self.final_norm),
        }
        return tuple(kind for kind in SHAPES if has.get(kind, True))


_PLAIN = Settings()


@dataclass(frozen=True, eq=False, repr=False)
class Transformer(Network):
    """``L`` blocks of attention with ``H`` heads and a feed-forward layer.

    A block maps the tokens, columns of ``Z``, to ``Y = W_2 σ(W_1 N_2(U) + b_1) + b_2`` with
    ``U = Σ_h W_O^h W_V^h N_1(Z) P_h + b_O`` and
    ``P_h = softmax(N_1(Z)ᵀ W_K^hᵀ (W_Q^h N_1(Z) + b_Q^h))``, the softmax of each column. Residual
    connections add ``Z`` to ``U`` and ``U`` to ``Y`` [def-residual]. A norm is ``N(z) = g ⊙ n + s``
    with ``n = z̃ / (‖z̃‖²/D + ε)^{1/2}``; ``z̃`` is ``z`` minus its mean for a LayerNorm and ``z``
    for an RMSNorm; ``n = 0`` where ``z̃ = 0``. Without norms ``N(z) = z``.

    A *plain* transformer, without residual connections, norms, ``b_Q`` and ``b_O``, returns
    ``W_out Y`` of the last block [def-transformer]; others return ``Y``, or a norm of it. *Gated*
    layers multiply ``σ(…)`` by ``W_3 N_2(U) + b_3``, *grouped* heads share ``W_K`` and ``W_V`` with
    their neighbours, and *rotary* positions rotate queries and keys, with biases ``b_K``
    [def-decoder].

    Each parameter is also an attribute, such as ``network.W_Q``. Raises `InputError` for sizes that
    do not fit, other or mixed types, non-finite entries, and parameters that the settings exclude
    or lack.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        ``W_Q, W_K, W_V`` ``[..., L, H, d, D]``, ``W_O`` ``[..., L, H, D, d]``, with one ``d`` for
        queries and keys and perhaps another for values, and with groups for ``H`` in ``W_K`` and
        ``W_V``; ``W_1, W_3`` ``[..., L, F, D]``, ``W_2`` ``[..., L, D, F]``, ``W_out``
        ``[..., out, D]``, by default the identity. Vectors are ``b_Q, b_K`` ``[..., L, H, d]``,
        ``b_1, b_3`` ``[..., L, F]``, ``b_O, b_2`` and gains and shifts ``g_1, s_1, g_2, s_2``
        ``[..., L, D]``, of the final norm ``g_f, s_f`` ``[..., D]``. Gains are 1 by default, other
        vectors 0. Biases of keys cancel without positions; those of values are in ``b_O``.
    settings : Settings
        By default plain.
    """

    parameters: Mapping[str, Any]
    settings: Settings = _PLAIN

    sequences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _usable(self.parameters, self.settings))

    def __getattr__(self, kind: str) -> Tensor:
        """Get a parameter by its kind."""
        if kind not in SHAPES or kind not in vars(self).get("parameters", {}):
            raise AttributeError(f"{type(self).__name__} has no {kind!r}")
        return self.parameters[kind]

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
    ) -> Transformer:
        """Draw a network of some `Settings`, by seed and purpose.

        Matrices and biases are uniform on ``±1/√n``, with ``n`` the columns of the matrix (``D``
        for ``b_O``). Gains are uniform on ½ to 1½ and shifts on ±½. If plain, attention weights are
        normal of deviation ``scale``, 1 by default as in the paper; ``D^{-1/2}`` keeps scores
        moderate. ``head_size`` is ``d``, by default the width; ``hidden`` is ``F``, by default the
        width if plain, otherwise twice that; ``groups`` share keys and values, by default each head
        has its own.
        """
        chosen = Settings(**settings)
        if scale is not None and not chosen.is_plain:
            allowed = "left out with residual connections or norms"
            raise InputError("scale", allowed=allowed, given=scale)
        scale = _checks.positive("scale", 1.0 if scale is None else scale)
        given = {
            "depth": depth,
            "width": width,
            "heads": heads,
            "groups": heads if groups is None else groups,
            "head_size": width if head_size is None else head_size,
            "hidden": width * (1 if chosen.is_plain else 2) if hidden is None else hidden,
        }
        sizes = {name: _checks.integer(name, size, 1) for name, size in given.items()}
        sizes |= {"blocks": sizes["depth"], "outputs": width}
        sizes |= dict.fromkeys(("query size", "value size"), sizes["head_size"])
        stream = "transformer" if chosen.is_plain else "residual transformer"
        generator = randomness.generator(seed, stream, purpose)
        parameters = {}
        for kind in _PLAIN_ORDER if chosen.is_plain else chosen.kinds:
            shape = (*batch_shape, *(sizes[side] for side in SHAPES[kind]))
            if chosen.is_plain and kind in PARTS["attention"]:
                drawn = scale * randomness.normal(generator, *shape)
            elif kind in GAINS:
                drawn = randomness.uniform(generator, *shape) + 0.5
            elif kind in SHIFTS:
                drawn = randomness.uniform(generator, *shape) - 0.5
            else:
                root = sizes[_SCALED_BY.get(kind, "width")] ** 0.5
                drawn = (2 * randomness.uniform(generator, *shape) - 1) / root
            parameters[kind] = drawn.to(dtype)
        return cls(parameters, chosen)

    def replace(self, **changes: Any) -> Self:
        """Make the network with other parameters, named by their kinds, or other settings."""
        options = {field.name for field in fields(Settings)} & {*changes}
        settings = replace(self.settings, **{name: changes.pop(name) for name in options})
        return type(self)({**self.parameters, **changes}, settings)

    # Parameters and sizes.

    @property
    def is_plain(self) -> bool:
        """Whether it has neither residual connections nor norms."""
        return self.settings.is_plain

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
        """The kinds of weights that the theorem adapts [thm-transformer], [thm-residual].

        All; if plain, not ``W_1``, and ``W_2`` only in the last block.
        """
        return tuple(kind for kind in self.weight_kinds if not (self.is_plain and kind == "W_1"))

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of ``weights``, whether the theorem adapts it."""
        frozen = [f"W_2 of block {l}" for l in range(1, self.depth)] if self.is_plain else []
        names = zip(self.weight_names, self.kind_of_weight, strict=True)
        return tuple(kind in self.adapted_kinds and name not in frozen for name, kind in names)

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
    def dimension(self) -> int:
        """``m`` of the space of normalized tokens: ``D − 1`` under a LayerNorm, otherwise ``D``."""
        return self.width - (1 if self.settings.norm == "layer" else 0)

    @property
    def _sides(self) -> str:
        options = [
            f"{field.name} {value}"
            for field in fields(Settings)
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
        self, frozen: Transformer, settings: Sequence[str], sizes: Sequence[str] = ()
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

    def value_ranks(self, ranks: int | Sequence[int] | None) -> dict[str, int]:
        """Read the rank of each ``W_V`` and ``W_O`` by name; a total goes to one of them."""
        if not isinstance(ranks, Sequence):
            total = self.width if ranks is None else _checks.integer("ranks", ranks, 0)
            return {"W_O of block 1, head 1": total}
        each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in self.weights])
        kinds = zip(self.weight_names, self.kind_of_weight, each, strict=True)
        return {name: rank for name, kind, rank in kinds if kind in ("W_V", "W_O")}

    @property
    def readings(self) -> tuple[Tensor, Tensor]:
        """``B = diag(g) V`` of both norms, ``[..., L, 1, D, m]`` and ``[..., L, D, m]``."""
        V = self.basis()
        if self.settings.norm is None:
            return V, V
        return self.g_1[..., None, :, None] * V, self.g_2[..., None] * V

    @property
    def shifts(self) -> tuple[Tensor, Tensor]:
        """``s_1`` and ``s_2``, which are 0 without norms."""
        none = torch.zeros_like(self.b_O)
        return self.parameters.get("s_1", none), self.parameters.get("s_2", none)

    @property
    def missing_shift(self) -> Float[Tensor, "*batch _ width"]:
        """``c`` with ``W_{2,l} c = b_{2,l}`` for all blocks but the last; ``[..., L − 1, D]``."""
        W_2, b_2 = self.W_2[..., :-1, :, :], self.b_2[..., :-1, :, None]
        return lowrank.solve(W_2, b_2)[..., 0]

    def vectors_like(self, target: Transformer, *, paired: bool) -> dict[str, Tensor]:
        """Find the vectors that complete adapted weights to the target, unless plain.

        Where queries and keys are ``paired`` in one segment, the bias of queries is left out.
        """
        s_1, s_2 = target.shifts
        vectors = {}
        for kind in target.bias_kinds:
            if kind in (*GAINS, *SHIFTS, "b_2"):
                vectors[kind] = target.parameters[kind]
            elif kind in (("b_1", "b_3") if paired else ("b_1", "b_3", "b_Q", "b_K")):
                weight = kind.replace("b", "W")
                s = s_2 if kind in ("b_1", "b_3") else s_1.unsqueeze(-2)
                wanted = target.parameters[kind] + lowrank.times(target.parameters[weight], s)
                vectors[kind] = wanted - lowrank.times(self.parameters[weight], s)
        s = s_1.unsqueeze(-2)
        wanted, reached = (
            lowrank.times(network.W_O, network.each_head(lowrank.times(network.W_V, s), -2))
            for network in (target, self)
        )
        vectors["b_O"] = target.b_O + (wanted - reached).sum(-2)
        return vectors

    def with_norms(self, other: Transformer) -> Transformer:
        """Write the same function with another network's gains ``g`` and shifts ``s``.

        ``W diag(ḡ/g)`` reads ``g ⊙ n + s`` as ``W`` reads ``ḡ ⊙ n + s̄``, up to a constant that
        biases take up: ``b_O`` that of values; that of keys matters for rotary positions alone.
        Adapters for the result leave the other's gains and shifts frozen, but for a final norm,
        which stays this network's. Raises `InputError` for networks that do not fit, and where
        ``other`` has a gain of 0.
        """
        _checks.kind(Transformer, other=other)
        self.require_like(other, ("norm",), ("blocks", "width"))
        if self.settings.norm is None:
            return self
        parts = {**self.parameters}
        for place, kinds in (("1", ("W_Q", "W_K", "W_V")), ("2", ("W_1", "W_3"))):
            gains, shifts = other.parameters[f"g_{place}"], other.parameters[f"s_{place}"]
            if not gains.all():
                raise InputError(f"g_{place} of other", allowed="without 0", given="one of 0")
            ratio = self.parameters[f"g_{place}"] / gains
            rest = self.parameters[f"s_{place}"] - ratio * shifts
            parts |= {f"g_{place}": gains, f"s_{place}": shifts}
            for kind in [kind for kind in kinds if kind in parts]:
                W, of_heads = self.parameters[kind], place == "1"
                factor, constant = (v.unsqueeze(-2) if of_heads else v for v in (ratio, rest))
                parts[kind] = W * factor.unsqueeze(-2)
                moved, bias = lowrank.times(W, constant), kind.replace("W", "b")
                if kind == "W_V":
                    bias, moved = "b_O", lowrank.times(self.W_O, self.each_head(moved, -2)).sum(-2)
                if bias in parts:
                    parts[bias] = parts[bias] + moved
        return Transformer(parts, self.settings)

    # Evaluation.

    def as_inputs(self, x: Any, name: str = "x") -> Tokens:
        x = super().as_inputs(x, name)
        _checks.common_shape(f"{name} and network", [tuple(x.shape[:-2]), tuple(self.batch_shape)])
        return x

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
        g, s = (self.parameters[f"{kind}_{place}"][..., l, :, None] for kind in "gs")
        return g * self.normalize(z) + s

    def scores(self, l: int, z: Tokens) -> Scores:
        """Compute ``N_1(Z)ᵀ W_Kᵀ (W_Q N_1(Z) + b_Q)`` of block ``l``.

        There is a row per key, a column per query. With rotary positions keys get ``b_K``, and both
        are rotated before they are multiplied.
        """
        tokens = self._norm(1, l, z)
        queries, keys = (_by_heads(w[..., l, :, :, :], tokens) for w in (self.W_Q, self.W_K))
        if not self.is_plain:
            queries = queries + self.b_Q[..., l, :, :, None]
        if self.settings.rotary is not None:
            keys = self.rotate(keys + self.b_K[..., l, :, :, None])
            queries = self.rotate(queries)
        return self.each_head(keys).mT @ queries

    def rotate(self, x: Float[Tensor, "*batch size n"]) -> Float[Tensor, "*batch size n"]:
        """Rotate queries or keys by their positions."""
        assert self.settings.rotary is not None
        half, n = x.shape[-2] // 2, x.shape[-1]
        steps, positions = (torch.arange(count, dtype=x.dtype).to(x.device) for count in (half, n))
        angles = self.settings.rotary ** -(steps / half)[:, None] * positions
        (first, second), c, s = x.chunk(2, -2), angles.cos(), angles.sin()
        return torch.cat([first * c - second * s, second * c + first * s], -2)

    def each_head(self, stack: Tensor, dim: int = -3) -> Tensor:
        """Repeat the members of a stack, one for each group, for each head of the group."""
        times = self.heads // self.groups
        return stack if times == 1 else stack.repeat_interleave(times, dim)

    def patterns(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """Compute the softmax of each column; if ``causal``, over the token and earlier ones."""
        if self.settings.causal:
            later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(-1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-2)

    def attend(self, l: int, z: Tokens, patterns: Scores) -> Tokens:
        """Compute ``U`` of block ``l`` from tokens and attention patterns."""
        values = _by_heads(self.W_V[..., l, :, :, :], self._norm(1, l, z))
        mixed = (self.each_head(values) @ patterns).flatten(-3, -2)
        attention = _times(self.W_O[..., l, :, :, :].transpose(-3, -2).flatten(-2), mixed)
        if self.is_plain:
            return attention
        u = z + attention if self.settings.residual else attention
        return u + self.b_O[..., l, :, None]

    def hidden(self, l: int, u: Tokens) -> Hidden:
        """Compute the argument of block ``l``'s activation from ``U``."""
        return _times(self.W_1[..., l, :, :], self._norm(2, l, u)) + self.b_1[..., l, :, None]

    def activate(self, p: Hidden) -> Hidden:
        """Compute ``σ(p)``."""
        return ACTIVATIONS[self.settings.activation](p)

    def up(self, l: int, u: Tokens) -> Hidden:
        """Compute ``W_3 N_2(U) + b_3``, by which a gated block multiplies activations."""
        return _times(self.W_3[..., l, :, :], self._norm(2, l, u)) + self.b_3[..., l, :, None]

    def feed_forward(self, l: int, u: Tokens, hidden: Hidden) -> Tokens:
        """Compute ``Y`` of block ``l``, which the next block reads, from ``U`` and `hidden`."""
        active = self.activate(hidden)
        if self.settings.gated:
            active = active * self.up(l, u)
        y = _times(self.W_2[..., l, :, :], active)
        return (u + y if self.settings.residual else y) + self.b_2[..., l, :, None]

    def output(self, z: Tokens) -> Float[Tensor, "*batch out n"]:
        """Compute the outputs for the tokens that leave the last block."""
        if self.is_plain:
            return _times(self.W_out, z)
        if not self.settings.final_norm:
            return z
        return self.g_f[..., None] * self.normalize(z) + self.s_f[..., None]

    def basis(self) -> Float[Tensor, "width m"]:
        """Make an orthonormal basis of the space of normalized tokens, of dimension ``m``."""
        identity = torch.eye(self.width).to(self.W_Q)
        if self.settings.norm != "layer":
            return identity
        constant = torch.ones_like(identity[:, :1])
        return torch.linalg.qr(torch.cat([constant, identity[:, :-1]], 1)).Q[:, 1:]


def _times(W: Float[Tensor, "*#batch out in"], x: Float[Tensor, "*#batch in n"]) -> Tensor:
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


def _by_heads(W: Float[Tensor, "*#batch heads out in"], x: Tokens) -> Tensor:
    """Multiply tokens by the weights of each head; ``[..., heads, out, n]``."""
    return _times(W.flatten(-3, -2), x).unflatten(-2, W.shape[-3:-1])


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


def _usable(given: Mapping[str, Any], settings: Settings) -> dict[str, Tensor]:
    """Complete parameters as the settings ask, all of one type and batch shape."""
    for kind in given:
        _checks.choice("parameters", kind, tuple(SHAPES))
        if kind not in settings.kinds:
            raise InputError(kind, allowed="left out with these settings", given="one")
    for kind in settings.kinds:
        if kind in WEIGHTS and kind != "W_out" and kind not in given:
            raise InputError(kind, allowed="given with these settings", given="none")
    tensors = {
        kind: _checks.real_tensor(kind, given[kind], min_dims=len(SHAPES[kind]), copy=True)
        for kind in settings.kinds
        if kind in given
    }
    sizes = _sizes(tensors)
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        allowed = "all float32 or all float64"
        raise InputError("weights and biases", allowed=allowed, given="both", remedy="convert one")
    heads, groups = sizes["heads"], sizes["groups"]
    if groups < 1 or heads % groups or (heads != groups and settings.is_plain):
        allowed = "as many as heads, which with residual connections or norms may be a multiple"
        raise InputError("groups of W_K and W_V", allowed=allowed, given=groups)
    if settings.rotary is not None and sizes["query size"] % 2:
        allowed = "with an even query size, rotated in pairs"
        raise InputError("W_Q", allowed=allowed, given=sizes["query size"])
    batch = _checks.common_shape(
        "weights and biases",
        [tuple(tensor.shape[: -len(SHAPES[kind])]) for kind, tensor in tensors.items()],
    )
    parameters = {}
    for kind in settings.kinds:
        if kind in tensors:
            part = tensors[kind]
        elif kind == "W_out":
            part = torch.eye(sizes["width"]).to(tensors["W_Q"])
        else:
            shape = [sizes[side] for side in SHAPES[kind]]
            part = tensors["W_Q"].new_full(shape, 1.0 if kind in GAINS else 0.0)
        parameters[kind] = part.expand(*batch, *part.shape[-len(SHAPES[kind]) :])
    return parameters
