"""What pages get from chapters' cells: captions of figures, folded parts, and links in code.

JupyterLab shows a caption, and numbers its figure, where a Markdown cell holds the directive
``figure`` without a picture, below the cell that draws; MyST-NB wants it in that cell's metadata.
What stands between two comments in one section, ``<!-- fold: TITLE -->`` and ``<!-- /fold -->``, is
folded on the page, and open in JupyterLab, which shows neither.

``sphinx-codeautolink`` reads the cells as one program. Here it is told of those that the page
leaves out, which import its names; and variables, which it would link to their types, stay plain.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.parallel import ParallelTasks
from sphinx_codeautolink import extension
from sphinx_codeautolink.extension.block import link_html
from sphinx_design.shared import create_component

CAPTION = re.compile(r":::\{figure\}\n:name: (?P<name>\S+)\n\n(?P<caption>.+)\n:::", re.DOTALL)
_FOLD = re.compile(r"<!-- fold: (.+) -->")
_DROPDOWN: dict[str, Any] = {
    **{"name": "dropdown", "type": "dropdown", "opened": False, "has_title": True},
    **{"icon": None, "chevron": None},
    **{"container_classes": ["fold"], "title_classes": [], "body_classes": []},
}


def _prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        return
    notebook = nbformat.reads(source[0], as_version=4)
    cells: list[NotebookNode] = []
    hidden: list[str] = []  # told to codeautolink
    for cell in notebook.cells:
        if "remove-cell" in cell.metadata.get("tags", ()):
            hidden.append(cell.source)
        caption = CAPTION.fullmatch(cell.source) if cell.cell_type == "markdown" else None
        if caption:
            cells[-1].metadata.setdefault("mystnb", {})["figure"] = caption.groupdict()
        else:
            cells.append(cell)
    preface = "\n".join(["````{autolink-preface}", ":level: file", "", *hidden, "````"])
    notebook.cells = [cells[0], nbformat.v4.new_markdown_cell(preface), *cells[1:]]
    source[0] = nbformat.writes(notebook)


def _fold(app: Sphinx, doctree: nodes.document) -> None:
    for mark in [*doctree.findall(nodes.raw)]:
        if begins := _FOLD.fullmatch(mark.astext().strip()):
            start, siblings = mark.parent.index(mark), mark.parent
            texts = [part.astext().strip() for part in siblings]
            end = texts.index("<!-- /fold -->", start)
            inside = [nodes.rubric("", begins[1]), *siblings[start + 1 : end]]
            siblings[start : end + 1] = [create_component(**_DROPDOWN, children=inside)]


def _leave_variables_plain(app: Sphinx, env: BuildEnvironment) -> None:
    for transforms in env.sphinx_codeautolink_transforms.values():  # type: ignore[attr-defined]
        for transform in transforms:
            transform.names = [
                name
                for name in transform.names
                if name.code_str.split(".")[-1] == name.resolved_location.split(".")[-1]
            ]


def _link_side_by_side(app: Sphinx) -> None:
    """Put links into written pages, one after another by default, in several processes."""
    tasks = ParallelTasks(app.parallel)

    def add(*page: Any, **options: Any) -> None:
        tasks.add_task(partial(link_html, *page, **options))

    extension.link_html = add
    app.connect("build-finished", lambda *_: tasks.join(), priority=600)


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx_codeautolink")
    _link_side_by_side(app)
    app.connect("source-read", _prepare)
    app.connect("doctree-read", _fold)
    app.connect("env-updated", _leave_variables_plain, priority=600)  # once it knows what they are
    return {"parallel_read_safe": True, "parallel_write_safe": True}
