"""What objects that hold tensors say of themselves on one line, and when two of them are equal."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, TypeVar

from torch import Tensor

C = TypeVar("C")


def summary(value: object, *words: str, like: Tensor, batch: tuple[int, ...]) -> str:
    """``Name(words, batch […], type, device)``: no batch for a single one, no processor."""
    members = [f"batch {list(batch)}"] if batch else []
    place = [] if like.device.type == "cpu" else [str(like.device)]
    kind = str(like.dtype).removeprefix("torch.")
    return f"{type(value).__name__}({', '.join([*words, *members, kind, *place])})"


def held(cls: type[C]) -> type[C]:
    """A class that only holds tensors, under names: shown by `fields`, equal only to itself."""
    methods = {"__repr__": fields, "__eq__": _same, "__hash__": object.__hash__}
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls


def fields(value: Any) -> str:
    """``Name(field=…, …)`` of a dataclass or a named tuple, without the numbers of its tensors."""
    named = value.__dataclass_fields__ if is_dataclass(value) else value._fields
    shown = ", ".join(f"{name}={_shown(getattr(value, name))}" for name in named)
    return f"{type(value).__name__}({shown})"


def _same(value: object, other: object) -> bool:
    return value is other


def _shown(part: Any) -> str:
    if isinstance(part, Tensor):
        kind = str(part.dtype).removeprefix("torch.")
        return f"{kind}{list(part.shape)}" if part.ndim else f"{part.item():.6g}"
    if type(part) is tuple:
        return f"({', '.join(map(_shown, part))})"
    return repr(part)
