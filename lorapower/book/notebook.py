"""What a chapter does at its head, and how its numbers get into its text.

What they import of notebooks themselves is installed with the extra ``book``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from . import claims, figures
from .parameters import Parameters, injected

# As torch found them; `setup` takes one.
THREADS = torch.get_num_threads()
_COMPLETED = "_completed"


def setup(chapter: str, model: type[Parameters]) -> None:
    """Check and complete the parameters of a chapter, and set up figures and threads.

    The parameters are the variables of the notebook that declares ``model``, and get their checked
    values there. It may be called again after any of them was changed: what a value was completed
    to is completed anew from what was given.

    Raises `InputError` for the first parameter that is not usable, and for names that papermill was
    given and that the chapter has not.
    """
    from IPython import get_ipython

    notebook = vars(sys.modules[model.__module__])
    completed: dict[str, tuple[Any, Any]] = notebook.setdefault(_COMPLETED, {})
    given = injected(notebook.get("In", ()))
    for name in model.model_fields:
        if name in notebook:
            value = notebook[name]
            before, origin = completed.get(name, (None, None))
            given[name] = origin if value is before else value
    for name, value in model.checked(given, chapter=chapter):
        completed[name] = value, given[name]
        notebook[name] = value
    if shell := get_ipython():
        shell.run_line_magic("config", 'InlineBackend.figure_formats = ["svg"]')
    figures.use_style()
    # On matrices as small as most are here, threads mostly wait for each other.
    torch.set_num_threads(1)


def quote(name: str, value: Any, *, digits: int | None = None) -> None:
    """Let the text quote a number, a text or a figure as ``{glue:…}`name```.

    With ``digits``, a number becomes Markdown of so many significant ones, in which powers of ten
    are typeset (`claims.number`).
    """
    from IPython.display import Markdown
    from myst_nb import glue

    if hasattr(value, "item"):
        value = value.item()  # a plain number, whose format the text chooses
    shown = value if digits is None else Markdown(claims.number(value, digits))
    glue(name, shown, display=False)
