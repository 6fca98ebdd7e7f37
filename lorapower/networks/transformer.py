"""Transformers: attention and feed-forward layers, with or without residuals and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .. import _checks, lowrank, randomness
from ..errors import InputError
from ._segments import Segments, cut, fuse, fused_ranks, inverted
from .base import Network
from .gap import Gap

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["layer", "rms"]
Part = Literal["attention", "mlp", "all"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda p: functional.gelu(p, approximate="tanh"),
    "silu": functional.silu,
}
#: The options of a network.
SETTINGS = ("residual", "norm", "activation", "final_norm", "causal", "gated", "rotary", "eps")
#: Kinds of weights by the part of a block that they are of.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("W_Q", "W_K", "W_V", "W_O"),
    "mlp": ("W_1", "W_3", "W_2"),
    "all": ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_3", "W_2"),
}


class BlockTrace(NamedTuple):
    """What a block computes.

    ``patterns`` are the softmax, ``[..., heads, N, N]``, columns summing to 1; ``preactivations``
    enter the activation, ``[..., hidden, N]``; ``outputs`` leave the block, ``[..., width, N]``.
    """

    patterns: Float[Tensor, "*batch heads n n"]
    preactivations: Float[Tensor, "*batch hidden n"]
    outputs: Float[Tensor, "*batch width n"]


@dataclass(frozen=True, eq=False, repr=False)
class Transformer(Network):
    """``L`` blocks of attention with ``H`` heads and a feed-forward layer.

    A block maps the tokens, columns of ``Z``, to ``Y = W_2 σ(W_1 N_2(U) + b_1) + b_2`` with
    ``U = Σ_h W_O^h W_V^h N_1(Z) P_h + b_O`` and
    ``P_h = softmax(N_1(Z)ᵀ W_K^hᵀ (W_Q^h N_1(Z) + b_Q^h))``, the softmax of each column. Residual
    connections add ``Z`` to ``U`` and ``U`` to ``Y`` [def-residual]. A norm is ``N(z) = g ⊙ n + s``
    with ``n = z̃ / (‖z̃‖²/D + ε)^{1/2}``; ``z̃`` is ``z`` minus its mean for a LayerNorm and ``z``
    for an RMSNorm; ``n = 0`` where ``z̃ = 0``. Without norms ``N(z) = z``.

    A *plain* transformer has no residual connections, norms, ``b_Q`` or ``b_O``; its output is
    ``W_out Y`` of the last block [def-transformer]. Others return ``Y``, or with ``final_norm`` a
    norm of it. If ``causal``, a token attends only to itself and earlier ones.

    Transformers that are not plain have three more options, as decoders do [def-decoder]. *Gated*
    layers are ``Y = W_2 (σ(W_1 N_2(U) + b_1) ⊙ (W_3 N_2(U) + b_3)) + b_2``. *Grouped* heads share
    keys and values: ``W_K`` and ``W_V`` have one matrix for each group of neighbouring heads.
    *Rotary* positions turn queries and keys, which then have biases ``b_K``, before they meet:
    coordinates ``i`` and ``i + d/2`` of the token at position ``j``, from 0, by the angle
    ``j · base^{−2i/d}``.

    Raises `InputError` for sizes that do not fit, other or mixed types, non-finite entries, and
    parameters that the options exclude or lack.

    Parameters
    ----------
    W_Q, W_K, W_V, W_O : Tensor
        ``[..., L, H, d, D]``, the last ``[..., L, H, D, d]``; ``d`` may be one size for queries and
        keys and another for values. Keys and values may have fewer matrices, of groups of heads.
    W_1, W_2 : Tensor
        ``[..., L, F, D]``, ``[..., L, D, F]``.
    W_3 : Tensor
        ``[..., L, F, D]``, only if ``gated``.
    W_out : Tensor, optional
        Only if plain: ``[..., out, D]``, by default the identity.
    norm : {"layer", "rms"}, optional
        The norm before attention and before the feed-forward layer; by default none.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}
        ``σ``; ``"gelu_tanh"`` approximates the GELU.
    eps : float
        ``ε``, at least 0.
    gated : bool
        Whether ``W_3 N_2(U) + b_3`` multiplies what the activation gives.
    rotary : float, optional
        The base of rotary positions, such as 10000; by default there are none.
    **vectors : Tensor
        ``b_1`` ``[..., L, F]``, ``b_2`` ``[..., L, D]``; unless plain, ``b_Q`` ``[..., L, H, d]``,
        ``b_O`` ``[..., L, D]``; if gated, ``b_3`` like ``b_1``; if rotary, ``b_K``, one for each
        matrix of ``W_K``; with norms, gains and shifts ``g_1, s_1, g_2, s_2`` ``[..., L, D]``; with
        a final norm, ``g_f, s_f`` ``[..., D]``. Gains are 1 by default, others 0. Without positions
        keys' biases cancel in the softmax; those of values are in ``b_O`` or ``b_1``.
    """

    W_Q: Float[Tensor, "*batch blocks heads query width"]
    W_K: Float[Tensor, "*batch blocks groups query width"]
    W_V: Float[Tensor, "*batch blocks groups value width"]
    W_O: Float[Tensor, "*batch blocks heads width value"]
    W_1: Float[Tensor, "*batch blocks hidden width"]
    W_2: Float[Tensor, "*batch blocks width hidden"]
    # Parameters that the options exclude are None.
    W_3: Float[Tensor, "*batch blocks hidden width"]
    W_out: Float[Tensor, "*batch out width"]
    b_Q: Float[Tensor, "*batch blocks heads query"]
    b_K: Float[Tensor, "*batch blocks groups query"]
    b_O: Float[Tensor, "*batch blocks width"]
    b_1: Float[Tensor, "*batch blocks hidden"]
    b_3: Float[Tensor, "*batch blocks hidden"]
    b_2: Float[Tensor, "*batch blocks width"]
    g_1: Float[Tensor, "*batch blocks width"]
    s_1: Float[Tensor, "*batch blocks width"]
    g_2: Float[Tensor, "*batch blocks width"]
    s_2: Float[Tensor, "*batch blocks width"]
    g_f: Float[Tensor, "*batch width"]
    s_f: Float[Tensor, "*batch width"]
    residual: bool = False
    norm: Norm | None = None
    activation: Activation = "relu"
    final_norm: bool = False
    causal: bool = False
    gated: bool = False
    rotary: float | None = None
    eps: float = 1e-5

    #: The last dimensions of every kind of parameter; equal names are equal sizes.
    SHAPES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "W_Q": ("blocks", "heads", "query size", "width"),
        "W_K": ("blocks", "groups", "query size", "width"),
        "W_V": ("blocks", "groups", "value size", "width"),
        "W_O": ("blocks", "heads", "width", "value size"),
        "W_1": ("blocks", "hidden", "width"),
        "W_3": ("blocks", "hidden", "width"),
        "W_2": ("blocks", "width", "hidden"),
        "W_out": ("outputs", "width"),
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
    sequences: ClassVar[bool] = True

    def __init__(
        self,
        W_Q: Any,
        W_K: Any,
        W_V: Any,
        W_O: Any,
        W_1: Any,
        W_2: Any,
        *,
        residual: bool = False,
        norm: Norm | None = None,
        activation: Activation = "relu",
        final_norm: bool = False,
        causal: bool = False,
        gated: bool = False,
        rotary: float | None = None,
        eps: float = 1e-5,
        **others: Any,
    ) -> None:
        for name, value in _check_settings(
            residual, norm, activation, final_norm, causal, gated, rotary, eps
        ).items():
            object.__setattr__(self, name, value)
        # `dataclasses.replace` passes on what the network does not have.
        given = {name: value for name, value in others.items() if value is not None}
        for name in given:
            _checks.choice("parameters", name, tuple(self.SHAPES))
            if name not in self.kinds:
                raise InputError(name, allowed="left out with these options", given="one")
        if self.gated and "W_3" not in given:
            raise InputError("W_3", allowed="given for gated layers", given="none")
        names = (*PARTS["attention"], "W_1", "W_2")
        weights = dict(zip(names, (W_Q, W_K, W_V, W_O, W_1, W_2), strict=True))
        tensors = {
            name: _checks.real_tensor(name, value, min_dims=len(self.SHAPES[name]), copy=True)
            for name, value in (weights | given).items()
        }
        sizes = {
            side: n
            for name in weights
            for side, n in zip(
                self.SHAPES[name], tensors[name].shape[-len(self.SHAPES[name]) :], strict=True
            )
        }
        like = tensors["W_Q"]
        for name in self.kinds:
            if name == "W_out" and name not in tensors:
                tensors[name] = torch.eye(sizes["width"], dtype=like.dtype, device=like.device)
            elif name not in tensors:
                shape = [sizes[side] for side in self.SHAPES[name]]
                tensors[name] = like.new_full(shape, name[0] == "g")
        self._set({name: tensors[name] for name in self.kinds})

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters, of one batch shape; refuse those that do not fit together."""
        sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            shape = self.SHAPES[name]
            given = tuple(tensor.shape[-len(shape) :])
            allowed = tuple(sizes.setdefault(side, n) for side, n in zip(shape, given, strict=True))
            if given != allowed:
                raise InputError(
                    name,
                    allowed=f"[..., {', '.join(shape)}] = [..., {', '.join(map(str, allowed))}]",
                    given=f"shape {tuple(tensor.shape)}",
                )
        if len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise InputError(
                "weights and biases",
                allowed="all float32 or all float64",
                given="both",
                remedy="convert one",
            )
        heads, groups = sizes["heads"], sizes["groups"]
        if groups < 1 or heads % groups or (heads != groups and self.is_plain):
            words = "as many as heads, which with residual connections or norms may be a multiple"
            raise InputError("groups of W_K and W_V", allowed=words, given=groups)
        if self.rotary is not None and sizes["query size"] % 2:
            raise InputError(
                "W_Q", allowed="with an even query size, turned in pairs", given=sizes["query size"]
            )
        batch = _checks.common_shape(
            "weights and biases",
            [tensor.shape[: -len(self.SHAPES[name])] for name, tensor in tensors.items()],
        )
        for name in self.SHAPES:
            part: Any = tensors.get(name)
            if part is not None:
                part = part.expand(*batch, *part.shape[-len(self.SHAPES[name]) :])
            object.__setattr__(self, name, part)

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        hidden: int | None = None,
        scale: float | None = None,
        residual: bool = False,
        norm: Norm | None = None,
        activation: Activation = "relu",
        final_norm: bool = False,
        causal: bool = False,
        gated: bool = False,
        groups: int | None = None,
        rotary: float | None = None,
        eps: float = 1e-5,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> Transformer:
        """Draw a network; those of one seed and different purposes are independent.

        Matrices and biases are uniform on ``±1/√n``, with ``n`` the columns of the matrix. Gains
        are uniform on ½ to 1½ and shifts on ±½. If plain, attention weights are normal of deviation
        ``scale``, 1 by default as in the paper; ``D^{-1/2}`` keeps scores moderate. ``head_size``
        is ``d``, by default the width; ``hidden`` is ``F``, by default the width if plain,
        otherwise twice that; ``groups`` share keys and values, by default each head has its own.
        """
        settings = _check_settings(
            residual, norm, activation, final_norm, causal, gated, rotary, eps
        )
        plain = not residual and norm is None
        if scale is not None and not plain:
            raise InputError(
                "scale", allowed="left out with residual connections or norms", given=scale
            )
        scale = _checks.positive("scale", 1.0 if scale is None else scale)
        width = _checks.integer("width", width, 1)
        size = width if head_size is None else _checks.integer("head_size", head_size, 1)
        hidden = width * (1 if plain else 2) if hidden is None else hidden
        heads = _checks.integer("heads", heads, 1)
        sizes = {
            "blocks": _checks.integer("depth", depth, 1),
            "heads": heads,
            "groups": heads if groups is None else _checks.integer("groups", groups, 1, heads),
            "query size": size,
            "value size": size,
            "width": width,
            "hidden": _checks.integer("hidden", hidden, 1),
            "outputs": width,
        }
        batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
        stream = "transformer" if plain else "residual transformer"
        generator = randomness.generator(seed, stream, purpose)

        def draw(name: str) -> Tensor:
            sides = cls.SHAPES[name]
            shape = (*batch_shape, *(sizes[side] for side in sides))
            if plain and name in PARTS["attention"]:
                return (scale * randomness.normal(generator, *shape)).to(dtype)
            if name[0] in "gs":
                drawn = randomness.uniform(generator, *shape) - 0.5
                return (drawn + (name[0] == "g")).to(dtype)
            reads = {"b_2": "hidden"}.get(name, "width") if name[0] == "b" else sides[-1]
            drawn = 2 * randomness.uniform(generator, *shape) - 1
            return (drawn / sizes[reads] ** 0.5).to(dtype)

        kinds = _kinds(**settings)
        if plain:
            # Their order is older than that of the others.
            kinds = (*PARTS["attention"], "W_1", "b_1", "W_2", "b_2", "W_out")
        parts: Any = {name: draw(name) for name in kinds}
        return cls(**parts, **settings)

    @property
    def is_plain(self) -> bool:
        """Whether it has neither residual connections nor norms."""
        return not self.residual and self.norm is None

    @property
    def settings(self) -> dict[str, Any]:
        """The options by name, which networks with other numbers can share."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its parameters, weights first."""
        return _kinds(**self.settings)

    @property
    def weight_kinds(self) -> tuple[str, ...]:
        """The kinds that are matrices, in the order of ``weights``."""
        return tuple(name for name in self.kinds if name[0] == "W")

    @property
    def bias_kinds(self) -> tuple[str, ...]:
        """The kinds that are vectors, in the order of ``biases``."""
        return tuple(name for name in self.kinds if name[0] != "W")

    @property
    def adapted_kinds(self) -> tuple[str, ...]:
        """The kinds of weights that the theorem adapts [thm-transformer], [thm-residual].

        All; if plain, not ``W_1``, and ``W_2`` only in the last block.
        """
        return tuple(name for name in self.weight_kinds if not (self.is_plain and name == "W_1"))

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of ``weights``, whether the theorem adapts it."""
        frozen = [f"W_2 of block {l}" for l in range(1, self.depth)] if self.is_plain else []
        kinds = self.adapted_kinds
        return tuple(name.split()[0] in kinds and name not in frozen for name in self.weight_names)

    @property
    def parts(self) -> dict[str, Any]:
        """All parameters by their kind."""
        return {name: getattr(self, name) for name in self.kinds}

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

    def each_head(self, stack: Tensor, dim: int = -3) -> Tensor:
        """A stack of one member for each group, as one of a member for each head."""
        times = self.heads // self.groups
        return stack if times == 1 else stack.repeat_interleave(times, dim)

    @property
    def width(self) -> int:
        """Size ``D`` of a token."""
        return self.W_Q.shape[-1]

    @property
    def dimension(self) -> int:
        """``m`` of the space of normalized tokens: ``D − 1`` under a LayerNorm, otherwise ``D``."""
        return self.width - (self.norm == "layer")

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its name, such as blocks, heads, query size, width and hidden."""
        return {
            side: n
            for name, tensor in self.parts.items()
            for side, n in zip(
                self.SHAPES[name], tensor.shape[-len(self.SHAPES[name]) :], strict=True
            )
        }

    @property
    def sides(self) -> str:
        n = self.sizes
        words = [
            f"{n['blocks']} blocks",
            f"{n['heads']} heads of {n['query size']} and {n['value size']}"
            + f", {n['groups']} of keys and values" * (n["groups"] < n["heads"]),
            f"{n['width']}→{n['hidden']}→{n['width']}",
        ]
        if self.is_plain:
            words.append(f"{n['outputs']} outputs")
        words += [self.activation] * (self.activation != "relu" or not self.is_plain)
        words += [f"{self.norm} norm"] * (self.norm is not None)
        words += ["gated"] * self.gated + ["rotary"] * (self.rotary is not None)
        words += ["residual"] * (self.residual and self.norm is None)
        return ", ".join(words)

    # Stored in stacks: both are read only.
    @cached_property
    def weights(self) -> tuple[Float[Tensor, "*batch _ _"], ...]:  # type: ignore[override]
        """All matrices, one by one: by kind, then by block and head."""
        return self._flat(self.weight_kinds)

    @cached_property
    def biases(self) -> tuple[Float[Tensor, "*batch _"], ...]:  # type: ignore[override]
        """All vectors, one by one: by kind, then by block and head."""
        return self._flat(self.bias_kinds)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """A name for each of ``weights``, such as ``"W_Q of block 1, head 2"``."""
        return tuple(name for kind in self.weight_kinds for name in self._names(kind))

    @property
    def bias_names(self) -> tuple[str, ...]:
        """A name for each of ``biases``, such as ``"b_1 of block 2"``."""
        return tuple(name for kind in self.bias_kinds for name in self._names(kind))

    def _names(self, kind: str) -> list[str]:
        blocks, sides = range(1, self.depth + 1), self.SHAPES[kind]
        if "heads" in sides or "groups" in sides:
            count = self.heads if "heads" in sides else self.groups
            word = "head" if count == self.heads else "group"
            return [f"{kind} of block {l}, {word} {h + 1}" for l in blocks for h in range(count)]
        return [f"{kind} of block {l}" for l in blocks] if "blocks" in sides else [kind]

    def one_by_one(self, kind: str, stack: Tensor) -> tuple[Tensor, ...]:
        """Split a stack of one kind of parameter by block and head."""
        first = stack.ndim - len(self.SHAPES[kind])
        dims = 2 if kind[0] == "W" else 1
        return stack.unsqueeze(first).flatten(first, -dims - 1).unbind(first)

    def _flat(self, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(w for kind in kinds for w in self.one_by_one(kind, self.parts[kind]))

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> Self:
        biases = self.biases if biases is None else biases
        for name, given, count in (
            ("weights", weights, len(self.weights)),
            ("biases", biases, len(self.biases)),
        ):
            if len(given) != count:
                allowed = f"{count}, in the order of this network's"
                raise InputError(name, allowed=allowed, given=len(given))
        return type(self)(**self._stack(weights, biases), **self.settings)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        network = object.__new__(type(self))
        stacks = self._stack(weights, biases)
        for name, value in {**dict.fromkeys(self.SHAPES), **stacks, **self.settings}.items():
            object.__setattr__(network, name, value)
        return network

    def _stack(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Any]:
        remaining, stacks = iter((*weights, *biases)), {}
        for name in self.kinds:
            dims = 2 if name[0] == "W" else 1
            sizes = getattr(self, name).shape[-len(self.SHAPES[name]) : -dims]
            members = torch.broadcast_tensors(*(next(remaining) for _ in range(sizes.numel())))
            stack = torch.stack(members, -dims - 1)
            shape = (*stack.shape[: -dims - 1], *sizes, *stack.shape[-dims:])
            stacks[name] = stack.reshape(shape)
        return stacks

    def ranks(self, rank: int, part: Part = "all") -> tuple[int, ...]:
        """One rank for weights of a part of blocks, up to their smaller sides; 0 for the others.

        In the order of ``weights``, as for `training.Tuning`. `InputError` for bad ranks and parts.
        """
        rank = _checks.integer("rank", rank, 0)
        _checks.choice("part", part, tuple(PARTS))
        names = zip(self.weight_names, self.weights, strict=True)
        return tuple(
            min(rank, *w.shape[-2:]) if name.split()[0] in PARTS[part] else 0 for name, w in names
        )

    # Evaluation.

    def as_inputs(self, x: Any, name: str = "x") -> Float[Tensor, "*batch width n"]:
        x = super().as_inputs(x, name)
        _checks.common_shape(f"{name} and network", [tuple(x.shape[:-2]), tuple(self.batch_shape)])
        return x

    def __call__(self, x: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch out n"]:
        """The output, token by token; leading dimensions of ``x`` broadcast with the batch."""
        z = self.as_inputs(x)
        for l in range(self.depth):
            z = self._block(l, z).outputs
        return self.end(z)

    def trace(self, x: Float[Tensor, "*#batch width n"]) -> list[BlockTrace]:
        """What each block computes, first block first."""
        z, blocks = self.as_inputs(x), []
        for l in range(self.depth):
            blocks.append(self._block(l, z))
            z = blocks[-1].outputs
        return blocks

    def _block(self, l: int, z: Tensor) -> BlockTrace:
        patterns = self.patterns(self.scores(l, self.reads(z, "1", l)))
        u = self.attend(l, z, patterns)
        hidden = self.hidden(l, u)
        return BlockTrace(patterns, hidden, self.feed_forward(l, u, hidden))

    def normalize(self, z: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch width n"]:
        """``n``: tokens without mean (LayerNorm) and of mean square 1, up to ``ε``."""
        if self.norm == "layer":
            z = z - z.mean(-2, keepdim=True)
        square = z.square().mean(-2, keepdim=True) + self.eps
        return z * torch.where(square > 0, square, 1).rsqrt()

    def reads(
        self, z: Float[Tensor, "*#batch width n"], name: str, l: int
    ) -> Float[Tensor, "*batch width n"]:
        """Norm ``"1"`` or ``"2"`` of block ``l``, counted from 0, applied to tokens."""
        if self.norm is None:
            return z
        gain, shift = (getattr(self, kind + name)[..., l, :, None] for kind in ("g_", "s_"))
        return gain * self.normalize(z) + shift

    def scores(
        self, l: int, reads: Float[Tensor, "*#batch width n"]
    ) -> Float[Tensor, "*batch heads n n"]:
        """``N_1(Z)ᵀ W_Kᵀ (W_Q N_1(Z) + b_Q)`` of block ``l``, a row per key, a column per query.

        With rotary positions, keys get ``b_K``, and both are turned before they are multiplied.
        """
        tokens = reads.unsqueeze(-3)
        Q, K = (w[..., l, :, :, :] for w in (self.W_Q, self.W_K))
        queries, keys = Q @ tokens, K @ tokens
        if not self.is_plain:
            queries = queries + self.b_Q[..., l, :, :, None]
        if self.rotary is not None:
            queries, keys = self.turn(queries), self.turn(keys + self.b_K[..., l, :, :, None])
        return self.each_head(keys).mT @ queries

    def turn(self, x: Float[Tensor, "*batch size n"]) -> Float[Tensor, "*batch size n"]:
        """Queries or keys turned by their positions."""
        assert self.rotary is not None
        half, n = x.shape[-2] // 2, x.shape[-1]
        speeds = self.rotary ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angles = speeds[:, None] * torch.arange(n, dtype=x.dtype, device=x.device)
        (first, second), c, s = x.chunk(2, -2), angles.cos(), angles.sin()
        return torch.cat([first * c - second * s, second * c + first * s], -2)

    def patterns(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """The softmax of each column of scores; if ``causal``, over earlier tokens and itself."""
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(-1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-2)

    def attend(
        self,
        l: int,
        z: Float[Tensor, "*#batch width n"],
        patterns: Float[Tensor, "*#batch heads n n"],
    ) -> Float[Tensor, "*batch width n"]:
        """``U`` of block ``l`` for tokens and attention patterns."""
        V, O = (w[..., l, :, :, :] for w in (self.W_V, self.W_O))
        values = self.each_head(V @ self.reads(z, "1", l).unsqueeze(-3))
        attention = (O @ (values @ patterns)).sum(-3)
        if self.is_plain:
            return attention
        u = z + attention if self.residual else attention
        return u + self.b_O[..., l, :, None]

    def hidden(
        self, l: int, u: Float[Tensor, "*#batch width n"]
    ) -> Float[Tensor, "*batch hidden n"]:
        """The argument of block ``l``'s activation for ``U``."""
        return self.W_1[..., l, :, :] @ self.reads(u, "2", l) + self.b_1[..., l, :, None]

    def activate(self, p: Float[Tensor, "*batch hidden n"]) -> Float[Tensor, "*batch hidden n"]:
        """``σ(p)``."""
        return ACTIVATIONS[self.activation](p)

    def write(
        self,
        l: int,
        hidden: Float[Tensor, "*#batch hidden n"],
        reads: Float[Tensor, "*#batch width n"],
    ) -> Float[Tensor, "*batch width n"]:
        """``Y`` without ``b_2``, from the activation's argument and, if gated, what is read."""
        active = self.activate(hidden)
        if self.gated:
            active = active * (self.W_3[..., l, :, :] @ reads + self.b_3[..., l, :, None])
        return self.W_2[..., l, :, :] @ active

    def feed_forward(
        self,
        l: int,
        u: Float[Tensor, "*#batch width n"],
        hidden: Float[Tensor, "*#batch hidden n"],
    ) -> Float[Tensor, "*batch width n"]:
        """``Y`` of block ``l``, the tokens behind it."""
        y = self.write(l, hidden, self.reads(u, "2", l))
        return (u + y if self.residual else y) + self.b_2[..., l, :, None]

    def end(self, z: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch out n"]:
        """The outputs for the tokens that leave the last block."""
        if self.is_plain:
            return self.W_out @ z
        if not self.final_norm:
            return z
        return self.g_f[..., None] * self.normalize(z) + self.s_f[..., None]

    def fill(self, z: Float[Tensor, "*batch narrower n"]) -> Float[Tensor, "*batch width n"]:
        """Widen tokens of a narrower network with zeros, or with their mean under a LayerNorm.

        Raises `InputError` for tokens that are wider. Source: [prop-sizes].
        """
        z = _checks.real_tensor("z", z, min_dims=2)
        more = self.width - _checks.integer("width of z", z.shape[-2], 1, self.width)
        below = z.mean(-2, keepdim=True) * (self.norm == "layer")
        return torch.cat([z, below.expand(*z.shape[:-2], more, z.shape[-1])], -2)

    def basis(self) -> Float[Tensor, "width m"]:
        """An orthonormal basis of the space of normalized tokens, of dimension ``m``."""
        identity = torch.eye(self.width, dtype=self.dtype, device=self.device)
        if self.norm != "layer":
            return identity
        constant = torch.ones_like(identity[:, :1])
        return torch.linalg.qr(torch.cat([constant, identity[:, :-1]], 1)).Q[:, 1:]

    # Adaptation.

    def segments(self, target: Transformer, *, throw: bool = True) -> Segments[Gap]:
        """The linear maps between non-linearities, against a target's [lem-segments].

        Unless plain, segments use the target's gains, which the adapted network takes on; for a
        target with this network's gains (`rewriting.with_gains`) these stay. Such a target may have
        narrower tokens, placed as by `Transformer.fill`.

        Raises `InputError` for transformers of different sizes (see `rewriting.enlarge`), types or
        settings; for plain ones also where the feed-forward layer is not as wide as the tokens and,
        unless ``throw`` is false, where `Transformer.is_regular` fails.
        """
        _checks.kind(Transformer, target=target)
        return cut(self, target, throw=throw)

    def is_regular(self, target: Transformer) -> Bool[Tensor, "*batch"]:
        """Whether the weights that the theorem inverts are numerically non-singular [ass-regular].

        If plain, ``W_1``, ``W_2`` and the target's ``W_2`` of all blocks but the last; else none.
        """
        parts = [(c <= limit).all(-1) for _, c, limit in inverted(self, target)]
        if not parts:
            shape = torch.broadcast_shapes(self.batch_shape, target.batch_shape)
            return torch.ones(shape, dtype=torch.bool, device=self.device)
        return torch.stack(torch.broadcast_tensors(*parts)).all(0)

    def missing_shift(self) -> Float[Tensor, "*batch _ width"]:
        """``c`` with ``W_{2,l} c = b_{2,l}`` for all blocks but the last; ``[..., L − 1, D]``."""
        return lowrank.solve(self.W_2[..., :-1, :, :], self.b_2[..., :-1, :, None])[..., 0]

    def is_narrow(self, side: str) -> bool:
        """Whether heads are narrower than tokens in ``"query size"`` or ``"value size"``."""
        return self.sizes[side] < self.width

    def fuse(self, frozen: Transformer | None = None) -> Transformer:
        """The same function with one matrix for each segment of attention [def-fused].

        ``W_Q`` and ``W_O`` become the products, ``W_K`` and ``W_V`` identities; heads narrower than
        the tokens keep two factors. If plain, ``W_1`` becomes the identity, ``W_2`` of the last
        block the product at the end, and tokens between blocks have the coordinates of the ``W_2``
        of ``frozen``, by default of this network. Only for one network, without batch dimensions.
        """
        return fuse(self, self if frozen is None else frozen)

    def fused_ranks(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        """The rank that adapters of these ranks, by kind, reach on each weight of ``fuse``."""
        return fused_ranks(self, ranks)


def _check_settings(
    residual: bool,
    norm: Norm | None,
    activation: Activation,
    final_norm: bool,
    causal: bool,
    gated: bool,
    rotary: float | None,
    eps: float,
) -> dict[str, Any]:
    """The options of a network, checked."""
    residual = _checks.flag("residual", residual)
    if norm is not None:
        _checks.choice("norm", norm, get_args(Norm))
    _checks.choice("activation", activation, get_args(Activation))
    if _checks.flag("final_norm", final_norm) and norm is None:
        raise InputError("final_norm", allowed="False without a norm", given=True)
    if rotary is not None:
        rotary = _checks.positive("rotary", rotary)
    for name, given in {"gated": _checks.flag("gated", gated), "rotary": rotary}.items():
        if given and norm is None and not residual:
            words = "left out without residual connections and norms"
            raise InputError(name, allowed=words, given=given)
    return {
        "residual": residual,
        "norm": norm,
        "activation": activation,
        "final_norm": bool(final_norm),
        "causal": _checks.flag("causal", causal),
        "gated": bool(gated),
        "rotary": rotary,
        "eps": _checks.finite("eps", eps, 0),
    }


def _kinds(
    residual: bool,
    norm: Norm | None,
    final_norm: bool,
    gated: bool,
    rotary: float | None,
    **_: Any,
) -> tuple[str, ...]:
    """The kinds of parameters that the options allow."""
    plain = not residual and norm is None
    has = {
        "W_out": plain,
        **dict.fromkeys(("W_3", "b_3"), gated),
        "b_Q": not plain,
        "b_K": rotary is not None,
        "b_O": not plain,
        **dict.fromkeys(("g_1", "s_1", "g_2", "s_2"), norm is not None),
        **dict.fromkeys(("g_f", "s_f"), final_norm),
    }
    return tuple(name for name in Transformer.SHAPES if has.get(name, True))
