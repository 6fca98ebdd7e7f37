"""The directive ``{scorecard}``: every claim that the executed chapters recorded, as tables.

One section per chapter, in the order of the table of contents; a chapter without claims has none.
The fields of a claim are inline Markdown and may hold mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import nbformat
from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer, load_mime_renders
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from lorapower.book.claims import MIME, Claim, read

_COLUMNS = ("Verdict", "Claim", "Predicted or required", "Measured", "Criterion")


def _title(notebook: Path) -> str:
    """The notebook's first heading."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


def _cells(claim: Claim) -> tuple[str, ...]:
    return (
        "✓ holds" if claim.holds else "✗ fails",
        f"{{prf:ref}}`{claim.label}`: {claim.statement}",
        claim.predicted,
        claim.measured,
        claim.criterion,
    )


class Scorecard(SphinxDirective):
    """Sections with one table of claims for each chapter that recorded any."""

    def run(self) -> list[nodes.Node]:
        sections: list[nodes.Node] = []
        for docname in self.config.external_site_map:
            path = Path(self.env.doc2path(docname))
            if path.suffix == ".ipynb" and (claims := read(path)):
                section = nodes.section(ids=[nodes.make_id(path.stem)])
                section += nodes.title("", "", *self._inline(_title(path)))
                section += self._table(map(_cells, claims))
                sections.append(section)
        if not sections:
            raise self.error("no chapter recorded a claim: the scorecard would be empty")
        return sections

    def _inline(self, markdown: str) -> list[nodes.Node]:
        parsed, messages = self.state.inline_text(markdown, self.lineno)
        return [*parsed, *messages]

    def _table(self, rows: Iterable[tuple[str, ...]]) -> nodes.table:
        group = nodes.tgroup("", *(nodes.colspec() for _ in _COLUMNS), cols=len(_COLUMNS))
        group += nodes.thead("", self._row(_COLUMNS))
        group += nodes.tbody("", *map(self._row, rows))
        return nodes.table("", group, classes=["scorecard"])

    def _row(self, cells: tuple[str, ...]) -> nodes.row:
        return nodes.row(
            "", *(nodes.entry("", nodes.paragraph("", "", *self._inline(cell))) for cell in cells)
        )


class ClaimRenderer:
    """Renders nothing for a claim's record: the page shows the output's other form."""

    mime_priority_overrides = ()

    @staticmethod
    def handle_mime(
        renderer: NbElementRenderer, data: MimeData, inline: bool
    ) -> list[nodes.Element] | None:
        return [] if data.mime_type == MIME else None


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("scorecard", Scorecard)
    # Entry points are MyST-NB's own way to a renderer, but only for installed packages.
    load_mime_renders().append(ClaimRenderer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
