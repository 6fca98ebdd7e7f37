"""Records: frozen, validated values, whose errors are this package's own."""

from __future__ import annotations

import base64
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError


class Record(BaseModel):
    """Base of settings, of results, and of the parameters of chapters; it raises `InputError`.

    Types are strict (a truth value or a text is no number), but NumPy's scalars count as Python's.
    Numbers are finite unless a field or a class says otherwise. ``Field(ge=1)`` checks one field, a
    ``model_validator`` several.
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
            super().__init__(**{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            raise _translate(error, type(self)) from None

    def replace(self, **changes: Any) -> Self:
        """The same record with other values of these fields, checked like a new one."""
        return type(self)(**dict(self) | changes)

    def require(self, field: str, fits: bool, allowed: str) -> None:
        """Refuse a field's value unless it fits the others."""
        if not fits:
            raise InputError(field, allowed=allowed, value=getattr(self, field))


class Results(Record):
    """Base of results of runs: numbers, truth values, texts; numbers may be NaN or infinite."""

    model_config = ConfigDict(allow_inf_nan=True)


def pack(values: ArrayLike) -> str:
    """Numbers, in single precision, as a text that a result can be."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """The numbers that `pack` was given."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _plain(value: Any) -> Any:
    """``value`` with Python's numbers and truth values for NumPy's, also in sequences."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _translate(error: ValidationError, record: type[BaseModel]) -> InputError:
    """The `InputError` for a record's first unusable field."""
    first, *_ = errors = error.errors(include_url=False)
    name = str(first["loc"][0]) if first["loc"] else record.__name__
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, InputError):
        return raised
    if first["type"] == "extra_forbidden":
        known = ", ".join(record.model_fields)
        return InputError("names", allowed=f"among {known} (of {record.__name__})", given=name)
    if first["type"] == "missing":
        return InputError(name, allowed=f"given (of {record.__name__})", given="nothing")
    # The members of a union complain one by one, of the value or of what is in it.
    messages = [other["msg"] for other in errors if other["loc"][:1] == first["loc"][:1]]
    allowed = (
        str(raised)
        if raised
        else " or ".join(
            dict.fromkeys(message.removeprefix("Input should be ") for message in messages)
        )
    )
    return InputError(name, allowed=allowed, value=first["input"])
