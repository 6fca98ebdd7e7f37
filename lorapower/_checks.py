"""Checks of what callers pass in: each returns the usable value or raises `InputError`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from .errors import InputError

PRECISIONS = (torch.float32, torch.float64)


def integer(name: str, value: Any, low: int, high: int | None = None, *, limit: str = "") -> int:
    """``value`` as an ``int`` between ``low`` and ``high``; ``limit`` says what ``high`` is."""
    ceiling = "" if high is None else f" to {high}"
    allowed = f"an integer from {low}{ceiling}" + (f" ({limit})" if limit else "")
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise InputError(name, allowed=allowed, given=repr(value))
    number = int(value)
    if number < low or (high is not None and number > high):
        raise InputError(name, allowed=allowed, given=number)
    return number


def positive(name: str, value: Any) -> float:
    """``value`` as a finite ``float`` above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < inf:
        raise InputError(name, allowed="a finite number above 0", given=repr(value))
    return float(value)


def tolerance(name: str, value: Any) -> float:
    """``value`` as a ``float`` that is at least 0; infinity is allowed."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise InputError(name, allowed="a number of at least 0", given=repr(value))
    return float(value)


def ranks_per_layer(ranks: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """One rank per layer, from one for all (see `capped_ranks`) or one for each.

    One for each is within its own weight's smaller side.
    """
    if isinstance(ranks, np.ndarray | Tensor):
        ranks = ranks.tolist()
    if not isinstance(ranks, Sequence) or isinstance(ranks, str):
        return capped_ranks(ranks, shapes)
    if len(ranks) != len(shapes):
        raise InputError(
            "ranks",
            allowed=f"one integer, or one for each of the {len(shapes)} layers",
            given=f"{len(ranks)} of them",
        )
    return tuple(
        integer(
            f"rank of layer {l}", rank, 0, min(shape), limit=f"its weight is {shape[0]}×{shape[1]}"
        )
        for l, (rank, shape) in enumerate(zip(ranks, shapes, strict=True), start=1)
    )


def capped_ranks(rank: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """One rank for all weights, of which none takes more than its smaller side.

    It is refused where it is beyond all of them.
    """
    sides = [min(shape) for shape in shapes]
    square = len({size for shape in shapes for size in shape}) == 1
    limit = "the width" if square else "the largest smaller side of a weight"
    cap = integer("rank", rank, 0, max(sides), limit=limit)
    return tuple(min(cap, side) for side in sides)


def real_tensor(name: str, value: Any, *, min_dims: int) -> Tensor:
    """``value`` (tensor, array, lists) as a finite, non-empty float32 or float64 tensor."""
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        try:
            array = np.array(value, order="C")
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise InputError(
                name, allowed="a rectangular array of numbers", given=repr(value)
            ) from error
    if tensor.dtype not in PRECISIONS:
        raise InputError(
            name,
            allowed="float32 or float64",
            given=str(tensor.dtype).removeprefix("torch."),
            remedy="convert it first",
        )
    if tensor.ndim < min_dims or tensor.numel() == 0:
        raise InputError(
            name,
            allowed=f"a non-empty array of at least {min_dims} dimensions",
            given=f"shape {tuple(tensor.shape)}",
        )
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(
            name,
            allowed="finite",
            given=f"{bad} entries that are NaN or infinite",
            remedy="look for a diverged training run or a division by zero",
        )
    return tensor


def kind(*expected: type, **given: Any) -> None:
    """Refuse whatever of ``given``, by the caller's name of it, is none of ``expected``."""
    for name, value in given.items():
        if not isinstance(value, expected):
            classes = " or ".join(one.__name__ for one in expected)
            convertible = isinstance(value, Module) and hasattr(expected[0], "from_sequential")
            raise InputError(
                name,
                allowed=f"of class {classes} (lorapower.networks)",
                given=type(value).__name__,
                remedy="from_sequential makes one of fitting layers" if convertible else "",
            )


def like_frozen(target: torch.dtype, frozen: torch.dtype) -> None:
    """Refuse a target whose numbers are not of the frozen network's type."""
    if target != frozen:
        raise InputError(
            "target",
            allowed=f"{frozen}, like the frozen network",
            given=target,
            remedy="convert one with .to(dtype)",
        )


def failed_members(bad: Tensor, shown: int | None = None) -> str:
    """Words that name the members of a batch where ``bad`` holds; nothing for a single network.

    ``shown``, by default the first of them, is the flat position of the one that is spoken of.
    """
    if not bad.ndim:
        return ""
    places = [place[0] if len(place) == 1 else tuple(place) for place in bad.nonzero().tolist()]
    one = int(bad.flatten().nonzero()[0]) if shown is None else shown
    index = tuple(int(i) for i in np.unravel_index(one, bad.shape))
    words = f" of batch member {index[0] if len(index) == 1 else index}"
    if len(places) > 1:
        listed = ", ".join(map(str, places[:8])) + (", …" if len(places) > 8 else "")
        words += f" (one of {len(places)} that fail: {listed})"
    return words


def common_shape(
    name: str, shapes: Sequence[tuple[int, ...]], *, what: str = "batch shapes"
) -> torch.Size:
    """What all of ``shapes`` broadcast to; ``what`` says what they are."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        given = [tuple(shape) for shape in shapes]
        raise InputError(name, allowed=f"of {what} that broadcast", given=given) from error
