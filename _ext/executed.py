"""What the extensions read of executed chapters."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.environment import BuildEnvironment


def chapters(env: BuildEnvironment) -> dict[str, Path]:
    """The executed notebooks, by page, in the order of the book."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.config.external_site_map}
    return {docname: path for docname, path in paths.items() if path.suffix == ".ipynb"}


@lru_cache
def read(notebook: Path) -> NotebookNode:
    """The notebook, read once."""
    return nbformat.read(notebook, as_version=4)


def markdown(notebook: Path) -> str:
    """All text of a notebook."""
    cells = read(notebook).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def title(notebook: Path) -> str:
    """The first heading of a notebook, up to a colon."""
    heading = re.search(r"^# ([^:\n]+)", markdown(notebook), re.MULTILINE)
    return heading[1] if heading else notebook.stem


def glued(notebook: Path) -> dict[str, dict[str, str]]:
    """What a notebook glued: by name, the text of each form that it has."""
    found = {}
    for cell in read(notebook).cells:
        for output in cell.get("outputs", ()):
            if about := output.get("metadata", {}).get("scrapbook"):
                prefix, forms = about.get("mime_prefix", ""), output["data"].items()
                found[about["name"]] = {kind.removeprefix(prefix): text for kind, text in forms}
    return found
