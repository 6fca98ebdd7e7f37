"""Checks of arguments: each returns the usable value or raises `InputError`.

`flushing` turns subnormal numbers into zeros: some processors are slow with them, and sums do not
feel them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module

from .errors import InputError

_PRECISIONS = (torch.float32, torch.float64)
_LARGEST = sys.maxsize
# One rank for all layers, or one for each.
Ranks = int | Sequence[int] | Int[Tensor, " layers"] | Int[np.ndarray, " layers"]


def integer(
    name: str, value: Any, low: int, high: int | None = _LARGEST, *, limit: str = ""
) -> int:
    """Read an integer between ``low`` and ``high``; ``limit`` says what ``high`` is."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and low <= value and (high is None or value <= high):
        return int(value)
    allowed = f"an integer from {low}" + (f" to {high}" if high not in (None, _LARGEST) else "")
    raise InputError(name, allowed=f"{allowed} ({limit})" if limit else allowed, value=value)


def number(name: str, value: Any, low: float, high: float = sys.float_info.max) -> float:
    """Read a number between ``low`` and ``high``, by default a finite one."""
    if not isinstance(value, bool) and isinstance(value, Real) and low <= float(value) <= high:
        return float(value)
    finite = "a finite number" if high < inf else "a number"
    raise InputError(name, allowed=f"{finite} of at least {low:g}", value=value)


def choice(name: str, value: Any, options: Sequence[Any]) -> None:
    """Refuse a value that is not one of the options."""
    if value not in options:
        allowed = f"one of {', '.join(map(repr, options))}"
        raise InputError(name, allowed=allowed, value=value)


def ranks_per_layer(ranks: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Read one rank for all layers (`capped_ranks`), or one for each, up to its smaller side."""
    if isinstance(ranks, np.ndarray | Tensor):
        ranks = ranks.tolist()
    if not isinstance(ranks, Sequence) or isinstance(ranks, str):
        return capped_ranks(ranks, shapes)
    if len(ranks) != len(shapes):
        allowed = f"one integer, or one for each of the {len(shapes)} layers"
        raise InputError("ranks", allowed=allowed, given=f"{len(ranks)} of them")
    checked = []
    for l, (rank, shape) in enumerate(zip(ranks, shapes, strict=True), start=1):
        limit = f"its weight is {shape[0]}×{shape[1]}"
        checked.append(integer(f"rank of layer {l}", rank, 0, min(shape), limit=limit))
    return tuple(checked)


def capped_ranks(rank: Any, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Cut one rank to each weight's smaller side; refuse it where it is above all of them."""
    sides = [min(shape) for shape in shapes]
    square = len({size for shape in shapes for size in shape}) == 1
    limit = "the width" if square else "the largest smaller side of a weight"
    cap = integer("rank", rank, 0, max(sides), limit=limit)
    return tuple(min(cap, side) for side in sides)


def real_tensor(name: str, value: Any, *, min_dims: int, copy: bool = False) -> Tensor:
    """Read a tensor, an array or lists as a detached, finite float32 or float64 tensor.

    Its last ``min_dims`` dimensions are not empty. A tensor's memory is shared unless ``copy``.
    """
    tensor = value.detach() if isinstance(value, Tensor) else _from_array(name, value)
    if tensor.dtype not in _PRECISIONS:
        given = str(tensor.dtype).removeprefix("torch.")
        allowed = "a tensor of float32 or float64"
        raise InputError(name, allowed=allowed, given=given, remedy="convert it first")
    if tensor.ndim < min_dims or 0 in tensor.shape[tensor.ndim - min_dims :]:
        allowed = f"a non-empty array of at least {min_dims} dimensions"
        raise InputError(name, allowed=allowed, given=f"shape {tuple(tensor.shape)}")
    if bad := int((~torch.isfinite(tensor)).sum()):
        given = f"{bad} entries that are NaN or infinite"
        remedy = "look for a diverged training run or a division by zero"
        raise InputError(name, allowed="finite", given=given, remedy=remedy)
    return tensor.clone() if copy and isinstance(value, Tensor) else tensor


def columns(name: str, value: Any, width: int, word: str = "samples") -> Tensor:
    """Read inputs ``[..., width, samples]``; ``word`` says what the columns are."""
    x = real_tensor(name, value, min_dims=2)
    if x.shape[-2] != width:
        allowed = f"of shape [..., {width}, {word}], columns being {word}"
        remedy = "inputs are columns: pass x.mT" if x.shape[-1] == width else ""
        raise InputError(name, allowed=allowed, given=f"shape {tuple(x.shape)}", remedy=remedy)
    return x


def numbers(name: str, value: Any) -> Tensor:
    """Read a finite tensor of any shape; plain integers become float64."""
    if isinstance(value, Integral | np.ndarray) and np.asarray(value).dtype.kind == "i":
        value = np.float64(value)
    return real_tensor(name, value, min_dims=0, copy=True)


def _from_array(name: str, value: Any) -> Tensor:
    try:
        array = np.array(value, order="C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(name, allowed="a rectangular array of numbers", value=value) from error


def kind(*expected: type, **given: Any) -> None:
    """Refuse values that have none of the ``expected`` classes; the error names them."""
    for name, value in given.items():
        if not isinstance(value, expected):
            names = [f"{cls.__name__} ({cls.__module__.rpartition('.')[0]})" for cls in expected]
            reader = "from_decoder" if names[0].startswith("Decoder") else "as_network"
            remedy = f"networks.{reader} reads torch modules" if isinstance(value, Module) else ""
            allowed = f"of class {' or '.join(names)}"
            raise InputError(name, allowed=allowed, given=type(value).__name__, remedy=remedy)


def single(**networks: Any) -> None:
    """Refuse batches of networks; the error names them."""
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
            allowed, remedy = f"{needed}, like the frozen network", f"convert one, .to({aspect}=…)"
            raise InputError("target", allowed=allowed, given=given, remedy=remedy)


def failed_members(bad: Tensor, shown: int | None = None) -> str:
    """Name the members of a batch where ``bad`` holds, ``shown`` (flat) first."""
    if not bad.ndim:
        return ""
    first = int(bad.flatten().nonzero()[0]) if shown is None else shown
    index = tuple(int(i) for i in np.unravel_index(first, bad.shape))
    words = f" of batch member {index[0] if len(index) == 1 else index}"
    return words + (f" (one of {int(bad.sum())} that fail)" if bad.sum() > 1 else "")


def common_shape(name: str, shapes: Sequence[tuple[int, ...]]) -> torch.Size:
    """Find the shape to which all ``shapes`` broadcast."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        given = [tuple(shape) for shape in shapes]
        raise InputError(name, allowed="of shapes that broadcast", given=given) from error


def one_batch(parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Expand weights and biases of one type, each with its own dimensions, to one batch shape."""
    name = "weights and biases"
    if len({part.dtype for part, _ in parts}) > 1:
        allowed = "all float32 or all float64"
        raise InputError(name, allowed=allowed, given="both", remedy="convert one")
    batch = common_shape(name, [tuple(part.shape[:-dims]) for part, dims in parts])
    return [part.expand(*batch, *part.shape[-dims:]) for part, dims in parts]


@contextmanager
def flushing() -> Iterator[None]:
    """Treat subnormal numbers as zeros in this thread and those it starts, not in torch's own."""
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
