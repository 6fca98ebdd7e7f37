"""Parts of a page that are folded, across cells.

They stand between two HTML comments in one section, ``<!-- fold: TITLE -->`` and
``<!-- /fold -->``.
JupyterLab shows neither comment, and what is between them open.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx_design.shared import create_component

_BEGINS = re.compile(r"<!-- fold: (.+) -->")
_END = "<!-- /fold -->"


def fold(app: Sphinx, doctree: nodes.document) -> None:
    """Put the parts of a page into boxes that open."""
    for mark in [*doctree.findall(nodes.raw)]:
        if begins := _BEGINS.fullmatch(mark.astext().strip()):
            siblings = mark.parent
            start = siblings.index(mark)
            ends = (k for k, node in enumerate(siblings) if k > start and _is_end(node))
            if (end := next(ends, None)) is None:
                raise ValueError(f"a fold has no end in its section: {begins[1]}")
            box = create_component(
                "dropdown",
                opened=False,
                type="dropdown",
                has_title=True,
                icon=None,
                chevron=None,
                container_classes=["fold"],
                title_classes=[],
                body_classes=[],
            )
            box += [nodes.rubric("", begins[1]), *siblings[start + 1 : end]]
            siblings[start : end + 1] = [box]


def _is_end(node: nodes.Node) -> bool:
    return isinstance(node, nodes.raw) and node.astext().strip() == _END


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", fold)
