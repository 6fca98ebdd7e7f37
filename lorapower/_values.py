"""What objects that hold tensors say of themselves on one line, and when two of them are equal."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def summary(value: object, *words: str, like: Tensor, batch: tuple[int, ...]) -> str:
    """``Name(words, batch […], type, device)``: no batch for a single one, no processor."""
    members = [f"batch {list(batch)}"] if batch else []
    place = [] if like.device.type == "cpu" else [str(like.device)]
    kind = str(like.dtype).removeprefix("torch.")
    return f"{type(value).__name__}({', '.join([*words, *members, kind, *place])})"


def fields(value: Any) -> str:
    """``Name(field=…, …)`` of a dataclass or a named tuple, without the numbers of its tensors."""
    if isinstance(value, tuple):
        held = value._asdict()  # type: ignore[attr-defined]
    else:
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    shown = ", ".join(f"{name}={_shown(part)}" for name, part in held.items())
    return f"{type(value).__name__}({shown})"


def same(value: object, other: object) -> bool:
    """Equality of named tuples of tensors, which are equal only to themselves, as tensors are."""
    return value is other


def _shown(part: Any) -> str:
    if isinstance(part, Tensor):
        kind = str(part.dtype).removeprefix("torch.")
        return f"{kind}{list(part.shape)}" if part.ndim else f"{part.item():.6g}"
    if type(part) is tuple:
        return f"({', '.join(map(_shown, part))})"
    return repr(part)
