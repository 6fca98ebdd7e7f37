"""Finish notebooks that papermill ran: numbers in the text, parameters named, checks that count.

Papermill loads it as an engine, which becomes its default: the command line needs no option.
"""

from __future__ import annotations

from typing import Any

from papermill.engines import NBClientEngine, papermill_engines

from . import _executed


class Engine(NBClientEngine):  # type: ignore[misc]
    """Execute a notebook, and finish it if it is a chapter."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        """Run all cells; what papermill writes after that is finished."""
        super().execute_managed_notebook(nb_man, kernel_name, **options)
        _executed.finish(nb_man.nb)


papermill_engines.register(None, Engine)
