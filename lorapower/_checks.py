"""What front doors do: checks, which return the usable value or raise `InputError`, and `flushing`.

Subnormal numbers are taken as zeros: some processors are slow with them, and sums do not feel them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, nan
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module

from .errors import InputError

PRECISIONS = (torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST = sys.maxsize
# One for all layers, or one for each.
Ranks = int | Sequence[int] | Int[Tensor, " layers"] | Int[np.ndarray, " layers"]


def integer(
    name: str, value: Any, low: int, high: int | None = _LARGEST, *, limit: str = ""
) -> int:
    """``value`` as an ``int`` between ``low`` and ``high``; ``limit`` says what ``high`` is."""
    whole = isinstance(value, Integral) and not isinstance(value, bool | np.bool_)
    number = int(value) if whole else low - 1
    if number < low or (high is not None and number > high):
        allowed = f"an integer from {low}" + (f" to {high}" if high not in (None, _LARGEST) else "")
        raise InputError(name, allowed=allowed + (f" ({limit})" if limit else ""), value=value)
    return number


def seed(value: Any) -> int:
    """``value`` as a seed, which may be of any size."""
    return integer("seed", value, 0, None)


def positive(name: str, value: Any) -> float:
    """``value`` as a finite ``float`` above 0."""
    return _number(name, value, "a finite number above 0", lambda x: 0 < x < inf)


def tolerance(name: str, value: Any) -> float:
    """``value`` as a ``float`` that is at least 0; infinity is allowed."""
    return _number(name, value, "a number of at least 0", lambda x: x >= 0)


def finite(name: str, value: Any, low: float = -inf) -> float:
    """``value`` as a finite ``float`` of at least ``low``."""
    allowed = "a finite number" if low == -inf else f"finite, at least {low:g}"
    return _number(name, value, allowed, lambda x: low <= x < inf and x > -inf)


def _number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else nan
    except OverflowError:
        number = nan
    if not fits(number):
        raise InputError(name, allowed=allowed, value=value)
    return number


def flag(name: str, value: Any) -> bool:
    """``value`` as a ``bool``; nothing else is taken."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(name, allowed="True or False", value=value)
    return bool(value)


def precision(value: Any) -> torch.dtype:
    """``value`` if the package computes in this type."""
    if not isinstance(value, torch.dtype) or value not in PRECISIONS:
        raise InputError("dtype", allowed="torch.float32 or torch.float64", value=value)
    return value


def choice(name: str, value: Any, options: Sequence[str], remedy: str = "") -> None:
    """Refuse a value that is not one of the options."""
    if not isinstance(value, str) or value not in options:
        words = [repr(option) for option in options]
        allowed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        raise InputError(name, allowed=allowed, value=value, remedy=remedy)


def function(name: str, value: Any) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise InputError(name, allowed="a function", value=value)


def items(name: str, value: Any, *, what: str) -> list[Any]:
    """``value`` as a list; ``what`` says of what."""
    try:
        if not isinstance(value, str | bytes):
            return [*value]
    except TypeError:
        pass
    raise InputError(name, allowed=what, value=value)


def path(name: str, value: Any) -> Path:
    """``value`` as a path."""
    if not isinstance(value, str | PathLike) or not str(value) or "\0" in str(value):
        raise InputError(name, allowed="a path", value=value)
    return Path(value)


def device(value: Any) -> torch.device:
    """``value`` as a device that torch finds here and that holds numbers."""
    try:
        usable = torch.empty(0, device=value).device
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError("device", allowed="one that torch finds here", value=value) from error
    if usable.type == "meta":
        raise InputError("device", allowed="one that holds numbers", given="meta, which has none")
    return usable


def sizes(name: str, value: Any, low: int = 0) -> tuple[int, ...]:
    """``value`` as a tuple of integers from ``low``, such as a batch shape."""
    if not isinstance(value, tuple | list):
        raise InputError(name, allowed="a tuple of integers", value=value)
    return tuple(integer(name, size, low) for size in value)


def ranks_per_layer(ranks: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """One rank per layer, from one for all (`capped_ranks`) or one each, up to its smaller side."""
    if isinstance(ranks, Tensor):
        _require_dense("ranks", ranks, INTEGERS)
    if isinstance(ranks, np.ndarray | Tensor):
        ranks = ranks.tolist()
    if not isinstance(ranks, Sequence) or isinstance(ranks, str | bytes):
        return capped_ranks(ranks, shapes)
    if len(ranks) != len(shapes):
        allowed = f"one integer, or one for each of the {len(shapes)} layers"
        raise InputError("ranks", allowed=allowed, given=f"{len(ranks)} of them")
    return tuple(
        integer(
            f"rank of layer {l}", rank, 0, min(shape), limit=f"its weight is {shape[0]}×{shape[1]}"
        )
        for l, (rank, shape) in enumerate(zip(ranks, shapes, strict=True), start=1)
    )


def capped_ranks(rank: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """One rank for all weights, cut to each smaller side; refused where it is above all of them."""
    sides = [min(shape) for shape in shapes]
    square = len({size for shape in shapes for size in shape}) == 1
    limit = "the width" if square else "the largest smaller side of a weight"
    cap = integer("rank", rank, 0, max(sides), limit=limit)
    return tuple(min(cap, side) for side in sides)


def real_tensor(name: str, value: Any, *, min_dims: int, copy: bool = False) -> Tensor:
    """``value`` (tensor, array, lists) as a detached, finite float32 or float64 tensor.

    Its last ``min_dims`` dimensions are not empty. A tensor's memory is shared unless ``copy``.
    """
    tensor = value.detach() if isinstance(value, Tensor) else _from_array(name, value)
    _require_dense(name, tensor, PRECISIONS)
    if tensor.ndim < min_dims or 0 in tensor.shape[tensor.ndim - min_dims :]:
        allowed = f"a non-empty array of at least {min_dims} dimensions"
        raise InputError(name, allowed=allowed, given=f"shape {tuple(tensor.shape)}")
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise InputError(
            name,
            allowed="finite",
            given=f"{bad} entries that are NaN or infinite",
            remedy="look for a diverged training run or a division by zero",
        )
    return tensor.clone() if copy and isinstance(value, Tensor) else tensor


def _require_dense(name: str, tensor: Tensor, types: Sequence[torch.dtype]) -> None:
    """Refuse a tensor without numbers, that is not dense, or of another type."""
    numbers = "" if tensor.dtype in types else str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        numbers = "one on device meta, which has none"
    elif tensor.is_nested or tensor.layout != torch.strided:
        numbers = "one that is nested or sparse"
    if numbers:
        words = " or ".join(str(type_).removeprefix("torch.") for type_ in types)
        raise InputError(
            name, allowed=f"a dense tensor of {words}", given=numbers, remedy="convert it first"
        )


def _from_array(name: str, value: Any) -> Tensor:
    try:
        array = np.array(value, order="C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (OverflowError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(name, allowed="a rectangular array of numbers", value=value) from error


def kind(*expected: type, **given: Any) -> None:
    """Refuse ``given`` values that have none of the ``expected`` types; the error names them."""
    for name, value in given.items():
        if not isinstance(value, expected):
            names = (f"{cls.__name__} ({cls.__module__.rpartition('.')[0]})" for cls in expected)
            convertible = isinstance(value, Module) and hasattr(expected[0], "from_sequential")
            raise InputError(
                name,
                allowed=f"of class {' or '.join(names)}",
                given=type(value).__name__,
                remedy="from_sequential makes one of fitting layers" if convertible else "",
            )


def single(**networks: Any) -> None:
    """Refuse batches of networks, by their name."""
    for name, network in networks.items():
        if network.batch_shape:
            given = f"batch shape {tuple(network.batch_shape)}"
            remedy = "take one member after the other"
            raise InputError(name, allowed="a single network", given=given, remedy=remedy)


def like_frozen(target: Any, frozen: Any) -> None:
    """Refuse a target of another type or on another device than the frozen network."""
    for aspect in ("dtype", "device"):
        given, needed = getattr(target, aspect), getattr(frozen, aspect)
        if given != needed:
            allowed, remedy = (
                f"{needed}, like the frozen network",
                f"convert one with .to({aspect}=…)",
            )
            raise InputError("target", allowed=allowed, given=given, remedy=remedy)


def same_sizes(adapted: Any, target: Any) -> None:
    """Refuse a target whose weights have other sizes than another network's."""
    sizes = [[tuple(w.shape[-2:]) for w in network.weights] for network in (adapted, target)]
    if sizes[0] != sizes[1]:
        raise InputError("target", allowed=f"of weights {sizes[0]}", value=sizes[1])


def failed_members(bad: Tensor, shown: int | None = None) -> str:
    """Name the members of a batch where ``bad`` holds, ``shown`` (flat) first; else nothing."""
    if not bad.ndim:
        return ""
    places = [place[0] if bad.ndim == 1 else tuple(place) for place in bad.nonzero().tolist()]
    first = int(bad.flatten().nonzero()[0]) if shown is None else shown
    index = tuple(int(i) for i in np.unravel_index(first, bad.shape))
    words = f" of batch member {index[0] if len(index) == 1 else index}"
    if len(places) > 1:
        listed = ", ".join(map(str, places[:8])) + (", …" if len(places) > 8 else "")
        words += f" (one of {len(places)} that fail: {listed})"
    return words


def common_shape(
    name: str, shapes: Sequence[tuple[int, ...]], *, what: str = "batch shapes"
) -> torch.Size:
    """The shape to which all ``shapes`` broadcast; ``what`` says what they are."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        given = [tuple(shape) for shape in shapes]
        raise InputError(name, allowed=f"of {what} that broadcast", given=given) from error


@contextmanager
def flushing() -> Iterator[None]:
    """Take subnormal numbers as zeros in this thread and those it starts (but not torch's)."""
    before = sys.float_info.min / 2 == 0
    flush()
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flush() -> None:
    """Take subnormal numbers as zeros from now on; an initializer for pools."""
    torch.set_flush_denormal(True)
