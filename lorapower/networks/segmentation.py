"""Transformers cut at their non-linearities [lem-segments]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .gap import Gap
from .layers import LinearNetwork
from .transformer import Transformer

_SETTINGS = ("residual", "norm", "activation", "final_norm", "causal", "gated", "rotary")

T = TypeVar("T")
S = TypeVar("S")


class Segments(dict[str, T]):
    """Something for each kind of segment; kinds are keys and attributes.

    Segments of a plain transformer multiply ``y``, where the tokens of block ``l`` are
    ``z = W_{2,l−1} y``, ``y = a + c``, with ``a`` the activations before and
    ``W_{2,l−1} c = b_{2,l−1}``; in the first block ``y`` is the input and ``W_2 = I``:

    - ``query_key``: scores are ``yᵀ M y``, ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``;
    - ``value_output``: the activation receives ``Σ_h M_h y``, ``M = W_1 W_O W_V W_2``;
      ``[..., L, H]``;
    - ``output``: ``W_out W_{2,L}``; ``[...]``.

    For any other transformer let ``B = diag(g) V``: ``V`` is an orthonormal basis of the space of
    normalized tokens, ``g`` the gains of the norm before; without norms ``B = I``. ``S = Vᵀ`` under
    a final LayerNorm, which ignores means; otherwise ``S = I``:

    - ``query_key``: scores are ``Bᵀ W_Kᵀ W_Q B``; ``[..., L, H]``;
    - ``value_output``: tokens receive ``S W_O W_V B``; ``[..., L, H]``;
    - ``inner``: the activation receives ``W_1 B``; ``[..., L]``;
    - ``up``, if gated: the activation is multiplied by ``W_3 B``; ``[..., L]``;
    - ``outer``: tokens receive ``S W_2``; ``[..., L]``.

    Weights that several heads share, or that rotations separate, have a segment each:

    - ``query``, ``key`` replace ``query_key`` for rotary positions or grouped heads: ``W_Q B`` and
      ``W_K B``; ``[..., L, H]`` and ``[..., L, groups]``;
    - ``value``, ``sent`` replace ``value_output`` for grouped heads: ``W_V B`` and ``S W_O``;
      ``[..., L, groups]`` and ``[..., L, H]``.

    Networks with equal segments and equal ``c`` or vectors are equal.
    """

    #: The adapted weights of each kind of segment, in the order in which they act.
    WEIGHTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
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
    #: How many dimensions, of blocks and heads, each kind of segment has.
    DIMENSIONS: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("query_key", "value_output", "query", "key", "value", "sent"), 2),
        **dict.fromkeys(("inner", "up", "outer"), 1),
        "output": 0,
    }

    def __getattr__(self, name: str) -> T:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __repr__(self) -> str:
        return f"Segments({', '.join(f'{name}={part}' for name, part in self.items())})"

    def map(self, change: Callable[[str, T], S]) -> Segments[S]:
        """Apply a function to each name and part."""
        return Segments({name: change(name, part) for name, part in self.items()})

    def largest(self: Segments[Any]) -> Tensor:
        """Find the largest of a network's numbers, where each part is numbers; ``[...]``."""
        flat = []
        for name, part in self.items():
            dims = self.DIMENSIONS[name]
            flat.append(part.flatten(-dims).amax(-1) if dims else part)
        return torch.stack(torch.broadcast_tensors(*flat)).amax(0)


def segments(frozen: Transformer, target: Transformer, *, throw: bool = True) -> Segments[Gap]:
    """Cut two transformers into the linear maps between non-linearities [lem-segments].

    Unless plain, segments use the target's gains, which the adapted network takes on.

    Raises `InputError` for transformers of different sizes, types or settings; for plain ones also
    where the feed-forward layer is not as wide as the tokens and, unless ``throw`` is false, where
    `is_regular` fails.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    _require_alike(frozen, target)
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    if throw:
        for name, conditions in _inverted(frozen, target).items():
            bad = conditions > _largest_condition(frozen)
            if bad.any():
                block = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
                raise InputError(
                    f"{name} of block {block + 1}{_checks.failed_members(bad[..., block])}",
                    allowed="non-singular",
                    given=f"condition number {float(conditions[..., block].max()):.1e}",
                    remedy="the theorem inverts it; perturb it",
                )
    if frozen.is_plain:
        sides = [_cut_plain(network, batch) for network in (frozen, target)]
    else:
        first, second = target.readings
        ignores_means = target.settings.final_norm and target.settings.norm == "layer"
        written = target.basis().mT if ignores_means else torch.eye(target.width).to(first)
        sides = [_cut(network, first, second, written, batch) for network in (frozen, target)]
    return Segments({name: Gap(part, sides[1][name]) for name, part in sides[0].items()})


def is_regular(frozen: Transformer, target: Transformer) -> Bool[Tensor, "*batch"]:
    """Say whether the weights that the theorem inverts are non-singular [ass-regular].

    If plain, ``W_1``, ``W_2`` and the target's ``W_2`` of all blocks but the last; else none.
    """
    limit, batch = _largest_condition(frozen), (frozen.batch_shape, target.batch_shape)
    good = torch.ones(torch.broadcast_shapes(*batch), dtype=torch.bool).to(frozen.device)
    for conditions in _inverted(frozen, target).values():
        good = good & (conditions <= limit).all(-1)
    return good


def _largest_condition(network: Transformer) -> float:
    return 1 / (network.width * torch.finfo(network.dtype).eps)


def _inverted(frozen: Transformer, target: Transformer) -> dict[str, Float[Tensor, "*batch _"]]:
    """Compute condition numbers of each kind of weight that is inverted."""
    if not frozen.is_plain:
        return {}
    return {
        "W_1": lowrank.condition_number(frozen.W_1),
        "W_2": lowrank.condition_number(frozen.W_2)[..., :-1],
        "target's W_2": lowrank.condition_number(target.W_2)[..., :-1],
    }


def _cut_plain(network: Transformer, batch: torch.Size) -> dict[str, LinearNetwork]:
    identity = torch.eye(network.width).to(network.W_2).expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    of_heads = (*batch, network.depth, network.heads)
    return {
        "query_key": _chain(of_heads, before, network.W_Q, network.W_K.mT, before.mT),
        "value_output": _chain(of_heads, before, network.W_V, network.W_O, after),
        "output": _chain(batch, network.W_2[..., -1, :, :], network.W_out),
    }


def _cut(
    network: Transformer, first: Tensor, second: Tensor, written: Tensor, batch: torch.Size
) -> dict[str, LinearNetwork]:
    """Make segments that read through both norms' matrices and write through ``written``."""
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
    parts["outer"] = _chain(of_blocks, network.W_2, written)
    return parts


def _chain(batch: tuple[int, ...], *weights: Tensor) -> LinearNetwork:
    return LinearNetwork([w.expand(*batch, *w.shape[-2:]) for w in weights], checked=False)


def _require_alike(frozen: Transformer, target: Transformer) -> None:
    """Refuse two networks whose segments do not correspond."""
    target.require_like(frozen, _SETTINGS if frozen.settings.norm is None else (*_SETTINGS, "eps"))
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size:
            raise InputError(
                f"target's {side}",
                allowed=f"{size}, as in the frozen network",
                given=target.sizes[side],
                remedy="segments are matched one to one, and adapters leave all sizes as they are",
            )
    if frozen.is_plain and frozen.sizes["hidden"] != frozen.width:
        raise InputError(
            "W_1",
            allowed=f"square, with as many units as a token has coordinates ({frozen.width})",
            given=f"{frozen.sizes['hidden']} units",
            remedy="only then can adapters of the attention reach everything that the ReLU sees",
        )
