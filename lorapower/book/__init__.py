"""What only the book's chapters need: their head, parameters, quotes, claims and figures.

What is imported of notebooks themselves is installed with the extra ``book``. Programs that only
read what a chapter recorded load no torch, nor what draws.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError, needs

with needs("book"):
    from pydantic import AfterValidator, Field, ValidationInfo, field_validator

    from .._records import Record
    from . import _executed, claims

#: Threads that a chapter may take; `setup` leaves torch one.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
# Chapters also read the records of long runs, a package beside this one that is not installed.
_CHECKOUT = Path(__file__).resolve().parents[2]
if (_CHECKOUT / "records" / "__init__.py").is_file() and str(_CHECKOUT) not in sys.path:
    sys.path.append(str(_CHECKOUT))
# The environment's variable for the folder of results.
RESULTS = "LORAPOWER_RESULTS"
#: The largest `Width`.
WIDEST = 512


def whole(low: int, high: int | None = None) -> Any:
    """Declare an integer from ``low`` to ``high``."""
    return Annotated[int, Field(ge=low, le=high)]


def _file(given: str, info: ValidationInfo) -> Path | None:
    """Choose the file of runs, in the folder given or in the environment's."""
    paper = "results" if info.data.get("profile") == "paper" else ""
    base = given or os.environ.get(RESULTS) or paper
    return Path(base).expanduser() / "sweeps.sqlite" if base else None


def _within_width(ranks: list[int], info: ValidationInfo) -> list[int]:
    """Refuse ranks above the width; where none is given, take all, or 17 where there are more."""
    width = info.data.get("width")
    if width is None:  # is itself refused
        return ranks
    if ranks and max(ranks) > width:
        raise InputError("ranks", allowed=f"at most {width} (the width)", given=max(ranks))
    return ranks or [round(i * width / 16) for i in range(17)]


#: A folder in which all chapters keep the runs of their sweeps, in one file. An empty text means
#: the environment's ``LORAPOWER_RESULTS``, or else ``results`` in profile paper, and none in quick.
Runs = Annotated[str, AfterValidator(_file)]
#: Width of a layer, from 1 to `WIDEST`.
Width = whole(1, WIDEST)
#: How many problems, or starts.
Seeds = whole(1, 100)
#: Steps of a training. Some take 200 between two measurements of their loss.
Steps = whole(200)
#: Ranks up to the parameter ``width``, declared before them; none stand for all, or 17 of more.
Ranks: Any = Annotated[list[whole(0)], AfterValidator(_within_width)]  # type: ignore[misc]


class Parameters(Record):
    """Hold the parameters that all chapters have; a chapter's model adds its own.

    A list may also be one value or a text such as ``1,4`` or ``[1, 4]``, for papermill's ``-p``;
    its numbers are sorted, each once. Raises `InputError` for the first unusable value.
    """

    profile: Literal["quick", "paper"]
    seed: Annotated[int, Field(ge=0)]

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, given: Any, info: ValidationInfo) -> Any:
        if get_origin(cls.model_fields[str(info.field_name)].annotation) is not list:
            return given
        if not isinstance(given, str):
            return list(given) if isinstance(given, Iterable) else [given]
        parts = [part.strip() for part in given.strip(" []").split(",")]
        return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts if part]

    @field_validator("*")
    @classmethod
    def _sort(cls, value: Any) -> Any:
        return sorted(set(value)) if isinstance(value, list) else value


def setup(model: type[Parameters]) -> None:
    """Check and complete the parameters of a chapter, and set up figures and threads.

    The notebook that declares ``model`` has them as variables, which get completed values, in later
    calls anew from what was given. Raises `InputError` for unknown names and unusable values.
    """
    import torch
    from IPython import get_ipython

    from .figures import _style

    notebook = vars(sys.modules[model.__module__])
    assigned = _assigned(notebook.get("In", ()))
    _refuse_unknown(assigned, [*model.model_fields])
    if notebook.get("profile") == "paper" and (others := assigned - {"profile"}):
        allowed = "left as they are in profile paper, whose runs become the book's records"
        raise InputError("parameters", allowed=allowed, given=", ".join(sorted(others)))
    # By name the completed value, a copy, as lists can be changed in place, and what was given.
    completed: dict[str, tuple[Any, Any, Any]] = notebook.setdefault("_completed", {})
    given = {}
    for name in notebook.keys() & model.model_fields:
        value, copy, origin = completed.get(name, (None, None, None))
        same = notebook[name] is value and value == copy
        given[name] = origin if same else notebook[name]
    for name, value in model(**given):
        notebook[name] = value
        completed[name] = value, deepcopy(value), given[name]
    if shell := get_ipython():
        shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg"]')
    _style.use_style()
    # On small matrices threads mostly wait for each other.
    torch.set_num_threads(1)


def _assigned(cells: Sequence[str]) -> set[str]:
    """List the names that papermill's cell of parameters assigned, the last one that ran."""
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    nodes = ast.parse(injected[-1]).body if injected else []
    return {ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign)}


def _refuse_unknown(assigned: set[str], known: Sequence[str]) -> None:
    if unknown := sorted(assigned.difference(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        remedy = f"did you mean {near[0]}?" if near else ""
        allowed = f"among {', '.join(known)}"
        raise InputError("parameters", allowed=allowed, given=", ".join(unknown), remedy=remedy)


class _Quoted(dict[str, str]):
    """Quotes by name; ``["error:.2f"]`` is one in a format, "…" if it is yet to come."""

    def __getitem__(self, key: str) -> Any:
        from IPython.display import Latex

        name, _, form = key.partition(":")
        text = _executed.formatted(super().__getitem__(name), form) if name in self else "…"
        return Latex(text) if text.startswith("$") else text


#: What the notebook has quoted so far: its text has ``{eval}`book.quoted["name:.2f"]```.
quoted = _Quoted()


def quote(name: str, value: Any, *, digits: int | None = None) -> None:
    """Let the text quote a number, a text or a figure as ``{eval}`book.quoted["name"]```.

    With ``digits``, a number becomes Markdown of so many significant ones (`claims.number`).
    """
    from IPython.core.formatters import format_display_data
    from IPython.display import Markdown, display

    if hasattr(value, "item"):
        value = value.item()  # a plain number, whose format the text chooses
    quoted[name] = text = repr(value) if digits is None else claims.number(value, digits)
    shown = Markdown("")
    shown.data = text  # given at once, it would be read as a file where one has this name
    forms, about = format_display_data(value if digits is None else shown)
    glue = _executed.GLUE
    about |= {"scrapbook": {"name": name, "mime_prefix": glue}}
    display({f"{glue}{kind}": form for kind, form in forms.items()}, metadata=about, raw=True)


def median(values: ArrayLike, axis: int | None = None) -> Any:
    """Compute the median along an axis, or of all numbers: of two in the middle, their mean."""
    return np.median(np.asarray(values), axis)
