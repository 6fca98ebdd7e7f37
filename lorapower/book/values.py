"""Frozen, validated values, whose errors are this package's own."""

from __future__ import annotations

from typing import Any, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from ..errors import InputError


class Values(BaseModel):
    """Hold settings, results, or the parameters of a chapter; raise `InputError` for wrong ones.

    Types are strict, but NumPy's numbers and truth values count as Python's. Numbers are finite.
    ``Field(ge=1)`` checks one field, a ``model_validator`` several.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise _translate(error, type(self)) from None

    def replace(self, **changes: Any) -> Self:
        """Make the same with other values of these fields, checked like new ones."""
        return type(self)(**dict(self) | changes)

    def require(self, field: str, fits: bool, allowed: str) -> None:
        """Refuse a field's value unless it fits the others."""
        if not fits:
            raise InputError(field, allowed=allowed, value=getattr(self, field))


def _plain(value: Any) -> Any:
    """``value`` with Python's numbers and truth values for NumPy's, also in sequences."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _translate(error: ValidationError, model: type[BaseModel]) -> InputError:
    """Make the `InputError` for the first unusable field of a model."""
    first, *_ = errors = error.errors(include_url=False)
    name = str(first["loc"][0]) if first["loc"] else model.__name__
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, InputError):
        return raised
    if first["type"] == "missing":
        return InputError(name, allowed=f"given to {model.__name__}", given="nothing")
    if first["type"] == "extra_forbidden":
        fields = ", ".join(model.model_fields)
        return InputError("names", allowed=f"among {fields} (of {model.__name__})", given=name)
    outside = first["type"] in ("greater_than_equal", "less_than_equal")
    if outside and (whole := _described(model, name)):
        return InputError(name, allowed=whole, value=first["input"])
    # The types of a union complain one by one.
    field = [one["msg"] for one in errors if one["loc"][:1] == first["loc"][:1]]
    allowed = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in field))
    return InputError(name, allowed=allowed, value=first["input"])


def _described(model: type[BaseModel], name: str) -> str:
    """Give the whole range of a field, or of what its list holds, if it is declared with one."""
    field = model.model_fields[name]
    inside = [about for part in get_args(field.annotation) for about in get_args(part)[1:]]
    texts = [about.description for about in (field, *inside) if isinstance(about, FieldInfo)]
    return next(filter(None, texts), "")
