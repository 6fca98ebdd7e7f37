"""Tables whose cells are inline Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def table(
    directive: SphinxDirective, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], kind: str
) -> nodes.table:
    """A table of the classes in `kind`, on the page of `directive`; heads may all be empty."""
    group = nodes.tgroup("", *(nodes.colspec() for _ in heads), cols=len(heads))
    if any(heads):
        group += nodes.thead("", _row(directive, heads))
    group += nodes.tbody("", *(_row(directive, row) for row in rows))
    return nodes.table("", group, classes=kind.split())


def _row(directive: SphinxDirective, cells: tuple[str, ...]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        parsed, messages = directive.state.inline_text(cell, directive.lineno)
        row += nodes.entry("", nodes.paragraph("", "", *parsed, *messages))
    return row
