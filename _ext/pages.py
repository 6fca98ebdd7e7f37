"""What the extensions share: chapters, tables of Markdown, and files beside the written pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective


def chapters(env: BuildEnvironment) -> dict[str, Path]:
    """The executed notebooks, by page, in the order of the book."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.config.external_site_map}
    return {docname: path for docname, path in paths.items() if path.suffix == ".ipynb"}


def title(env: BuildEnvironment, docname: str) -> str:
    """The title of a page that was read, up to a colon."""
    return env.titles[docname].astext().partition(":")[0]


def add_after_build(app: Sphinx, write: Callable[[Sphinx, Path], None]) -> None:
    """Let `write` add files to the folder of HTML pages, once these are complete."""

    def finish(app: Sphinx, error: Exception | None) -> None:
        if error is None and app.builder.format == "html":
            write(app, Path(app.outdir))

    app.connect("build-finished", finish)


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
