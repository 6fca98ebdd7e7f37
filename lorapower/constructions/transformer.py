"""Transformers cut at their non-linearities [thm-transformer]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from .._subnormal import flushing
from ..adapters.core import Adapters
from ..lowrank import LowRank
from ..networks import segments
from ..networks.segments import Segments, missing_shift, regular
from ..networks.transformer import Transformer
from . import heads, linear
from .linear import Adaptation

ADAPTED = ("W_Q", "W_K", "W_V", "W_O", "W_2", "W_out")


@dataclass(frozen=True, eq=False, repr=False)
class TransformerAdaptation(Adaptation):
    """Adapters and biases of a transformer, with the evidence for them.

    There are adapters of every weight in the order of `Transformer.weights`, of rank 0 for those
    that stay: ``W_1`` of every block and ``W_2`` of all but the last; and of all biases. It is a
    success where every segment is adapted acceptably. Where all predicted errors are 0 the adapted
    network equals the target for every input, up to rounding.

    Attributes
    ----------
    query_key, value_output : LinearAdaptation
        What was done in each head's segments, deep linear networks of four layers of which the
        middle two are adapted; ``[..., L, H]``.
    output : LinearAdaptation
        The same for ``W_2`` of the last block and ``W_out``; ``[...]``.
    shift_condition_numbers : Tensor
        Of the target's ``W_2`` of all blocks but the last, and of ``Ŵ_out``: the systems from which
        each ``b̂_2`` is found; ``[..., L]``.
    """

    query_key: linear.LinearAdaptation
    value_output: linear.LinearAdaptation
    output: linear.LinearAdaptation
    shift_condition_numbers: Float[Tensor, "*batch _"]

    @property
    def errors(self) -> Segments[Tensor]:
        """Distance ``‖M̂ − M̄‖_2`` of each adapted segment from the target's, at most.

        The predicted one, 0 where the rank suffices, plus the measured rounding error.
        """
        return Segments(*(part.spectral_error + part.rounding_error for part in self._parts))

    @property
    def condition_numbers(self) -> Segments[Tensor]:
        """The worst of the linear systems solved for each segment."""
        return Segments(*(part.condition_numbers.amax(-1) for part in self._parts))

    @property
    def condition_number(self) -> Float[Tensor, "*batch"]:
        """The largest of all condition numbers, times those of the shifts between blocks.

        Errors of the adapted network's outputs, relative to the numbers that they are sums of, are
        seldom much larger than ``eps`` times this.
        """
        between, last = self.shift_condition_numbers.tensor_split([-1], dim=-1)
        return torch.maximum(self.condition_numbers.largest(), last[..., 0]) * between.prod(-1)

    @property
    def _parts(self) -> Segments[linear.LinearAdaptation]:
        return Segments(self.query_key, self.value_output, self.output)


@torch.no_grad()
@flushing()
def adapt(
    frozen: Transformer,
    target: Transformer,
    ranks: int | Mapping[str, int],
    *,
    plain_only: bool = False,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> TransformerAdaptation:
    """Adapters of attention and output, and biases, that make a transformer imitate another.

    What lies between two non-linearities is a deep linear network (`networks.segments`), of which
    two neighbouring layers are adapted by `linear.close`: ``W_Q`` and ``W_K`` before a softmax,
    ``W_V`` and ``W_O`` before a ReLU, ``W_2`` and ``W_out`` at the end. Biases: ``b̂_2 = W_2 c``
    with ``W̄_2 c = b̄_2`` in all blocks but the last, where ``Ŵ_out b̂_2 = W̄_out b̄_2``; and ``b̂_1
    = b̄_1 + Σ_h (M̄ − M̂) c`` with the target's and the adapted value–output segments ``M`` and the
    ``c`` before the block, which is ``b̄_1`` where these are equal.

    Source: [thm-transformer]; for narrow heads [prop-narrow-heads].

    Parameters
    ----------
    frozen, target : Transformer
        Of equal sizes and type; batch shapes broadcast.
    ranks : int or mapping
        One for all, of which no weight takes more than its smaller side; or one for each of ``W_Q,
        W_K, W_V, W_O, W_2, W_out``.
    plain_only : bool
        Use the plain splitting of `linear.adapt`, whatever its rounding error.
    rtol : float, optional
        Largest acceptable rounding error of a segment, relative to the product of the norms of its
        factors plus that of the target's; by default half of the digits, ``inf`` accepts any.
    throw : bool
        Raise an error where a member of the batch is not adapted acceptably, or else go on and say
        so in ``success``.
    seed : int
        Of random rotations.

    Raises
    ------
    InputError
        Ranks out of range; transformers of different sizes; a singular ``W_1`` or ``W_2``; heads
        narrower than the tokens with less rank than their exact adaptation needs (see
        `bounds.transformer_ranks`).
    SingularError
        A segment is not reached within ``rtol``; names it.
    """
    plain_only, throw = _checks.flag("plain_only", plain_only), _checks.flag("throw", throw)
    cut = segments(frozen, target, throw=throw)
    of_heads = (cut.query_key.finite & cut.value_output.finite).all((-2, -1))
    finite = of_heads & cut.output.finite
    if not throw and not finite.all():
        frozen, target = frozen.zeroed(~finite), target.zeroed(~finite)
        cut = segments(frozen, target, throw=False)
    each = heads.ranks_by_name(ranks, frozen, ADAPTED)
    parts = [
        (gap, {inner: each[inner], outer: each[outer]}, words)
        for gap, inner, outer, words in (
            (cut.query_key, "W_Q", "W_K", "query–key"),
            (cut.value_output, "W_V", "W_O", "value–output"),
            (cut.output, "W_2", "W_out", "output"),
        )
    ]
    for gap, pair, _ in parts if throw else ():
        heads.require_ranks(gap, pair)
    options: dict[str, Any] = {"plain_only": plain_only, "rtol": rtol, "throw": throw, "seed": seed}
    found = [heads.adapt(*part, **options) for part in parts]
    query_key, value_output, output = found
    success = query_key.success.all((-2, -1)) & value_output.success.all((-2, -1)) & output.success

    _, of_Q, of_KT, _ = query_key.adapters.updates
    _, of_V, of_O, _ = value_output.adapters.updates
    of_2, of_out = output.adapters.updates
    per_head = {"W_Q": of_Q, "W_K": LowRank(of_KT.right, of_KT.left), "W_V": of_V, "W_O": of_O}
    updates = [
        one for name in ("W_Q", "W_K", "W_V", "W_O") for one in heads.one_by_one(per_head[name])
    ]
    none = LowRank(of_2.left[..., :0], of_2.right[..., :0])
    updates += [none] * frozen.depth + [none] * (frozen.depth - 1) + [of_2, of_out]

    # Where a system is singular its member fails, and its solution is not finite.
    shift = missing_shift(target).nan_to_num(0, 0, 0)
    shift = shift.expand(*success.shape, *shift.shape[-2:])
    b_2 = [*(frozen.W_2[..., :-1, :, :] @ shift[..., None])[..., 0].unbind(-2)]
    wanted = target.W_out @ target.b_2[..., -1, :, None]
    adapted_out = frozen.W_out + of_out.matrix()
    b_2.append(lowrank.solve(adapted_out, wanted)[..., 0].nan_to_num(0, 0, 0))
    # Columns of a softmax sum to 1: what inexact segments make of the shift is constant.
    reached = value_output.adapters.merge(cut.value_output.frozen).product()
    missed = (cut.value_output.target.product() - reached).sum(-3)[..., 1:, :, :]
    b_1 = target.b_1.expand(*success.shape, *target.b_1.shape[-2:]).clone()
    b_1[..., 1:, :] += (missed @ shift[..., None])[..., 0]
    biases = [*b_1.unbind(-2), *b_2]
    changes = tuple(new - old for new, old in zip(biases, frozen.biases, strict=True))
    return TransformerAdaptation(
        Adapters(tuple(updates), changes),
        success & regular(frozen, target) & finite,
        query_key,
        value_output,
        output,
        torch.cat(
            [
                lowrank.condition_number(target.W_2)[..., :-1].expand(shift.shape[:-1]),
                lowrank.condition_number(adapted_out)[..., None],
            ],
            dim=-1,
        ),
    )
