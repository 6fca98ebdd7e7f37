"""What pages show of executed chapters: quoted numbers, badges of claims, and overviews.

In the chapter ``07-training``, ``{eval}`book.quoted["plain_4:.0f"]` `` is the number that it glued
as ``plain_4``, in the format behind the colon; what was glued as Markdown has no format. JupyterLab
asks the kernel for it. On any other page it is ``{quoted}`07-training::plain_4:.0f` ``.

The title of a statement has a badge for all that its page claims about it. It leads to the
sentences on the scorecard, whose badges lead back. Claims about a statement of another page are on
the scorecard alone. In a book all claims hold, or their chapter would not be in it.

Pages on the whole book are read after the chapters. They are templates of their claims, statements,
and runs, whose records are beside them, ``NN-name.json``. Versions are those of the environment
that builds, which ran them.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from subprocess import DEVNULL, PIPE, run
from typing import Any

import nbformat
from docutils import nodes
from jinja2 import Template
from packaging.requirements import Requirement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

import lorapower
from lorapower.book._executed import NAMED, QUOTED, formatted, read_claims, read_quotes
from lorapower.book.claims import MIME, Claim

SCORECARD = "chapters/scorecard"
_TEMPLATES = ["chapters/built", SCORECARD, "chapters/statements"]
_HERE = re.compile(QUOTED)
_ELSEWHERE = re.compile(rf"(?P<chapter>[\w-]+)::{NAMED}")


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
        if not (parts := _HERE.fullmatch(self.text) or _ELSEWHERE.fullmatch(self.text)):
            raise ValueError('write book.quoted["name"], or chapter::name; then :format')
        chapter = parts.groupdict().get("chapter")
        docname = f"chapters/{chapter}" if chapter else self.env.docname
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


def _set_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Behind the titles of statements."""
    found = badges(app.env, app.env.docname)
    for box in doctree.findall(nodes.Element):
        if badge := found.get(box.get("label")):
            box[0] += [nodes.Text(" "), badge.node(app.env)]  # type: ignore[operator]


def chapters(env: BuildEnvironment) -> dict[str, Path]:
    """The executed notebooks, by page, in the order of the book."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.config.external_site_map}
    return {docname: path for docname, path in paths.items() if path.suffix == ".ipynb"}


def title(env: BuildEnvironment, docname: str) -> str:
    """The title of a page that was read, up to a colon."""
    return env.titles[docname].astext().partition(":")[0]


@dataclass
class Statement:
    """What a chapter states; `uses` are labels, and `checks` is a number of claims."""

    name: str
    label: str
    docname: str
    checks: int
    uses: list[str]


def statements(env: BuildEnvironment) -> list[Statement]:
    """All statements of the book, in its order.

    They rest on what their proofs refer to, and on the premises that they name.
    """
    paths = chapters(env)
    checks = Counter(claim.label for path in paths.values() for claim in read_claims(path))
    found: list[Statement] = []
    for docname in paths:
        for box in env.get_doctree(docname).findall(nodes.Element):
            if "proof" not in box.get("classes", ()):
                continue
            references = (node for node in box.findall(pending_xref) if node["refdomain"] == "prf")
            used = [*dict.fromkeys(node["reftarget"] for node in references)]
            if isinstance(box, nodes.admonition):  # a proof
                found[-1].uses += [label for label in used if label not in found[-1].uses]
            else:
                label = box["label"]
                premises = [label for label in used if label.startswith(("ass-", "def-"))]
                name = box["title"].strip().removeprefix("(").removesuffix(")")
                found.append(Statement(name, label, docname, checks[label], premises))
    return found


def revision() -> str:
    """Describe the revision of the checkout, its date, and whether files differ from it."""
    root = Path(lorapower.__file__).resolve().parents[1]
    git = "git log -1 --format='%h of %cs' && (git diff --quiet HEAD || echo and changes since)"
    said = run(git, shell=True, cwd=root, stdout=PIPE, stderr=DEVNULL, text=True).stdout
    return " ".join(said.split()) or "unknown, as this is no checkout"


def libraries() -> dict[str, str]:
    """The versions of what the project asks for by name, to make chapters and pages."""
    asked = map(Requirement, metadata.requires("lorapower") or ())
    names = {each.name for each in asked if not str(each.marker).endswith('"test"')} - {"lorapower"}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}


def runs(env: BuildEnvironment) -> dict[str, dict[str, Any]]:
    """The records of the chapters' runs."""
    paths = chapters(env)
    return {name: json.loads(path.with_suffix(".json").read_text()) for name, path in paths.items()}


def _prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Leave out lines that other front ends show where a claim is made, and fill templates."""
    if badges(app.env, docname):
        notebook = nbformat.reads(source[0], as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [each for each in cell.outputs if MIME not in each.get("data", ())]
        source[0] = nbformat.writes(notebook)
    elif docname in _TEMPLATES:
        template = Template(source[0], trim_blocks=True, lstrip_blocks=True)
        found = [badge for name in chapters(app.env) for badge in badges(app.env, name).values()]
        given = {"env": app.env, "badges": found, "platform": platform}
        source[0] = template.render(globals() | given)


def _read_templates_last(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    docnames.sort(key=_TEMPLATES.__contains__)


def setup(app: Sphinx) -> None:
    app.add_role("eval", Quoted(), override=True)  # MyST-NB's own asks a kernel
    app.add_role("quoted", Quoted())
    app.add_role("verdict", Verdict())
    app.connect("source-read", _prepare)
    app.connect("doctree-read", _set_badges)
    app.connect("env-before-read-docs", _read_templates_last)
