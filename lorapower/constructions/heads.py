"""Segments of attention heads, of two adapted factors, by the construction that is for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..errors import InputError, SingularError
from ..lowrank import LowRank
from ..networks.gap import Gap
from ..networks.stacked import Stacked
from . import linear, narrow


def is_narrow(gap: Gap) -> bool:
    """Whether heads are narrower than the tokens; a segment of another depth has none."""
    if gap.frozen.depth != 4:
        return False
    _, width, size, *_ = gap.frozen.widths
    return size < width


def require_ranks(gap: Gap, ranks: Mapping[str, int]) -> None:
    """Raise `InputError` for too little rank on heads that are adapted exactly or not at all."""
    _checks.kind(Gap, gap=gap)
    if is_narrow(gap):
        narrow.require_ranks(gap, ranks)


def adapt(
    gap: Gap,
    ranks: Mapping[str, int],
    words: str,
    *,
    plain_only: bool = False,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> linear.LinearAdaptation:
    """Adapters of a segment's two factors: the middle ones of four, or both of two.

    Raises `SingularError` where the segment is not reached within ``rtol``, unless ``throw`` is
    false. See `require_ranks` before.

    Parameters
    ----------
    ranks : mapping
        Of the factor that acts first, and of the other, by their names.
    words : str
        What the segment is called.
    rtol, throw
        Largest acceptable rounding error, relative to the product of the norms of the factors plus
        that of the target's; by default half of the digits.
    """
    _checks.kind(Gap, gap=gap)
    pair = tuple(ranks.values())
    if is_narrow(gap):
        found = narrow.adapt(gap, *pair, seed=seed)
    else:
        each = pair if gap.frozen.depth == 2 else (0, *pair, 0)
        found = linear.close(gap, each, plain_only=plain_only, throw=False, seed=seed)
    return _judged(found, gap, f"{words} segment", rtol, throw)


def ranks_by_name(ranks: Any, network: Stacked, kinds: Sequence[str]) -> dict[str, int]:
    """The rank of each of some kinds of weights, from one for all, or one for each by its name.

    Raises `InputError` for other names and for ranks out of range.
    """
    shapes = {name: getattr(network, name).shape[-2:] for name in kinds}
    if isinstance(ranks, list | tuple | Tensor):
        raise InputError(
            "ranks", allowed=f"one integer, or one for each of {', '.join(shapes)}", given=ranks
        )
    if not isinstance(ranks, Mapping):
        return dict(zip(shapes, _checks.capped_ranks(ranks, list(shapes.values())), strict=True))
    if set(ranks) != set(shapes):
        raise InputError(
            "ranks",
            allowed=f"one integer, or one for each of {', '.join(shapes)}",
            given=sorted(map(str, ranks)),
        )
    return {
        name: _checks.integer(f"rank of {name}", ranks[name], 0, min(shape), limit="smaller side")
        for name, shape in shapes.items()
    }


def one_by_one(update: LowRank) -> list[LowRank]:
    """Updates of single weights, from one stacked over blocks and heads."""
    factors = (factor.flatten(-4, -3).unbind(-3) for factor in (update.left, update.right))
    return [LowRank(A, B) for A, B in zip(*factors, strict=True)]


def _judged(
    found: linear.LinearAdaptation, gap: Gap, words: str, rtol: float | None, throw: bool
) -> linear.LinearAdaptation:
    """What was found, with the verdict on its rounding error, or that verdict as an error."""
    eps = torch.finfo(gap.frozen.dtype).eps
    rtol = eps**0.5 if rtol is None else _checks.tolerance("rtol", rtol)
    scale = gap.rounding_scale
    relative = found.rounding_error / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    success = relative.isfinite() & (relative <= rtol)
    if throw and not success.all():
        place = tuple((~success).nonzero()[0].tolist())
        layer = int(found.condition_numbers[place].argmax())
        failed = ~success
        if gap.frozen.depth == 4:
            block, head = place[-2:]
            words, failed = (
                f"{words} of block {block + 1}, head {head + 1}",
                failed[..., block, head],
            )
        raise SingularError(
            layer + 1,
            float(found.condition_numbers[place][layer]),
            float(relative[place]),
            rtol,
            1 / (max(gap.frozen.widths) * eps),
            f" of the {words}{_checks.failed_members(failed)}",
        )
    return replace(found, success=success)
