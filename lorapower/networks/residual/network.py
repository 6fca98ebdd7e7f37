"""Transformers as they are used: with residual connections and normalization before each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ... import _checks, randomness
from ...errors import InputError
from .._layers import uniform
from ..stacked import Stacked

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Norm = Literal["layer", "rms"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda p: functional.gelu(p, approximate="tanh"),
    "silu": functional.silu,
}
# Kinds of weights by the part of a block that they are of.
PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("W_Q", "W_K", "W_V", "W_O"),
    "mlp": ("W_1", "W_2"),
    "all": ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2"),
}
FINAL = ("g_f", "s_f")


@dataclass(frozen=True, eq=False, repr=False)
class ResidualTransformer(Stacked):
    """``L`` pre-norm blocks: attention and a feed-forward layer, each added to what it reads.

    A block maps the columns of ``Z`` (one for each token) to ``Y = U + W_2 σ(W_1 N_2(U) + b_1) +
    b_2`` with ``U = Z + Σ_h W_O^h W_V^h N_1(Z) P_h + b_O`` and ``P_h = softmax(N_1(Z)ᵀ W_K^hᵀ
    (W_Q^h N_1(Z) + b_Q^h))``, the softmax of each column. A norm is ``N(z) = g ⊙ n + s`` with
    ``n = z̃ / (‖z̃‖²/D + ε)^{1/2}``, where ``z̃`` is ``z`` less its mean for a LayerNorm, ``z`` for
    an RMSNorm. The output is ``Y`` of the last block, or ``N_f`` of it [def-residual].

    Where ``z̃`` is 0, as of a constant token, ``n`` is 0, also for ``ε = 0``.

    Tensors, arrays or nested lists, all float32 or all float64; batch dimensions broadcast.

    Parameters
    ----------
    W_Q, W_K, W_V, W_O
        ``[..., L, H, d, D]``, the last ``[..., L, H, D, d]``; ``d`` is the size of queries and keys
        for the first two, of values for the others.
    W_1, W_2
        ``[..., L, F, D]``, ``[..., L, D, F]``.
    b_Q, b_O, b_1, b_2 : Tensor
        ``[..., L, H, d]``, ``[..., L, D]``, ``[..., L, F]``, ``[..., L, D]``; 0 by default. Biases
        of keys and values add nothing to these: the softmax ignores the one, and the other is part
        of ``b_O``.
    g_1, s_1, g_2, s_2 : Tensor
        Gains and shifts of both norms, ``[..., L, D]``; 1 and 0 by default.
    g_f, s_f : Tensor
        Of the final norm, ``[..., D]``.
    activation : Activation
        ``σ``: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` (its approximation) or ``"silu"``.
    norm : Norm
        ``"layer"`` or ``"rms"``.
    final_norm : bool
        Whether there is one.
    causal : bool
        Whether a token attends only to those up to itself.
    eps : float
        ``ε``, at least 0.

    Raises
    ------
    InputError
        Sizes that do not fit, mixed or unusable types, entries not finite; a gain or shift of a
        final norm that there is not.
    """

    W_Q: Float[Tensor, "*batch blocks heads query width"]
    W_K: Float[Tensor, "*batch blocks heads query width"]
    W_V: Float[Tensor, "*batch blocks heads value width"]
    W_O: Float[Tensor, "*batch blocks heads width value"]
    W_1: Float[Tensor, "*batch blocks hidden width"]
    W_2: Float[Tensor, "*batch blocks width hidden"]
    b_Q: Float[Tensor, "*batch blocks heads query"]
    b_O: Float[Tensor, "*batch blocks width"]
    b_1: Float[Tensor, "*batch blocks hidden"]
    b_2: Float[Tensor, "*batch blocks width"]
    g_1: Float[Tensor, "*batch blocks width"]
    s_1: Float[Tensor, "*batch blocks width"]
    g_2: Float[Tensor, "*batch blocks width"]
    s_2: Float[Tensor, "*batch blocks width"]
    g_f: Float[Tensor, "*batch width"]
    s_f: Float[Tensor, "*batch width"]
    activation: Activation = "relu"
    norm: Norm = "layer"
    final_norm: bool = False
    causal: bool = False
    eps: float = 1e-5

    SHAPES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "W_Q": ("blocks", "heads", "query size", "width"),
        "W_K": ("blocks", "heads", "query size", "width"),
        "W_V": ("blocks", "heads", "value size", "width"),
        "W_O": ("blocks", "heads", "width", "value size"),
        "W_1": ("blocks", "hidden", "width"),
        "W_2": ("blocks", "width", "hidden"),
        "b_Q": ("blocks", "heads", "query size"),
        "b_O": ("blocks", "width"),
        "b_1": ("blocks", "hidden"),
        "b_2": ("blocks", "width"),
        "g_1": ("blocks", "width"),
        "s_1": ("blocks", "width"),
        "g_2": ("blocks", "width"),
        "s_2": ("blocks", "width"),
        "g_f": ("width",),
        "s_f": ("width",),
    }
    weight_kinds: ClassVar[tuple[str, ...]] = PARTS["all"]

    def __init__(
        self,
        W_Q: Any,
        W_K: Any,
        W_V: Any,
        W_O: Any,
        W_1: Any,
        W_2: Any,
        *,
        activation: Activation = "relu",
        norm: Norm = "layer",
        final_norm: bool = False,
        causal: bool = False,
        eps: float = 1e-5,
        **vectors: Any,
    ) -> None:
        _checks.choice("activation", activation, get_args(Activation))
        _checks.choice("norm", norm, get_args(Norm))
        settings = {
            "activation": activation,
            "norm": norm,
            "final_norm": _checks.flag("final_norm", final_norm),
            "causal": _checks.flag("causal", causal),
            "eps": _checks.finite("eps", eps, 0),
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        for name in vectors:
            if name in FINAL and not final_norm:
                raise InputError(name, allowed="given with final_norm=True", given="without it")
            _checks.choice("vectors", name, self.bias_kinds)
        weights = dict(zip(self.weight_kinds, (W_Q, W_K, W_V, W_O, W_1, W_2), strict=True))
        given = {
            name: _checks.real_tensor(name, value, min_dims=len(self.SHAPES[name]))
            for name, value in weights.items()
        }
        sizes = {
            side: n
            for name in self.weight_kinds
            for side, n in zip(
                self.SHAPES[name], given[name].shape[-len(self.SHAPES[name]) :], strict=True
            )
        }
        for name in self.bias_kinds:
            if name not in vectors:
                shape = [sizes[side] for side in self.SHAPES[name]]
                vectors[name] = given["W_Q"].new_full(shape, name[0] == "g")
        self._set(given | {name: vectors[name] for name in self.bias_kinds})

    @property
    def bias_kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """The kinds of vectors: those of the final norm only where there is one."""
        kinds = [name for name in self.SHAPES if name not in self.weight_kinds]
        return tuple(name for name in kinds if self.final_norm or name not in FINAL)

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        heads: int,
        *,
        head_size: int | None = None,
        hidden: int | None = None,
        activation: Activation = "relu",
        norm: Norm = "layer",
        final_norm: bool = False,
        causal: bool = False,
        eps: float = 1e-5,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> ResidualTransformer:
        """Matrices and biases as `torch.nn.Linear` draws them, gains uniform on ½ to 1½, shifts ±½.

        That is, uniform on ``±1/√n`` with ``n`` the size of what a matrix reads; norms are far from
        what training starts with, so that nothing rests on their being alike. ``head_size`` is by
        default the width, ``hidden`` twice that. Networks of one seed and different purposes are
        independent.
        """
        own = cls._drawn_sizes(depth, width, heads, head_size, hidden, usual=2)
        batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
        generator = randomness.generator(seed, "residual transformer", purpose)

        def draw(name: str) -> Tensor:
            sides = cls.SHAPES[name]
            shape = (*batch_shape, *(own[side] for side in sides))
            if name[0] in "gs":
                drawn = randomness.uniform(generator, *shape) - 0.5
                return (drawn + (name[0] == "g")).to(dtype)
            reads = {"b_Q": "width", "b_O": "width", "b_1": "width", "b_2": "hidden"}
            size = own[reads.get(name, sides[-1])]
            return uniform(*shape, width=size, generator=generator, dtype=dtype)

        names = [name for name in cls.SHAPES if final_norm or name not in FINAL]
        return cls(
            **{name: draw(name) for name in names},
            activation=activation,
            norm=norm,
            final_norm=final_norm,
            causal=causal,
            eps=eps,
        )

    @property
    def settings(self) -> dict[str, Any]:
        names = ("activation", "norm", "final_norm", "causal", "eps")
        return {name: getattr(self, name) for name in names}

    @property
    def sides(self) -> str:
        """Blocks, heads, their size, the sizes along a block, and what else it is made of."""
        n = self.sizes
        heads = f"{n['heads']} heads of {n['query size']} and {n['value size']}"
        layers = f"{n['width']}→{n['hidden']}→{n['width']}"
        return f"{n['blocks']} blocks, {heads}, {layers}, {self.activation}, {self.norm} norm"

    @property
    def adapted(self) -> tuple[bool, ...]:
        """For each of `weights` whether the theorem [thm-residual] adapts it: all are."""
        return (True,) * len(self.weights)

    @property
    def dimension(self) -> int:
        """``m``: of the space that the sphere of normalized tokens spans, ``D − 1`` or ``D``."""
        return self.width - (self.norm == "layer")

    def ranks(self, rank: int, part: Literal["attention", "mlp", "all"] = "all") -> tuple[int, ...]:
        """One rank for every weight of a part of the blocks, none for the others.

        In the order of ``weights``, as `training.Tuning` takes them; none is above a weight's
        smaller side. Raises `InputError` for a negative rank and an unknown part.
        """
        rank = _checks.integer("rank", rank, 0)
        _checks.choice("part", part, tuple(PARTS))
        names = zip(self.weight_names, self.weights, strict=True)
        return tuple(
            min(rank, *w.shape[-2:]) if name.split()[0] in PARTS[part] else 0 for name, w in names
        )

    def filled(self, z: Float[Tensor, "*batch narrower n"]) -> Float[Tensor, "*batch width n"]:
        """Tokens of a narrower network among this one's: below them zeros, or their mean.

        The mean under a LayerNorm, so that it stays the mean of all. Raises `InputError` for tokens
        that are wider. Source: [prop-sizes].
        """
        z = _checks.real_tensor("z", z, min_dims=2)
        more = self.width - _checks.integer("width of z", z.shape[-2], 1, self.width)
        below = z.mean(-2, keepdim=True) * (self.norm == "layer")
        return torch.cat([z, below.expand(*z.shape[:-2], more, z.shape[-1])], -2)

    def normalized(self, z: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch width n"]:
        """``n``: tokens without mean (LayerNorm) and of mean square 1, but for ``ε``."""
        if self.norm == "layer":
            z = z - z.mean(-2, keepdim=True)
        square = z.square().mean(-2, keepdim=True) + self.eps
        return z * torch.where(square > 0, square, 1).rsqrt()

    def reads(
        self, z: Float[Tensor, "*#batch width n"], name: str, l: int
    ) -> Float[Tensor, "*batch width n"]:
        """What norm ``"1"`` or ``"2"`` of block ``l``, counted from 0, makes of tokens."""
        gain, shift = (getattr(self, kind + name)[..., l, :, None] for kind in ("g_", "s_"))
        return gain * self.normalized(z) + shift

    def scores(
        self, l: int, reads: Float[Tensor, "*#batch width n"]
    ) -> Float[Tensor, "*batch heads n n"]:
        """``N_1(Z)ᵀ W_Kᵀ (W_Q N_1(Z) + b_Q)`` of block ``l``: of keys, in rows, and queries."""
        tokens = reads.unsqueeze(-3)
        Q, K = (w[..., l, :, :, :] for w in (self.W_Q, self.W_K))
        return (K @ tokens).mT @ (Q @ tokens + self.b_Q[..., l, :, :, None])

    def patterns(self, scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """How tokens, in columns, attend: the softmax of scores, of earlier ones if ``causal``."""
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(-1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-2)

    def attended(
        self,
        l: int,
        z: Float[Tensor, "*#batch width n"],
        patterns: Float[Tensor, "*#batch heads n n"],
    ) -> Float[Tensor, "*batch width n"]:
        """``U`` of block ``l``: tokens, and what attention in these patterns adds to them."""
        V, O = (w[..., l, :, :, :] for w in (self.W_V, self.W_O))
        values = V @ self.reads(z, "1", l).unsqueeze(-3)
        return z + (O @ (values @ patterns)).sum(-3) + self.b_O[..., l, :, None]

    def hidden(
        self, l: int, u: Float[Tensor, "*#batch width n"]
    ) -> Float[Tensor, "*batch hidden n"]:
        """What the activation of block ``l`` receives for ``U``."""
        return self.W_1[..., l, :, :] @ self.reads(u, "2", l) + self.b_1[..., l, :, None]

    def fed_forward(
        self,
        l: int,
        u: Float[Tensor, "*#batch width n"],
        hidden: Float[Tensor, "*#batch hidden n"],
    ) -> Float[Tensor, "*batch width n"]:
        """``Y`` of block ``l``: ``U``, and what the feed-forward layer adds to it."""
        added = self.W_2[..., l, :, :] @ ACTIVATIONS[self.activation](hidden)
        return u + added + self.b_2[..., l, :, None]

    def behind(
        self, l: int, z: Float[Tensor, "*#batch width n"]
    ) -> Float[Tensor, "*batch width n"]:
        """The outputs for tokens that enter block ``l``; gradients flow through."""
        for block in range(l, self.depth):
            scores = self.scores(block, self.reads(z, "1", block))
            u = self.attended(block, z, self.patterns(scores))
            z = self.fed_forward(block, u, self.hidden(block, u))
        return self.ended(z)

    def ended(self, z: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch width n"]:
        """The outputs for the tokens that leave the last block: they, or their final norm."""
        if not self.final_norm:
            return z
        return self.g_f[..., None] * self.normalized(z) + self.s_f[..., None]

    def __call__(self, x: Float[Tensor, "*#batch width n"]) -> Float[Tensor, "*batch width n"]:
        """The output, token by token; leading dimensions of ``x`` broadcast with the batch."""
        return self.behind(0, self.as_inputs(x))
