"""Segments of a residual transformer: what lies between two of its non-linearities.

Normalized tokens span a space of ``m`` dimensions, and there alone weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import _checks
from ...errors import InputError
from ..gap import Gap
from ..linear import LinearNetwork
from .network import ResidualTransformer
from .rewriting import basis

T = TypeVar("T")


class ResidualSegments(NamedTuple, Generic[T]):
    """A residual transformer cut at norms and non-linearities: something for each kind of segment.

    With ``B = diag(g) V``, ``V`` an orthonormal basis of the space of normalized tokens, ``g`` the
    gains of the norm before; where there is a final LayerNorm the mean of what is written counts
    for nothing, ``S = Vᵀ``, or else ``S = I``.

    Attributes
    ----------
    query_key
        Scores are ``Bᵀ W_Kᵀ W_Q B``; ``[..., L, H]``.
    value_output
        Tokens receive ``S W_O W_V B``; ``[..., L, H]``.
    inner
        The activation receives ``W_1 B``; ``[..., L]``.
    outer
        Tokens receive ``S W_2``; ``[..., L]``.
    """

    query_key: T
    value_output: T
    inner: T
    outer: T

    def largest(self: ResidualSegments[Any]) -> Tensor:
        """The largest of a network's numbers, where something is one number; ``[...]``."""
        heads = torch.maximum(self.query_key, self.value_output).amax(-1)
        return torch.maximum(heads, torch.maximum(self.inner, self.outer)).amax(-1)


def residual_segments(
    frozen: ResidualTransformer, target: ResidualTransformer
) -> ResidualSegments[Gap]:
    """The segments of a frozen against those of a target transformer, read with the target's gains.

    The adapted network takes on the target's gains and shifts; for a target with those of the
    frozen network (`with_gains`) nothing is to be tuned there. A target may have narrower tokens,
    which stand among the frozen's as `ResidualTransformer.filled` writes them.

    Raises `InputError` for transformers of different sizes (see `enlarged`), types, norms or
    activations, and for an ``ε`` that is not the target's, of a narrower one in proportion.
    """
    _checks.kind(ResidualTransformer, frozen=frozen, target=target)
    require_alike(frozen, target)
    V = basis(target)
    reads = [target.g_1[..., None, :, None] * V, target.g_2[..., None] * V]
    one = torch.eye(frozen.width, dtype=V.dtype, device=V.device)
    into = one[:, : target.width]
    mean_free = target.final_norm and target.norm == "layer" and target.width == frozen.width
    written = frozen.filled(one[: target.width, : target.width])
    ours = _chains(frozen, [into @ read for read in reads], V.mT if mean_free else one)
    theirs = _chains(target, reads, V.mT if mean_free else written)
    return ResidualSegments(*(Gap(*pair) for pair in zip(ours, theirs, strict=True)))


def require_alike(frozen: ResidualTransformer, target: ResidualTransformer) -> None:
    """Raise `InputError` for two networks whose segments do not stand for each other."""
    for aspect in ("norm", "activation", "final_norm", "causal"):
        own, wanted = getattr(target, aspect), getattr(frozen, aspect)
        if own != wanted:
            raise InputError(
                "target", allowed=f"with {aspect} {wanted!r}, like the frozen network", given=own
            )
    narrow = target.width < frozen.width
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size and not (narrow and side == "width"):
            remedy = "networks.residual.enlarged writes a smaller target as one of these sizes"
            raise InputError(
                f"target's {side}", allowed=f"{size}", given=target.sizes[side], remedy=remedy
            )
    eps = target.eps * target.width / frozen.width
    if not isclose(frozen.eps, eps, rel_tol=1e-9):
        raise InputError("frozen", allowed=f"with eps {eps:.3g}, the target's", given=frozen.eps)
    _checks.like_frozen(target, frozen)
    shapes = [tuple(network.batch_shape) for network in (frozen, target)]
    _checks.common_shape("frozen and target", shapes)


def _chains(
    network: ResidualTransformer, reads: Sequence[Tensor], written: Tensor
) -> list[LinearNetwork]:
    first, second = reads
    return [
        LinearNetwork([first, network.W_Q, network.W_K.mT, first.mT]),
        LinearNetwork([first, network.W_V, network.W_O, written]),
        LinearNetwork([second, network.W_1]),
        LinearNetwork([network.W_2, written]),
    ]
