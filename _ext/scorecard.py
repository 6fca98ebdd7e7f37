"""The directive ``{scorecard}``: every claim that the executed chapters recorded, as tables.

One section per chapter, in the order of the table of contents; a chapter without claims has none.
Statements, predictions and measurements are Markdown and may hold mathematics.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from myst_nb.core.render import MimeData, NbElementRenderer, load_mime_renders
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from lorapower.claims import MIME, Claim, read

_COLUMNS = ("Verdict", "Claim", "Predicted", "Measured", "Criterion")


def _title(notebook: Path) -> str:
    """The notebook's first heading, as Markdown."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


def _row(*cells: str) -> list[str]:
    """A row of a list-table; a cell is one line."""
    first, *others = (" ".join(cell.split()) for cell in cells)
    return [f"* - {first}", *(f"  - {cell}" for cell in others)]


def _table(claims: list[Claim]) -> list[str]:
    lines = [":::{list-table}", ":header-rows: 1", ":class: scorecard", "", *_row(*_COLUMNS)]
    for claim in claims:
        lines += _row(
            "✓ holds" if claim.holds else "✗ fails",
            f"{{prf:ref}}`{claim.label}`: {claim.statement}",
            claim.predicted,
            claim.measured,
            claim.criterion,
        )
    return [*lines, ":::", ""]


class Scorecard(SphinxDirective):
    """Sections with one table of claims for each chapter that recorded any."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for docname in self.config.external_site_map:
            path = Path(self.env.doc2path(docname))
            if path.suffix == ".ipynb" and (claims := read(path)):
                lines += [f"## {_title(path)}", "", *_table(claims)]
        if not lines:
            raise self.error("no chapter recorded a claim: the scorecard would be empty")
        container = nodes.Element()
        self.state.nested_parse(
            StringList(lines, source="scorecard"), 0, container, match_titles=True
        )
        return container.children


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
