"""Transformers cut at their non-linearities [lem-segments]."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .decoder import Decoder
from .gap import Gap
from .layers import LinearNetwork
from .transformer import Transformer

T = TypeVar("T")
AnyTransformer = Transformer | Decoder

#: The adapted weights of each segment, in the order in which they act.
ADAPTED: dict[str, tuple[str, ...]] = {
    "query_key": ("W_Q", "W_K"),
    "value_output": ("W_V", "W_O"),
    "query": ("W_Q",),
    "key": ("W_K",),
    "value": ("W_V",),
    "sent": ("W_O",),
    "inner": ("W_1",),
    "up": ("W_3",),
    "outer": ("W_2",),
    "output": ("W_2", "W_out"),
}
#: How many dimensions, of blocks and heads, the numbers of each segment have.
DIMENSIONS = dict.fromkeys(ADAPTED, 2) | {"inner": 1, "up": 1, "outer": 1, "output": 0}


class Segments(dict[str, T]):
    """Something for each segment of a transformer, by the segment's name.

    In a `Transformer` segments multiply ``y``, where the tokens of block ``l`` are
    ``z = W_{2,l−1} y``, ``y = a + c``, with ``a`` the activations before and
    ``W_{2,l−1} c = b_{2,l−1}``; in the first block ``y`` is the input and ``W_2 = I``.

    - ``query_key``: scores are ``yᵀ M y``, ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``.
    - ``value_output``: the activation receives ``Σ_h M_h y``, ``M = W_1 W_O W_V W_2``;
      ``[..., L, H]``.
    - ``output``: ``W_out W_{2,L}``; ``[...]``.

    In a `Decoder` let ``B = diag(g) V``: ``V`` is an orthonormal basis of the space of normalized
    tokens, ``g`` the gains of the norm before; without norms ``B = I``. ``S = Vᵀ`` under a final
    LayerNorm, which ignores means; otherwise ``S = I``. Weights that several heads share, or that
    rotations separate, have a segment each.

    - ``query_key``: scores are ``Bᵀ W_Kᵀ W_Q B``; ``[..., L, H]``. With rotary positions or grouped
      heads instead ``query`` and ``key``: ``W_Q B`` and ``W_K B``, ``[..., L, groups]`` of keys.
    - ``value_output``: tokens receive ``S W_O W_V B``; ``[..., L, H]``. With grouped heads instead
      ``value``, ``W_V B``, ``[..., L, groups]``, and ``sent``, ``S W_O``.
    - ``inner``: the activation receives ``W_1 B``; ``[..., L]``. If gated, it is multiplied by
      ``up``, ``W_3 B``.
    - ``outer``: tokens receive ``S W_2``; ``[..., L]``.

    Networks with equal segments, and equal ``c`` or vectors, are equal.
    """

    def largest(self: Segments[Tensor]) -> Tensor:
        """Find the largest of a network's numbers, where each part is numbers; ``[...]``."""
        flat = (
            part.flatten(-DIMENSIONS[name]).amax(-1) if DIMENSIONS[name] else part
            for name, part in self.items()
        )
        return torch.stack(torch.broadcast_tensors(*flat)).amax(0)


def segments(
    frozen: AnyTransformer, target: AnyTransformer, *, throw: bool = True
) -> Segments[Gap]:
    """Cut two transformers into the linear maps between non-linearities [lem-segments].

    Segments of a `Decoder` use the target's gains, which the adapted network takes on.

    Raises `InputError` for transformers of different kinds, sizes, types or settings; for a
    `Transformer` also where the feed-forward layer is not as wide as the tokens and, unless
    ``throw`` is false, where a weight that the theorem inverts is singular [ass-regular].
    """
    _checks.kind(Transformer, Decoder, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    _require_alike(frozen, target)
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    for name, conditions in inverted(frozen, target).items() if throw else ():
        if (bad := conditions > 1).any():
            block = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
            weight = f"{name} of block {block + 1}{_checks.failed_members(bad[..., block])}"
            remedy = "the theorem inverts it; perturb it"
            raise InputError(weight, "non-singular", "one that is singular up to rounding", remedy)
    cut: Any = _cut if isinstance(target, Decoder) else _cut_plain
    ours, theirs = (cut(network, target, batch) for network in (frozen, target))
    return Segments({name: Gap(ours[name], theirs[name]) for name in ours})


def inverted(
    frozen: AnyTransformer, target: AnyTransformer
) -> dict[str, Float[Tensor, "*batch blocks"]]:
    """Compute condition numbers of weights that the theorem inverts [ass-regular].

    They are parts of the least that counts as singular. A `Decoder` has no such weights.
    """
    if not (isinstance(frozen, Transformer) and isinstance(target, Transformer)):
        return {}
    weights = {
        "W_1": frozen.W_1,
        "W_2": frozen.W_2[..., :-1, :, :],
        "target's W_2": target.W_2[..., :-1, :, :],
    }
    least = 1 / (frozen.width * torch.finfo(frozen.dtype).eps)
    return {name: lowrank.condition_number(W) / least for name, W in weights.items()}


def _cut_plain(
    network: Transformer, target: Transformer, batch: torch.Size
) -> dict[str, LinearNetwork]:
    identity = torch.eye(network.width).to(network.W_2).expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    of_heads = (*batch, network.depth, network.heads)
    return {
        "query_key": _chain(of_heads, before, network.W_Q, network.W_K.mT, before.mT),
        "value_output": _chain(of_heads, before, network.W_V, network.W_O, after),
        "output": _chain(batch, network.W_2[..., -1, :, :], network.W_out),
    }


def _cut(network: Decoder, target: Decoder, batch: torch.Size) -> dict[str, LinearNetwork]:
    """Cut a network that reads through the target's norms."""
    first, second = target.readings
    ignores_means = target.settings.final_norm and target.settings.norm == "layer"
    written = target.basis().mT if ignores_means else torch.eye(target.width).to(first)
    of_blocks = (*batch, network.depth)
    of_heads, of_groups = (*of_blocks, network.heads), (*of_blocks, network.groups)
    grouped = network.groups < network.heads
    parts = {}
    if grouped or network.settings.rotary is not None:
        parts["query"] = _chain(of_heads, first, network.W_Q)
        parts["key"] = _chain(of_groups, first, network.W_K)
    else:
        parts["query_key"] = _chain(of_heads, first, network.W_Q, network.W_K.mT, first.mT)
    if grouped:
        parts["value"] = _chain(of_groups, first, network.W_V)
        parts["sent"] = _chain(of_heads, network.W_O, written)
    else:
        parts["value_output"] = _chain(of_heads, first, network.W_V, network.W_O, written)
    parts["inner"] = _chain(of_blocks, second, network.W_1)
    if network.settings.gated:
        parts["up"] = _chain(of_blocks, second, network.W_3)
    return parts | {"outer": _chain(of_blocks, network.W_2, written)}


def _chain(batch: tuple[int, ...], *weights: Tensor) -> LinearNetwork:
    return LinearNetwork([w.expand(*batch, *w.shape[-2:]) for w in weights], checked=False)


def _require_alike(frozen: AnyTransformer, target: AnyTransformer) -> None:
    """Refuse two networks whose segments do not correspond."""
    names = [field.name for field in fields(frozen.settings)]
    if frozen.settings.norm is None:
        names.remove("eps")
    target.require_like(frozen, names, tuple(frozen.sizes))
    if isinstance(frozen, Transformer) and frozen.sizes["hidden"] != frozen.width:
        # Only then can adapters of the attention reach everything that the activation sees.
        allowed = f"square, with as many units as a token has coordinates ({frozen.width})"
        raise InputError("W_1", allowed=allowed, given=f"{frozen.sizes['hidden']} units")
