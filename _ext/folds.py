"""Parts of a page that are folded, across cells.

They stand between two HTML comments in one section, ``<!-- fold: TITLE -->`` and
``<!-- /fold -->``.
JupyterLab shows neither comment, and what is between them open.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx_design.shared import create_component

_BEGINS = re.compile(r"<!-- fold: (.+) -->")
_END = "<!-- /fold -->"
_CLOSED: dict[str, Any] = {"opened": False, "has_title": True, "icon": None, "chevron": None}
_CLASSES: dict[str, Any] = {
    "container_classes": ["fold"],
    "title_classes": [],
    "body_classes": [],
}


def _fold(app: Sphinx, doctree: nodes.document) -> None:
    """Put the parts of a page into boxes that open."""
    for mark in [*doctree.findall(nodes.raw)]:
        if begins := _BEGINS.fullmatch(mark.astext().strip()):
            start, siblings = mark.parent.index(mark), mark.parent
            end = start + 1
            while siblings[end].astext().strip() != _END:
                end += 1
            box = create_component("dropdown", type="dropdown", **_CLOSED, **_CLASSES)
            box += [nodes.rubric("", begins[1]), *siblings[start + 1 : end]]
            siblings[start : end + 1] = [box]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", _fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
