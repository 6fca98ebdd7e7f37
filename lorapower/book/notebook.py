"""What a chapter does at its head, and how its numbers get into its text.

What they import of notebooks themselves is installed with the extra ``book``.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from ..errors import InputError, brief
from . import claims, figures
from .parameters import Parameters

#: Threads that torch takes by itself; `setup` leaves it one.
THREADS = torch.get_num_threads()
# The notebook's variable that remembers, by parameter, its completed value, a copy of that, since
# lists can be changed in place, and what was given.
_COMPLETED = "_completed"


def setup(model: type[Parameters]) -> None:
    """Check and complete the parameters of a chapter, and set up figures and threads.

    The parameters are the variables of the notebook that declares ``model``, and get completed
    values there. It may be called again after some were changed: what it had completed is
    completed anew from what was given.

    Raises `InputError` for names that papermill was given and that the model has not, and for the
    first value that is not usable.
    """
    from IPython import get_ipython

    if not isinstance(model, type) or not issubclass(model, Parameters):
        raise InputError("model", allowed="a class made from Parameters", given=brief(model))
    notebook = vars(sys.modules[model.__module__])
    _refuse_unknown(_injected(notebook.get("In", ())), [*model.model_fields])
    completed: dict[str, tuple[Any, Any, Any]] = notebook.setdefault(_COMPLETED, {})
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
    figures.use_style()
    # On matrices as small as most are here, threads mostly wait for each other.
    torch.set_num_threads(1)


class Quoted(dict[str, Any]):
    """What `quote` was given, by name, as the text shows it.

    ``quoted["error:.2f"]`` is the text of what was quoted as ``error``, in the format behind the
    colon; typeset powers of ten are ``IPython.display.Latex``. What is yet to come is "…".
    """

    def __getitem__(self, key: str) -> Any:
        from IPython.display import Latex
        from myst_nb.core.variables import format_plain_text

        name, _, form = key.partition(":")
        text = format_plain_text(str(self.get(name)), form) if name in self else "…"
        return Latex(text) if text.startswith("$") else text


#: What the notebook has quoted so far, for its text: ``{eval}`book.quoted["name:.2f"]``` in
#: JupyterLab, once the cell was run.
quoted = Quoted()


def quote(name: str, value: Any, *, digits: int | None = None) -> None:
    """Let the text quote a number, a text or a figure as ``{eval}`book.quoted["name"]```.

    With ``digits``, a number becomes Markdown of so many significant ones, in which powers of ten
    are typeset (`claims.number`).
    """
    from IPython.display import Markdown
    from myst_nb import glue

    if hasattr(value, "item"):
        value = value.item()  # a plain number, whose format the text chooses
    if digits is None:
        quoted[name] = shown = value
    else:
        quoted[name] = number = claims.number(value, digits)
        shown = Markdown(number)
    glue(name, shown, display=False)


def _injected(cells: Sequence[str]) -> list[str]:
    """The names that papermill's cell of parameters assigned, the last such cell that ran."""
    for cell in reversed(cells):
        if cell.startswith("# Parameters\n"):
            assigned = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
            return [ast.unparse(target) for node in assigned for target in node.targets]
    return []


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise InputError(
            "parameters",
            allowed=f"among {', '.join(known)}",
            given=", ".join(unknown),
            remedy=f"did you mean {near[0]}?" if near else "",
        )
