"""Verdicts on what chapters claim: badges, which lead to the sentences on the scorecard and back.

The title of a statement has a badge for all that its page claims about it. A claim about a
statement of another page has its own in the margin beside its cell,
``{verdict}`chapters/NN-name::label-7` ``. The line that other front ends show stays where a claim
fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

from lorapower.book._executed import read_claims
from lorapower.book.claims import MIME, Claim

SCORECARD = "chapters/scorecard"
_LABEL = re.compile(r"^:label: (\S+)$", re.MULTILINE)
_KINDS = {"✓": "holds", "○": "required", "✗": "fails"}


@dataclass
class Badge:
    """What a page claims about a statement: `name` is its label, numbered if it is elsewhere."""

    docname: str
    name: str
    claims: list[Claim]

    @property
    def anchor(self) -> str:
        """Its place on the scorecard: anchors are in small letters."""
        return f"claims-{self.docname.rpartition('/')[2]}-{self.name}".lower()

    def node(self, env: BuildEnvironment) -> nodes.reference:
        """It on the page that is read: a link to the scorecard, or from there to its chapter."""
        text, place = verdict(self.claims), f"verdict-{self.name}"
        back = env.docname == SCORECARD
        page, target = (self.docname, place) if back else (SCORECARD, self.anchor)
        node = nodes.reference("", text, internal=True, classes=["verdict", _KINDS[text[0]]])
        node["refuri"] = f"{env.app.builder.get_relative_uri(env.docname, page)}#{target}"
        node["ids"] = [] if back else [place]
        return node


def verdict(claims: Sequence[Claim]) -> str:
    """A sign and a word for claims of one kind, and their number; some fail if any does."""
    every, failing = len(claims), sum(not claim.holds for claim in claims)
    if failing:
        return f"✗ {f'{failing} of {every} ' * (every > 1)}fail{'s' * (failing == 1)}"
    number = f"{every} " * (every > 1)
    if claims[0].observed:
        return f"○ {number}as required"
    return f"✓ {number}hold{'s' * (every == 1)}"


@cache
def badges(env: BuildEnvironment, docname: str) -> dict[str, Badge]:
    """The badges of a chapter by their names."""
    path, found = Path(env.doc2path(docname)), dict[str, Badge]()
    if path.suffix != ".ipynb":
        return found
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    stated = _LABEL.findall("\n".join(texts))
    for place, claim in enumerate(read_claims(path)):
        name = claim.label if claim.label in stated else f"{claim.label}-{place}"
        found.setdefault(name, Badge(docname, name, [])).claims.append(claim)
    return found


class Verdict(SphinxRole):
    """A badge, by its page and its name."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        docname, name = self.text.split("::")
        return [badges(self.env, docname)[name].node(self.env)], []


def set_marks(app: Sphinx, docname: str, source: list[str]) -> None:
    """In place of claims' lines let there be badges of other pages' statements, and what fails."""
    if not (found := badges(app.env, docname)):
        return
    notebook, places = nbformat.reads(source[0], as_version=4), count()
    for cell in notebook.cells:
        for output in [*cell.get("outputs", ())]:
            if record := output.get("data", {}).get(MIME):
                claim, name = Claim(**record), f"{record['label']}-{next(places)}"
                lines = [] if claim.holds else [claim.line]
                if name in found:
                    mark = f"{{verdict}}`{docname}::{name}`"
                    checked = f"Checked here: {{prf:ref}}`{claim.label}` {mark}"
                    lines.insert(0, f":::{{margin}}\n{checked}\n:::")
                output.data = {"text/markdown": "\n\n".join(lines)}
                if not lines:
                    cell.outputs.remove(output)
    source[0] = nbformat.writes(notebook)


def _set_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Behind the titles of statements."""
    found = badges(app.env, app.env.docname)
    for box in doctree.findall(nodes.Element):
        if badge := found.get(box.get("label")):
            box[0] += [nodes.Text(" "), badge.node(app.env)]  # type: ignore[operator]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("verdict", Verdict())
    app.connect("source-read", set_marks)
    app.connect("doctree-read", _set_badges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
