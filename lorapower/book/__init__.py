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
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

from ..errors import InputError, needs

with needs("book"):
    from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator

    from . import _executed, _run, claims
    from .values import Values

#: Threads that a chapter may take; `setup` leaves torch one.
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
#: The largest `Width`.
WIDEST = 512


def whole(low: int, high: int | None = None) -> Any:
    """Declare an integer from ``low`` to ``high``."""
    text = f"an integer from {low}" + (f" to {high}" if high is not None else "")
    return Annotated[int, Field(ge=low, le=high, description=text)]


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

    Defaults are what the book was made with. A list may also be one value or a text such as ``1,4``
    or ``[1, 4]``, for papermill's ``-p``; its numbers are sorted, each once.
    """

    model_config = ConfigDict(validate_default=True)

    profile: Literal["quick", "paper"] = "quick"
    seed: whole(0) = 0  # type: ignore[valid-type]

    @classmethod
    def read(cls) -> Self:
        """Read the notebook's variables of these names, and say which are not the book's.

        Raises `InputError` for the first unusable value, and if papermill was given a parameter
        that there is not.
        """
        from IPython import get_ipython
        from IPython.display import Markdown, display

        names = [*cls.model_fields]
        if unknown := sorted(_injected().difference(names)):
            near = difflib.get_close_matches(unknown[0], names, 1)
            remedy = f"did you mean {near[0]}?" if near else ""
            allowed = f"among {', '.join(names)}"
            raise InputError("parameters", allowed, ", ".join(unknown), remedy)
        shell = get_ipython()
        written = {name: shell.user_ns[name] for name in names}
        given, recorded = cls(**written), {n: f.default for n, f in cls.model_fields.items()}
        # What no ranks stand for depends on the width.
        differ = [n for n in names if recorded[n] not in (written[n], getattr(given, n))]
        other = {name: getattr(given, name) for name in differ if name != "profile"}
        given._refuse(other)
        _run.changed.clear()
        _run.changed.update(other)
        if other:
            instead = _run.say({name: recorded[name] for name in other})
            display(Markdown(f"*Run with {_run.say(other)}. The book has {instead}.*"))
        return given

    def _refuse(self, changed: dict[str, Any]) -> None:
        """Refuse parameters that go together with no others."""

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


class Recorded(Parameters):
    """The parameters of a chapter with records, which profile paper makes anew.

    In this profile `Parameters.read` refuses all others than the book's.
    """

    def _refuse(self, changed: dict[str, Any]) -> None:
        if self.profile == "paper" and changed:
            allowed = "left as they are in profile paper, whose runs become the book's records"
            raise InputError("parameters", allowed, ", ".join(sorted(changed)))


def _injected() -> set[str]:
    """List the names that papermill's cell of parameters assigned, the last one that ran."""
    from IPython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns.get("In", ()) if shell else ()
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    nodes = ast.parse(injected[-1]).body if injected else []
    return {ast.unparse(node.targets[0]) for node in nodes if isinstance(node, ast.Assign)}


def setup() -> None:
    """Set up a chapter's figures, leave torch one thread, and let it import ``records``."""
    import torch
    from IPython import get_ipython

    from .figures import use_style

    # tqdm, imported by transformers, misses widgets that no chapter shows.
    warnings.filterwarnings("ignore", "IProgress not found")
    if shell := get_ipython():
        # Where a notebook is not trusted, and on code hosts, figures in SVG are left out.
        shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg", "png"]')
    use_style()
    # On small matrices threads mostly wait for each other.
    torch.set_num_threads(1)
    # They are part of a checkout and not installed: their name is one of another project's.
    for folder in (*Path(__file__).resolve().parents, Path.cwd(), *Path.cwd().parents):
        if (folder / "records" / "sweeps").is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))


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
