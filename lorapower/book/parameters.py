"""Parameters of the book's chapters: their types, and how they are checked and completed.

A chapter declares a model with a field for each of its parameters; what it calls them and what each
may be then stands in one place.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
)

from ..errors import InputError
from ..hub import PACKAGED

# The folder of results of chapters that are given none, and the folder of profile paper.
RESULTS = "LORAPOWER_RESULTS"
_PAPER_RESULTS = "results"


def _listed(value: Any) -> Any:
    """Several values, one, or a text such as ``1,4`` or ``[1, 4]``, as a list.

    So papermill's option ``-p``, which gives texts and numbers, gives lists too.
    """
    if not isinstance(value, str):
        return list(value) if isinstance(value, Iterable) else [value]
    parts = [part.strip(" '\"") for part in value.strip(" []").split(",")]
    return [int(part) if part.lstrip("-").isdecimal() else part for part in parts if part]


def _sorted(values: list[int]) -> list[int]:
    return sorted(set(values))


def _within_width(ranks: list[int], info: ValidationInfo) -> list[int]:
    """Each once, by size, none above the width; of none, all, or 17 where there are more."""
    width = info.data.get("width")
    if width is None:  # is itself refused
        return ranks
    if high := [rank for rank in ranks if rank > width]:
        raise InputError(
            str(info.field_name), allowed=f"at most {width} (the width)", given=high[0]
        )
    spread = {round(i * width / 16) for i in range(17)} if width > 16 else range(width + 1)
    return _sorted(ranks or [*spread])


def _folder(value: str, info: ValidationInfo) -> Path | None:
    paper = _PAPER_RESULTS if info.data.get("profile") == "paper" else ""
    folder = value or os.environ.get(RESULTS) or paper
    assert info.context, "`Parameters.checked` says which chapter it is"
    return Path(folder).expanduser() / info.context["chapter"] if folder else None


def whole(low: int, high: int | None = None) -> Any:
    """The type of an integer from ``low`` to ``high``."""
    return Annotated[int, Field(ge=low, le=high, strict=True)]


def wholes(low: int, high: int | None = None) -> Any:
    """The type of a list of such integers, each of them once, by size; it may be empty."""
    return Annotated[list[whole(low, high)], _LISTED, AfterValidator(_sorted)]  # type: ignore[misc]


_LISTED = BeforeValidator(_listed)
_PACKAGED = AfterValidator(lambda name: name or PACKAGED)

Natural = Annotated[int, Field(ge=0, strict=True)]
WIDEST = 512
Width = whole(1, WIDEST)
Depth = whole(1, 64)
Heads = whole(1, 16)
Tokens = whole(1, 1000)  # in a sequence
Layers = whole(2, 5)  # frozen, for one of the target's
Blocks = whole(2, 4)  # of these layers
Seeds = whole(0, 100)  # how many; 0: those of the profile
Ranks = Annotated[list[Natural], _LISTED, AfterValidator(_within_width)]  # below the field `width`
Source = Annotated[str, _PACKAGED]  # of texts
Model = Annotated[str, _PACKAGED]
Tasks = Annotated[list[str], _LISTED]
Results = Annotated[str, AfterValidator(_folder)]


class Parameters(BaseModel):
    """The parameters that all chapters have; a chapter's model adds its own, and their limits.

    Attributes
    ----------
    profile : quick or paper.
    seed : of all random draws.
    """

    profile: Literal["quick", "paper"]
    seed: Natural

    @classmethod
    def checked(cls, given: Mapping[str, Any], *, chapter: str) -> Self:
        """The parameters of a chapter with their completed values.

        Raises `InputError` for names that are not among its own, and for the first value that is
        not usable.
        """
        if unknown := [name for name in given if name not in cls.model_fields]:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, 1)
            raise InputError(
                f"parameters of {chapter}",
                allowed=f"among {', '.join(cls.model_fields)}",
                given=", ".join(unknown),
                remedy=f"did you mean {near[0]}?" if near else "",
            )
        try:
            return cls.model_validate(given, context={"chapter": chapter})
        except ValidationError as error:
            raise cls._refusal(error) from None

    @classmethod
    def _refusal(cls, error: ValidationError) -> InputError:
        first = error.errors()[0]
        if "error" in (about := first.get("ctx", {})):
            return about["error"]
        name = str(first["loc"][0])
        given = "nothing" if first["type"] == "missing" else repr(first["input"])
        return InputError(name, allowed=_words(cls.bounds(name)), given=given)

    @classmethod
    def bounds(cls, name: str) -> dict[str, Any]:
        """JSON schema of one parameter, or, where it is a list, of its items."""
        about = cls.model_json_schema()["properties"][name]
        return about.get("items", about)


def injected(cells: Sequence[str]) -> dict[str, Any]:
    """What papermill's cell of parameters assigned, the last one among executed cells."""
    for cell in reversed(cells):
        if cell.startswith("# Parameters\n"):
            return {
                ast.unparse(statement.targets[0]): ast.literal_eval(statement.value)
                for statement in ast.parse(cell).body
                if isinstance(statement, ast.Assign)
            }
    return {}


def _words(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if schema["type"] == "string":
        return "a text, or empty"
    high = f" to {schema['maximum']}" if "maximum" in schema else ""
    return f"an integer from {schema['minimum']}{high}"
