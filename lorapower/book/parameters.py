"""Types of the parameters of the book's chapters, and the two that all chapters have.

A chapter declares a model of its own, with a field for each parameter; what may be given, and what
it is completed to, comes with the field's type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from .._hub import PACKAGED, RATED
from .._records import Record
from ..errors import InputError

# Names the folder of results of those that are given none.
RESULTS = "LORAPOWER_RESULTS"
#: The largest `Width`.
WIDEST = 512


def whole(low: int, high: int | None = None) -> Any:
    """The type of an integer from ``low`` to ``high``."""
    return Annotated[int, Field(ge=low, le=high)]


def wholes(low: int, high: int | None = None) -> Any:
    """The type of a list of such integers, each of them once, by size; it may be empty."""
    return Annotated[list[whole(low, high)], _LISTED, AfterValidator(_sorted)]  # type: ignore[misc]


def results(chapter: str) -> Any:
    """The type of the folder in which one with the chapter's name keeps the runs of its sweeps.

    An empty text means the folder that the environment names in ``LORAPOWER_RESULTS``; else none in
    profile quick, and in profile paper ``results``, where the chapter runs.
    """

    def folder(given: str, info: ValidationInfo) -> Path | None:
        paper = "results" if info.data.get("profile") == "paper" else ""
        base = given or os.environ.get(RESULTS) or paper
        return Path(base).expanduser() / chapter if base else None

    return Annotated[str, AfterValidator(folder)]


def _listed(given: Any) -> Any:
    """Several values, one, or a text such as ``1,4`` or ``[1, 4]``, as a list.

    So papermill's option ``-p``, which gives texts and numbers, gives lists too.
    """
    if not isinstance(given, str):
        return list(given) if isinstance(given, Iterable) else [given]
    parts = [part.strip(" '\"") for part in given.strip(" []").split(",")]
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts if part]


def _sorted(values: list[int]) -> list[int]:
    return sorted(set(values))


def _within_width(ranks: list[int], info: ValidationInfo) -> list[int]:
    """None above the width; where none is given, all, or 17 where there are more."""
    width = info.data.get("width")
    if width is None:  # is itself refused
        return ranks
    if ranks and ranks[-1] > width:
        allowed = f"at most {width} (the width)"
        raise InputError(str(info.field_name), allowed=allowed, given=ranks[-1])
    spread = {round(i * width / 16) for i in range(17)} if width > 16 else range(width + 1)
    return ranks or _sorted([*spread])


_LISTED = BeforeValidator(_listed)

#: Width of a layer, from 1 to `WIDEST`.
Width = whole(1, WIDEST)
#: Number of layers, or of a transformer's blocks.
Depth = whole(1, 64)
#: Attention heads of a block.
Heads = whole(1, 16)
#: Tokens of a sequence.
Tokens = whole(1, 1000)
#: Frozen layers for each layer of the target.
Layers = whole(2, 5)
#: Layers of the target, each of which gets `Layers`.
Blocks = whole(2, 4)
#: How many seeds; 0 stands for as many as the profile has.
Seeds = whole(0, 100)
#: Ranks up to the parameter ``width``, which is declared before them; none stand for all of them,
#: or for 17 where there are more.
Ranks: Any = Annotated[wholes(0), AfterValidator(_within_width)]
#: Where texts come from; an empty name stands for the rated sentences.
Source = Annotated[str, AfterValidator(lambda name: name or RATED)]
#: Name of an encoder; an empty one stands for the packaged encoder.
Model = Annotated[str, AfterValidator(lambda name: name or PACKAGED)]
#: Names of tasks.
Tasks = Annotated[list[str], _LISTED]


class Parameters(Record):
    """The parameters that all chapters have; a chapter's model adds its own.

    Raises `InputError` for the first value that is not usable.

    Attributes
    ----------
    profile : {"quick", "paper"}
        Quick or paper.
    seed
        Of all random draws.
    """

    profile: Literal["quick", "paper"]
    seed: Annotated[int, Field(ge=0)]
