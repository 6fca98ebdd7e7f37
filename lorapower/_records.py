"""Records: frozen, validated values, whose errors are this package's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError, brief


class Record(BaseModel):
    """Base of the settings of runs, of their results, and of the parameters of chapters.

    A record cannot be changed, is hashable where its fields are, and takes no names that it does
    not declare. Types are strict: a truth value is no number and a text is none either, but NumPy's
    scalars count as Python's. Numbers are finite unless a field or a class says otherwise. What
    concerns one field is declared with it (``Field(ge=1)``), what concerns several is a
    ``model_validator``, which may raise `InputError`.

    Raises `InputError` for the first field that is not usable, with what is allowed and what was
    given in one line.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**{name: plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise translated(error, type(self)) from None

    def replace(self, **changes: Any) -> Self:
        """The same record with other values of these fields, checked like a new one."""
        return type(self)(**dict(self) | changes)


class Results(Record):
    """Base of what runs give: numbers, truth values, texts; numbers may be NaN or infinite."""

    model_config = ConfigDict(allow_inf_nan=True)


def plain(value: Any) -> Any:
    """``value`` with Python's numbers and truth values in place of NumPy's, also in sequences."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def translated(error: ValidationError, record: type[BaseModel]) -> InputError:
    """What pydantic says of a record's first unusable field, as this package says it."""
    first, *_ = errors = error.errors(include_url=False)
    if own := first.get("ctx", {}).get("error"):
        # What a validator raised: our own, or a plain ValueError's text.
        if isinstance(own, InputError):
            return own
        name = _name(first) or record.__name__
        return InputError(name, allowed=str(own), given=brief(first["input"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(record.model_fields)
        return InputError(
            "names", allowed=f"among {known} (of {record.__name__})", given=_name(first)
        )
    if first["type"] == "union_tag_invalid":
        about = first["ctx"]
        return InputError(
            _name(first), allowed=f"one of {about['expected_tags']}", given=brief(about["tag"])
        )
    if first["type"] == "missing":
        return InputError(_name(first), allowed=f"given (of {record.__name__})", given="nothing")
    # The members of a union complain one by one, of the value or of what is in it.
    same = [one for one in errors if one["loc"][:1] == first["loc"][:1]]
    allowed = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in same)
    return InputError(_name(first), allowed=" or ".join(allowed), given=brief(first["input"]))


def _name(error: Mapping[str, Any]) -> str:
    return str(error["loc"][0]) if error["loc"] else ""
