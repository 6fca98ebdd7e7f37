"""What pages show of executed chapters: the numbers that texts quote, and badges of claims.

In the chapter ``07-training``, ``{eval}`book.quoted["plain_4:.0f"]` `` is the number that it glued
as ``plain_4``, in the format behind the colon; what was glued as Markdown has no format. JupyterLab
asks the kernel for it. On any other page it is ``{quoted}`07-training::plain_4:.0f` ``.

The title of a statement has a badge for all that its page claims about it. It leads to the
sentences on the scorecard, whose badges lead back. Claims about a statement of another page are on
the scorecard alone. In a book all claims hold, or their chapter would not be in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

from lorapower.book._executed import formatted, read_claims, read_quotes
from lorapower.book.claims import MIME, Claim

SCORECARD = "chapters/scorecard"
_NAMED = r"(?P<name>\w+)(?::(?P<format>[^\"]+))?"
_HERE = re.compile(rf'book\.quoted\["{_NAMED}"\]')
_ELSEWHERE = re.compile(rf"(?P<chapter>[\w-]+)::{_NAMED}")


@cache
def _quotes(path: str) -> dict[str, dict[str, Any]]:
    return read_quotes(json.loads(Path(path).read_text(encoding="utf-8")))


class Quoted(SphinxRole):
    """A number or a text of a run, of this page's or another's."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            return [self._node()], []
        except (OSError, LookupError, ValueError, SyntaxError) as error:
            message = f"{{{self.name}}}`{self.text}` quotes nothing: {error!r}"
            return [], [self.inliner.reporter.error(message, line=self.lineno)]

    def _node(self) -> nodes.Node:
        if parts := _HERE.fullmatch(self.text):
            docname = self.env.docname
        elif parts := _ELSEWHERE.fullmatch(self.text):
            docname = f"chapters/{parts['chapter']}"
        else:
            raise ValueError('write book.quoted["name"], or chapter::name; then :format')
        forms = _quotes(self.env.doc2path(docname))[parts["name"]]
        if not (text := forms.get("text/markdown")):
            text = formatted(forms["text/plain"], parts["format"] or "")
        elif parts["format"]:
            raise ValueError("it is Markdown, and takes no format")
        elif text.startswith("$"):
            return nodes.math("", text.strip("$"))
        return nodes.inline("", text, classes=["pasted-text"])


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
    app.add_role("eval", Quoted(), override=True)  # MyST-NB's own asks a kernel
    app.add_role("quoted", Quoted())
    app.add_role("verdict", Verdict())
    app.connect("source-read", _leave_out_lines)
    app.connect("doctree-read", _set_badges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
