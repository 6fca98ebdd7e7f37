"""What pages get from chapters' cells: captions of figures, and folded parts.

JupyterLab shows a caption, and numbers its figure, where a Markdown cell holds the directive
``figure`` without a picture, below the cell that draws; MyST-NB wants it in that cell's metadata.
What stands between two comments in one section, ``<!-- fold: TITLE -->`` and ``<!-- /fold -->``, is
folded on the page, and open in JupyterLab, which shows neither.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx_design.shared import create_component

CAPTION = re.compile(r":::\{figure\}\n:name: (?P<name>\S+)\n\n(?P<caption>.+)\n:::", re.DOTALL)
_FOLD = re.compile(r"<!-- fold: (.+) -->")
_DROPDOWN: dict[str, Any] = {
    **{"name": "dropdown", "type": "dropdown", "opened": False, "has_title": True},
    **{"icon": None, "chevron": None},
    **{"container_classes": ["fold"], "title_classes": [], "body_classes": []},
}


def _caption(app: Sphinx, docname: str, source: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        return
    notebook = nbformat.reads(source[0], as_version=4)
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        caption = CAPTION.fullmatch(cell.source) if cell.cell_type == "markdown" else None
        if caption:
            cells[-1].metadata.setdefault("mystnb", {})["figure"] = caption.groupdict()
        else:
            cells.append(cell)
    notebook.cells = cells
    source[0] = nbformat.writes(notebook)


def _fold(app: Sphinx, doctree: nodes.document) -> None:
    for mark in [*doctree.findall(nodes.raw)]:
        if begins := _FOLD.fullmatch(mark.astext().strip()):
            start, siblings = mark.parent.index(mark), mark.parent
            texts = [part.astext().strip() for part in siblings]
            end = texts.index("<!-- /fold -->", start)
            inside = [nodes.rubric("", begins[1]), *siblings[start + 1 : end]]
            siblings[start : end + 1] = [create_component(**_DROPDOWN, children=inside)]


def setup(app: Sphinx) -> None:
    app.connect("source-read", _caption)
    app.connect("doctree-read", _fold)
