"""Captions of the figures that cells draw.

JupyterLab shows a caption, and numbers its figure, where a Markdown cell holds the directive
``figure`` without a picture, below the cell that draws. MyST-NB wants it in the drawing cell's
metadata; there it is put when a chapter is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

CAPTION = re.compile(r":::\{figure\}\n:name: (?P<name>\S+)\n\n(?P<caption>.+)\n:::", re.DOTALL)


def _attach(app: Sphinx, docname: str, source: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        return
    notebook = nbformat.reads(source[0], as_version=4)
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        found = CAPTION.fullmatch(cell.source) if cell.cell_type == "markdown" else None
        if found:
            cells[-1].metadata.setdefault("mystnb", {})["figure"] = found.groupdict()
        else:
            cells.append(cell)
    notebook.cells = cells
    source[0] = nbformat.writes(notebook)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("source-read", _attach)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
