"""The directive ``{colophon}``: from what, with what and on what the book was made.

Each executed chapter has a record of its run beside it, ``NN-name.json``; the versions are those of
the environment that builds the pages, which is the one that ran the chapters.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from docutils import nodes
from packaging.requirements import Requirement
from pages import chapters, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import lorapower

PACKAGE = "lorapower"
_EXTRAS = ("", "book", "glue", "checkpoints", "experiments")


def revision(root: Path) -> str:
    """The revision of the checkout at `root`, and whether files differ from it."""
    git = ["git", "-C", str(root)]
    try:
        top, commit, day = (
            subprocess.run(
                [*git, *words], check=True, capture_output=True, text=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["describe", "--always", "--dirty= and changes since"],
                ["log", "-1", "--format=%cs"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown, as this is no checkout"
    # A copy may lie in somebody else's checkout.
    return f"{commit}, of {day}" if Path(top) == root else "unknown, as this is no checkout"


def libraries() -> dict[str, str]:
    """The versions of what the project asks for by name."""
    asked = map(Requirement, metadata.requires(PACKAGE) or ())
    names = {
        one.name
        for one in asked
        if one.name != PACKAGE
        and any(one.marker is None or one.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
    }
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}


class Colophon(SphinxDirective):
    """A list of what made the book, and tables of chapters and of libraries."""

    def run(self) -> list[nodes.Node]:
        paths = chapters(self.env)
        records = {name: path.with_suffix(".json") for name, path in paths.items()}
        runs = {name: json.loads(record.read_text()) for name, record in records.items()}
        root = Path(lorapower.__file__).resolve().parents[1]
        facts = {
            "Version": f"{metadata.version(PACKAGE)}, revision {revision(root)}",
            "Profile": _listed(run["profile"] for run in runs.values()),
            "Machine": _listed(run["machine"] for run in runs.values()),
            "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        }
        seconds = {f"{{doc}}`/{name}`": f"{run['seconds']:.0f}" for name, run in runs.items()}
        return [
            table(self, ("", ""), facts.items(), "colophon"),
            table(self, ("Chapter", "Seconds"), seconds.items(), "colophon"),
            table(self, ("Library", "Version"), libraries().items(), "colophon"),
        ]


def _listed(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def setup(app: Sphinx) -> None:
    app.add_directive("colophon", Colophon)
