"""Transformers with residual connections and norms, perhaps gates, groups and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..errors import InputError
from .attention import (
    SHAPES,
    Attention,
    Hidden,
    Scores,
    Settings,
    Tokens,
    by_heads,
    random_stacks,
    times,
)

Norm = Literal["layer", "rms"]
GAINS, SHIFTS = ("g_1", "g_2", "g_f"), ("s_1", "s_2", "s_f")
# By whose root random weights and biases are divided, where it is not the width.
_COLUMNS = {"W_O": "value size", "W_2": "hidden", "b_2": "hidden"}


@dataclass(frozen=True)
class DecoderSettings(Settings):
    """What a `Decoder` does with its parameters [def-residual], [def-decoder].

    Raises `InputError` for unknown norms and activations, and for numbers out of range.

    Parameters
    ----------
    activation, causal
        See `Settings`.
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

    residual: bool = False
    norm: Norm | None = None
    final_norm: bool = False
    gated: bool = False
    rotary: float | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm is not None:
            _checks.choice("norm", self.norm, get_args(Norm))
        elif self.final_norm:
            raise InputError("final_norm", allowed="False without a norm", given=True)
        if self.rotary is not None:
            _checks.number("rotary", self.rotary, 1)
        _checks.number("eps", self.eps, 0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parameters of a network with these settings, weights first."""
        has = {
            "W_out": False,
            **dict.fromkeys(("W_3", "b_3"), self.gated),
            "b_K": self.rotary is not None,
            **dict.fromkeys(("g_1", "s_1", "g_2", "s_2"), self.norm is not None),
            **dict.fromkeys(("g_f", "s_f"), self.final_norm),
        }
        return tuple(kind for kind in SHAPES if has.get(kind, True))


@dataclass(frozen=True, eq=False, repr=False)
class Decoder(Attention):
    """``L`` blocks with residual connections or norms [def-residual], [def-decoder].

    A block maps the tokens, columns of ``Z``, to ``Y = U + W_2 σ(W_1 N_2(U) + b_1) + b_2`` with
    ``U = Z + Σ_h W_O^h W_V^h N_1(Z) P_h + b_O`` and
    ``P_h = softmax(N_1(Z)ᵀ W_K^hᵀ (W_Q^h N_1(Z) + b_Q^h))``, the softmax of each column; without
    residual connections ``Z`` and ``U`` are not added. A norm is ``N(z) = g ⊙ n + s`` with
    ``n = z̃ / (‖z̃‖²/D + ε)^{1/2}``; ``z̃`` is ``z`` minus its mean for a LayerNorm and ``z`` for an
    RMSNorm; ``n = 0`` where ``z̃ = 0``. Without norms ``N(z) = z``. The network returns ``Y`` of the
    last block, or a norm of it.

    *Gated* layers multiply ``σ(…)`` by ``W_3 N_2(U) + b_3``, *grouped* heads share ``W_K`` and
    ``W_V`` with their neighbours, and *rotary* positions rotate queries and keys, with biases
    ``b_K``.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        ``W_Q, W_K, W_V`` ``[..., L, H, d, D]``, ``W_O`` ``[..., L, H, D, d]``, with one ``d`` for
        queries and keys and perhaps another for values, and with groups for ``H`` in ``W_K`` and
        ``W_V``; ``W_1, W_3`` ``[..., L, F, D]``, ``W_2`` ``[..., L, D, F]``. Vectors are
        ``b_Q, b_K`` ``[..., L, H, d]``, ``b_1, b_3`` ``[..., L, F]``, ``b_O, b_2`` and gains and
        shifts ``g_1, s_1, g_2, s_2`` ``[..., L, D]``, of the final norm ``g_f, s_f`` ``[..., D]``.
        Gains are 1 by default, other vectors 0. Biases of keys cancel without positions; those of
        values are in ``b_O``.
    settings : DecoderSettings
    """

    settings: DecoderSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.rotary is not None and self.W_Q.shape[-2] % 2:
            allowed = "with an even query size, rotated in pairs"
            raise InputError("W_Q", allowed=allowed, given=self.W_Q.shape[-2])

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
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> Decoder:
        """Draw a network of some `DecoderSettings`, by seed and purpose.

        Matrices and biases are uniform on ``±1/√n``, with ``n`` the columns of the matrix (``D``
        for ``b_O``). Gains are uniform on ½ to 1½ and shifts on ±½. ``head_size`` is ``d``, by
        default the width; ``hidden`` is ``F``, by default twice the width; ``groups`` share keys
        and values, by default each head has its own.

        Examples
        --------
        >>> from lorapower.networks import Decoder
        >>> llama = {"residual": True, "norm": "rms", "gated": True, "rotary": 1e4, "causal": True}
        >>> network = Decoder.random(2, 8, 4, groups=2, head_size=2, activation="silu", **llama)
        >>> network.W_Q.shape, network.W_K.shape, network.W_3.shape
        (torch.Size([2, 4, 2, 8]), torch.Size([2, 2, 2, 8]), torch.Size([2, 16, 8]))
        """
        chosen, d = DecoderSettings(**settings), width if head_size is None else head_size
        sizes = {
            **{"blocks": depth, "width": width, "heads": heads},
            "groups": heads if groups is None else groups,
            "hidden": 2 * width if hidden is None else hidden,
            **{"query size": d, "value size": d},
        }
        generator = randomness.generator(seed, "residual transformer", purpose)

        def draw(kind: str, shape: tuple[int, ...]) -> Tensor:
            drawn = randomness.uniform(generator, *shape)
            if kind in GAINS or kind in SHIFTS:
                return (drawn + (0.5 if kind in GAINS else -0.5)).to(dtype)
            return ((2 * drawn - 1) / sizes[_COLUMNS.get(kind, "width")] ** 0.5).to(dtype)

        return cls(random_stacks(chosen.kinds, sizes, batch_shape, draw), chosen)

    @property
    def dimension(self) -> int:
        """``m`` of the space of normalized tokens: ``D − 1`` under a LayerNorm, otherwise ``D``."""
        return self.width - (1 if self.settings.norm == "layer" else 0)

    def basis(self) -> Float[Tensor, "width m"]:
        """Make an orthonormal basis of the space of normalized tokens, of dimension ``m``."""
        identity = torch.eye(self.width).to(self.W_Q)
        if self.settings.norm != "layer":
            return identity
        constant = torch.ones_like(identity[:, :1])
        return torch.linalg.qr(torch.cat([constant, identity[:, :-1]], 1)).Q[:, 1:]

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

    def value_ranks(self, ranks: int | Sequence[int] | None) -> dict[str, int]:
        """Read the rank of each ``W_V`` and ``W_O`` by name; a total goes to one of them."""
        if not isinstance(ranks, Sequence):
            total = self.width if ranks is None else _checks.integer("ranks", ranks, 0)
            return {"W_O of block 1, head 1": total}
        each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in self.weights])
        kinds = zip(self.weight_names, self.kind_of_weight, each, strict=True)
        return {name: rank for name, kind, rank in kinds if kind in ("W_V", "W_O")}

    def with_norms(self, other: Decoder) -> Decoder:
        """Write the same function with another network's gains ``g`` and shifts ``s``.

        ``W diag(ḡ/g)`` reads ``g ⊙ n + s`` as ``W`` reads ``ḡ ⊙ n + s̄``, up to a constant that
        biases take up: ``b_O`` that of values; that of keys matters for rotary positions alone.
        Adapters for the result leave the other's gains and shifts frozen, but for a final norm,
        which stays this network's. Raises `InputError` for networks that do not fit, and where
        ``other`` has a gain of 0.
        """
        _checks.kind(Decoder, other=other)
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
        return Decoder(parts, self.settings)

    # Evaluation.

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
        queries, keys = (by_heads(w[..., l, :, :, :], tokens) for w in (self.W_Q, self.W_K))
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

    def attend(self, l: int, z: Tokens, patterns: Scores) -> Tokens:
        """Compute ``U`` of block ``l`` from tokens and attention patterns."""
        attention = self.mix(l, self._norm(1, l, z), patterns)
        return (z + attention if self.settings.residual else attention) + self.b_O[..., l, :, None]

    def hidden(self, l: int, u: Tokens) -> Hidden:
        """Compute ``W_1 N_2(U) + b_1`` of block ``l``."""
        return super().hidden(l, self._norm(2, l, u))

    def up(self, l: int, u: Tokens) -> Hidden:
        """Compute ``W_3 N_2(U) + b_3``, by which a gated block multiplies activations."""
        return times(self.W_3[..., l, :, :], self._norm(2, l, u)) + self.b_3[..., l, :, None]

    def feed_forward(self, l: int, u: Tokens, hidden: Hidden) -> Tokens:
        """Compute ``Y`` of block ``l``, which the next block reads, from ``U`` and `hidden`."""
        active = self.activate(hidden)
        if self.settings.gated:
            active = active * self.up(l, u)
        y = times(self.W_2[..., l, :, :], active)
        return (u + y if self.settings.residual else y) + self.b_2[..., l, :, None]

    def output(self, z: Tokens) -> Float[Tensor, "*batch out n"]:
        """Compute the final norm of the tokens, if there is one."""
        if not self.settings.final_norm:
            return z
        return self.g_f[..., None] * self.normalize(z) + self.s_f[..., None]
