"""The directive ``{statements}``: all that the chapters state, by name.

Statements are read from the chapters' text: their names, the statements that their proofs refer to,
and the premises that they name. The claims of the executed chapters say which were checked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from docutils import nodes
from executed import chapters, markdown, title
from markdown_table import table
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from lorapower.book.claims import read

_BOX = re.compile(
    r"^(:{3,})\{prf:(?P<kind>\w+)\} *(?P<name>[^\n]*)\n(?::label: *(?P<label>\S+)\n)?"
    r"(?P<text>.*?)^\1 *$",
    re.MULTILINE | re.DOTALL,
)
_REFERENCE = re.compile(r"\{prf:ref\}`(?:[^`<]*<)?([\w-]+)>?`")
_PREMISES = ("ass-", "def-")
_COLUMNS = ("Name", "Statement", "Chapter", "Rests on", "Checks")


@dataclass
class Statement:
    """What a chapter states; `uses` are labels, and `checks` is a number of claims."""

    kind: str
    name: str
    label: str
    docname: str
    checks: int
    uses: list[str] = field(default_factory=list)


def statements(env: BuildEnvironment) -> list[Statement]:
    """All statements of the book, in its order."""
    paths = chapters(env)
    checks = Counter(claim.label for path in paths.values() for claim in read(path))
    found: list[Statement] = []
    for docname, path in paths.items():
        for box in _BOX.finditer(markdown(path)):
            kind, name, label, references = *box.group("kind", "name", "label"), _used(box["text"])
            if kind == "proof":
                found[-1].uses += [one for one in references if one not in found[-1].uses]
            else:
                premises = [one for one in references if one.startswith(_PREMISES)]
                found.append(Statement(kind, name, label, docname, checks[label], premises))
    return found


def _used(text: str) -> list[str]:
    return [*dict.fromkeys(_REFERENCE.findall(text))]


class Statements(SphinxDirective):
    """A table of all statements, by name."""

    def run(self) -> list[nodes.Node]:
        titles = {docname: title(path) for docname, path in chapters(self.env).items()}
        rows = [
            (
                one.name,
                f"{{prf:ref}}`{one.label}`",
                f"{{doc}}`{titles[one.docname]} </{one.docname}>`",
                ", ".join(f"{{prf:ref}}`{label}`" for label in one.uses) or "–",
                str(one.checks or "–"),
            )
            for one in sorted(statements(self.env), key=lambda one: one.name.lower())
        ]
        return [table(self, _COLUMNS, rows, "statements")]


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("statements", Statements)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
