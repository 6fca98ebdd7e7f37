"""Badges: how many claims of a page agree with a statement, and where their sentences are.

The title of a statement has a badge for all that its page claims about it. It leads to the
sentences on the scorecard, whose badges lead back. Claims about a statement of another page are on
the scorecard alone. In a book all claims hold, or their chapter would not be in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

from lorapower.book._executed import read_claims
from lorapower.book.claims import MIME, Claim

SCORECARD = "chapters/scorecard"


@dataclass
class Badge:
    """What a page claims about the statement with a label."""

    docname: str
    label: str
    claims: list[Claim]

    @property
    def anchor(self) -> str:
        """Its place on the scorecard: anchors are in small letters."""
        return f"claims-{self.docname.rpartition('/')[2]}-{self.label}".lower()

    def node(self, env: BuildEnvironment) -> nodes.reference:
        """It on the page that is read: a link to the scorecard, or from there to its chapter."""
        kind = "required" if self.claims[0].observed else "holds"
        node = nodes.reference("", verdict(self.claims), internal=True, classes=["verdict", kind])
        here, page, target = f"verdict-{self.label}", SCORECARD, f"#{self.anchor}"
        if env.docname == SCORECARD:
            stated = env.proof_list[self.label]["docname"] == self.docname  # type: ignore[attr-defined]
            page, target = self.docname, f"#{here}" if stated else ""
        else:
            node["ids"] = [here]
        node["refuri"] = env.app.builder.get_relative_uri(env.docname, page) + target
        return node


def verdict(claims: Sequence[Claim]) -> str:
    """A sign and a word for claims of one kind, and their number."""
    number = f"{len(claims)} " * (len(claims) > 1)
    if claims[0].observed:
        return f"○ {number}as required"
    return f"✓ {number}hold{'s' * (not number)}"


@cache
def badges(env: BuildEnvironment, docname: str) -> dict[str, Badge]:
    """The badges of a chapter by the labels of statements."""
    path, found = Path(env.doc2path(docname)), dict[str, Badge]()
    for claim in read_claims(path) if path.suffix == ".ipynb" else ():
        found.setdefault(claim.label, Badge(docname, claim.label, [])).claims.append(claim)
    return found


class Verdict(SphinxRole):
    """A badge, by its page and its label."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        docname, label = self.text.split("::")
        return [badges(self.env, docname)[label].node(self.env)], []


def _leave_out_lines(app: Sphinx, docname: str, source: list[str]) -> None:
    """Leave out the lines that other front ends show where a claim is made."""
    if badges(app.env, docname):
        notebook = nbformat.reads(source[0], as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [each for each in cell.outputs if MIME not in each.get("data", ())]
        source[0] = nbformat.writes(notebook)


def _set_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Behind the titles of statements."""
    found = badges(app.env, app.env.docname)
    for box in doctree.findall(nodes.Element):
        if badge := found.get(box.get("label")):
            box[0] += [nodes.Text(" "), badge.node(app.env)]  # type: ignore[operator]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("verdict", Verdict())
    app.connect("source-read", _leave_out_lines)
    app.connect("doctree-read", _set_badges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
