"""What only the book's chapters need: their head, parameters, quotes, claims and figures.

What is imported of notebooks themselves is installed with the extra ``book``. Programs that only
read what a chapter recorded load no torch, nor what draws.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_origin

from ..errors import InputError, needs

with needs("book"):
    from pydantic import AfterValidator, Field, ValidationInfo, field_validator

    from . import _executed, claims
    from .values import Values

#: Threads that a chapter may take; `setup` leaves torch one.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
#: The largest `Width`.
WIDEST = 512


def whole(low: int, high: int | None = None) -> Any:
    """Declare an integer from ``low`` to ``high``."""
    return Annotated[int, Field(ge=low, le=high)]


def _within_width(ranks: list[int], info: ValidationInfo) -> list[int]:
    """Refuse ranks above the width; without any, take all, or 17 where there are more."""
    width = info.data.get("width")
    if width is None:  # is itself refused
        return ranks
    if ranks and max(ranks) > width:
        raise InputError("ranks", allowed=f"at most {width} (the width)", given=max(ranks))
    return ranks or [round(i * width / 16) for i in range(17)]


#: Width of a layer, from 1 to `WIDEST`.
Width = whole(1, WIDEST)
#: How many problems, or starts.
Seeds = whole(1, 100)
#: Steps of a training. Some take 200 between two measurements of their loss.
Steps = whole(200)
#: Ranks up to the parameter ``width``, declared before them; none stand for all, or 17 of more.
Ranks: Any = Annotated[list[whole(0)], AfterValidator(_within_width)]  # type: ignore[misc]


class Parameters(Values):
    """Hold the parameters that all chapters have; a chapter's class adds its own.

    A list may also be one value or a text such as ``1,4`` or ``[1, 4]``, for papermill's ``-p``;
    its numbers are sorted, each once. Raises `InputError` for the first unusable value, if
    papermill was given a parameter that there is not, and in profile paper, whose runs become the
    book's records, if it was given others besides.
    """

    profile: Literal["quick", "paper"]
    seed: Annotated[int, Field(ge=0)]

    def __init__(self, /, **values: Any) -> None:
        injected, names = _injected(), [*type(self).model_fields]
        if unknown := sorted(injected.difference(names)):
            near = difflib.get_close_matches(unknown[0], names, 1)
            remedy = f"did you mean {near[0]}?" if near else ""
            allowed = f"among {', '.join(names)}"
            raise InputError("parameters", allowed, ", ".join(unknown), remedy)
        if values.get("profile") == "paper" and (others := injected - {"profile"}):
            allowed = "left as they are in profile paper, whose runs become the book's records"
            raise InputError("parameters", allowed, ", ".join(sorted(others)))
        super().__init__(**values)

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        if get_origin(cls.model_fields[str(info.field_name)].annotation) is not list:
            return value
        if not isinstance(value, str):
            return list(value) if isinstance(value, Iterable) else [value]
        parts = [part.strip() for part in value.strip(" []").split(",")]
        return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts if part]

    @field_validator("*")
    @classmethod
    def _sort(cls, value: Any) -> Any:
        return sorted(set(value)) if isinstance(value, list) else value


def _injected() -> set[str]:
    """List the names that papermill's cell of parameters assigned, the last one that ran."""
    from IPython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", ()) if shell else ()
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    nodes = ast.parse(injected[-1]).body if injected else []
    return {ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign)}


def setup() -> None:
    """Set up a chapter's figures, and leave torch one thread."""
    import torch
    from IPython import get_ipython

    from .figures import use_style

    if shell := get_ipython():
        shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg"]')
    use_style()
    # On small matrices threads mostly wait for each other.
    torch.set_num_threads(1)


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
    forms, metadata = format_display_data(value if digits is None else shown)
    glue = _executed.GLUE
    metadata |= {"scrapbook": {"name": name, "mime_prefix": glue}}
    display({f"{glue}{kind}": form for kind, form in forms.items()}, metadata=metadata, raw=True)
