"""Transformers with residual connections and norms, perhaps gates, groups and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .attention import SHAPES, Attention, Settings


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
    settings : Settings
    """

    _stream = "residual transformer"
    _widening = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.rotary is not None and self.W_Q.shape[-2] % 2:
            allowed = "with an even query size, rotated in pairs"
            raise InputError("W_Q", allowed=allowed, given=self.W_Q.shape[-2])

    @classmethod
    def _kinds(cls, settings: Settings) -> tuple[str, ...]:
        has = {
            "W_out": False,
            **dict.fromkeys(("W_3", "b_3"), settings.gated),
            "b_K": settings.rotary is not None,
            **dict.fromkeys(("g_1", "s_1", "g_2", "s_2"), settings.norm is not None),
            **dict.fromkeys(("g_f", "s_f"), settings.final_norm),
        }
        return tuple(kind for kind in SHAPES if has.get(kind, True))

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
