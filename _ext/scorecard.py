"""The directive ``{scorecard}``: every claim that the executed chapters recorded, as tables.

A sentence says how many there are and whether they hold. Then come two parts, of what is proved
and of what is observed, each with a folded table for every chapter that has any, in the order of
the table of contents. The fields of a claim are inline Markdown and may hold mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer, load_mime_renders
from pages import chapters, table, title
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lorapower.book.claims import MIME, Claim, read

# Each part's title, and what its claims were to be; by whether they belong to observations.
_PARTS = {False: ("Theorems", "Predicted"), True: ("Observations", "Required")}


def count(claims: Sequence[Claim]) -> str:
    """How many claims there are, and how many of them fail."""
    failing = sum(not claim.holds for claim in claims)
    verdict = f"{failing} of them fail" if failing else "all hold"
    return (
        f"{len(claims)} claims, {verdict}"
        if len(claims) > 1
        else "One claim, it " + ("fails" if failing else "holds")
    )


def total(claims: Iterable[Claim]) -> str:
    """How many claims there are, of either kind, and whether they hold."""
    every = list(claims)
    observed = sum(claim.observed for claim in every)
    failing = sum(not claim.holds for claim in every)
    return (
        f"{len(every)} claims, {f'{failing} fail' if failing else 'all hold'}: "
        f"{len(every) - observed} of theorems, {observed} of observations."
    )


def _cells(claim: Claim) -> tuple[str, ...]:
    statement = f"{{prf:ref}}`{claim.label}`: {claim.statement}"
    return claim.verdict, statement, claim.measured, claim.predicted


class Scorecard(SphinxDirective):
    """A total, and two sections of tables."""

    def run(self) -> list[nodes.Node]:
        recorded = {docname: read(path) for docname, path in chapters(self.env).items()}
        every = [claim for claims in recorded.values() for claim in claims]
        if not every:
            raise self.error("no chapter recorded a claim: the scorecard would be empty")
        return [nodes.paragraph("", total(every)), *self._parts(recorded)]

    def _parts(self, recorded: Mapping[str, list[Claim]]) -> Iterable[nodes.section]:
        for observed, (name, expected) in _PARTS.items():
            part = self._section(name.lower(), name)
            for docname, claims in recorded.items():
                page = docname.rpartition("/")[2]
                if chosen := [claim for claim in claims if claim.observed is observed]:
                    section = self._section(f"{name} {page}", title(self.env, docname))
                    heads = ("Verdict", "Claim", "Measured", expected)
                    kind = f"scorecard {expected.lower()}"
                    rows = table(self, heads, map(_cells, chosen), kind)
                    section += nodes.admonition(
                        "", nodes.title("", count(chosen)), rows, classes=["dropdown"]
                    )
                    part += section
            if len(part) > 1:
                yield part

    def _section(self, name: str, heading: str) -> nodes.section:
        parsed, messages = self.state.inline_text(heading, self.lineno)
        section = nodes.section(ids=[nodes.make_id(name)])
        section += nodes.title("", "", *parsed, *messages)
        return section


class ClaimRenderer:
    """Renders nothing for a claim's record: the page shows the output's other form."""

    mime_priority_overrides = ()

    @staticmethod
    def handle_mime(
        renderer: NbElementRenderer, data: MimeData, inline: bool
    ) -> list[nodes.Element] | None:
        return [] if data.mime_type == MIME else None


def setup(app: Sphinx) -> None:
    app.add_directive("scorecard", Scorecard)
    # Entry points are MyST-NB's own way to a renderer, but only for installed packages.
    load_mime_renders().append(ClaimRenderer)
