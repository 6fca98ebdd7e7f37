"""What pages get from chapters' cells: captions of figures, and links in code.

JupyterLab shows a caption, and numbers its figure, where a Markdown cell holds the directive
``figure`` without a picture, below the cell that draws; MyST-NB wants it in that cell's metadata.

``sphinx-codeautolink`` reads the cells as one program. Here it is told of those that the page
leaves out, which import its names; and variables, which it would link to their types, stay plain.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from docutils import nodes
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx_codeautolink.extension.directive import PrefaceMarker

CAPTION = re.compile(r":::\{figure\}\n:name: (?P<name>\S+)\n\n(?P<caption>.+)\n:::", re.DOTALL)


def _attach_captions(app: Sphinx, docname: str, source: list[str]) -> None:
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


def _tell_of_hidden_cells(app: Sphinx, doctree: nodes.document) -> None:
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        hidden = [cell.source for cell in cells if "remove-cell" in cell.metadata.get("tags", ())]
        doctree.insert(0, PrefaceMarker("\n".join(hidden), "file"))


def _leave_variables_plain(app: Sphinx, env: BuildEnvironment) -> None:
    for transforms in env.sphinx_codeautolink_transforms.values():  # type: ignore[attr-defined]
        for transform in transforms:
            transform.names = [
                name
                for name in transform.names
                if name.code_str.split(".")[-1] == name.resolved_location.split(".")[-1]
            ]


def setup(app: Sphinx) -> None:
    app.setup_extension("sphinx_codeautolink")
    app.connect("source-read", _attach_captions)
    app.connect("doctree-read", _tell_of_hidden_cells, priority=480)  # it reads them at 490
    app.connect("env-updated", _leave_variables_plain, priority=600)  # once it knows what they are
