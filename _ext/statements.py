"""The directives ``{statements}`` and ``{statement-map}``: all that the chapters state.

The one is a table by name, the other a drawing of which statements rest on which: a row for each
chapter, and lines from each statement down to those that rest on it. Boxes are links; while one is
pointed at, its lines stand out. Pages with these directives are read after the chapters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import groupby

from docutils import nodes
from pages import chapters, table, title
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

from lorapower.book.claims import read

_PREMISES = ("ass-", "def-")
_COLUMNS = ("Name", "Statement", "Chapter", "Rests on", "Checks")
# What a proof can rest on, or what has one.
_SHORT = {
    "assumption": "Ass.",
    "corollary": "Cor.",
    "lemma": "Lem.",
    "proposition": "Prop.",
    "theorem": "Thm.",
}
# In pixels: a box, the distances of boxes and of rows, the space of a row's head; boxes in a row.
_WIDTH, _HEIGHT, _STEP, _RISE, _HEAD, _IN_A_ROW = 76, 26, 90, 96, 44, 8
_FULL = (_IN_A_ROW - 1) * _STEP + _WIDTH

Places = dict[str, tuple[int, int]]


@dataclass
class Statement:
    """What a chapter states; `uses` are labels, and `checks` is a number of claims."""

    kind: str
    name: str
    label: str
    docname: str
    checks: int
    uses: list[str]


@cache
def statements(env: BuildEnvironment) -> list[Statement]:
    """All statements of the book, in its order.

    They rest on what their proofs refer to, and on the premises that they name.
    """
    paths = chapters(env)
    checks = Counter(claim.label for path in paths.values() for claim in read(path))
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
                premises = [label for label in used if label.startswith(_PREMISES)]
                name = box["title"].strip().removeprefix("(").removesuffix(")")
                kind, count = env.proof_list[label]["realtype"], checks[label]  # type: ignore[attr-defined]
                found.append(Statement(kind, name, label, docname, count, premises))
    return found


class Statements(SphinxDirective):
    """A table of all statements, by name."""

    def run(self) -> list[nodes.Node]:
        rows = [
            (
                each.name,
                f"{{prf:ref}}`{each.label}`",
                f"{{doc}}`{title(self.env, each.docname)} </{each.docname}>`",
                ", ".join(f"{{prf:ref}}`{label}`" for label in each.uses) or "–",
                str(each.checks or "–"),
            )
            for each in sorted(statements(self.env), key=lambda each: each.name.lower())
        ]
        return [table(self, _COLUMNS, rows, "statements")]


class statement_map(nodes.General, nodes.Element):  # noqa: N801 - as docutils names its nodes
    """Stands for the map until all statements have their numbers."""


class StatementMap(SphinxDirective):
    """The map of all statements of the book."""

    def run(self) -> list[nodes.Node]:
        return [statement_map()]


def _visit(self: HTML5Translator, node: statement_map) -> None:
    """Write the map as SVG."""
    env, builder = self.builder.env, self.builder
    shown = [each for each in statements(env) if each.kind in _SHORT]
    places: Places = {}
    rows, heads, boxes = 0, [], []
    for docname, group in groupby(shown, lambda each: each.docname):
        heads.append(_text(0, rows * _RISE + 20, title(env, docname), "head"))
        address = builder.get_relative_uri(builder.current_docname, docname)
        stated = [*group]
        for start in range(0, len(stated), _IN_A_ROW):
            row = stated[start : start + _IN_A_ROW]
            places |= _place(row, places, rows * _RISE + _HEAD)
            rows += 1
        for each in stated:
            number = env.toc_fignumbers[docname][each.kind][each.label]
            text = f"{_SHORT[each.kind]} {'.'.join(map(str, number))}"
            boxes.append(_box(each, f"{address}#{each.label}", text, *places[each.label]))
    lines = [
        f'<path class="{each.label} {used}" d="{_curve(places[used], places[each.label])}"/>'
        for each in shown
        for used in each.uses
        if used in places
    ]
    pointed = "".join(
        f"svg:has(#map-{each.label}:is(:hover, :focus-visible)) path.{each.label} {{"
        "stroke: var(--pst-color-primary); opacity: 1; stroke-width: 2}"
        for each in shown
    )
    self.body.append(
        f'<div class="statement-map"><svg viewBox="-2 0 {_FULL + 4} {rows * _RISE}" role="group" '
        f'aria-label="Map of statements"><style>{pointed}</style>{"".join(heads + lines + boxes)}'
        "</svg></div>"
    )
    raise nodes.SkipNode


def _place(row: list[Statement], above: Places, y: int) -> Places:
    """The places of a row: below what it rests on, or else to the right, out of others' lines."""
    free = _FULL - (len(row) - 1) * _STEP - _WIDTH
    used = [above[label][0] for each in row for label in each.uses if label in above]
    middle = sum(used) // len(used) - (_FULL - _WIDTH - free) // 2 if used else free
    left = min(max(middle, 0), free)
    return {each.label: (left + place * _STEP, y) for place, each in enumerate(row)}


def _box(each: Statement, address: str, text: str, x: int, y: int) -> str:
    kind = f"{each.kind} {'checked' if each.checks else ''}"
    return (
        f'<a class="{kind}" href="{address}" id="map-{each.label}"><title>{escape(each.name)}'
        f'</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f"{_text(x + _WIDTH // 2, y + 17, text, 'box')}</a>"
    )


def _text(x: int, y: int, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'


def _curve(used: tuple[int, int], user: tuple[int, int]) -> str:
    """From the lower side of a box to the upper side of another, in one row along upper sides."""
    (x, y), (u, v) = used, user
    x, u = x + _WIDTH // 2, u + _WIDTH // 2
    if y == v:
        bend = y - 12 - abs(u - x) // 24
        return f"M{x} {y}C{x} {bend} {u} {bend} {u} {y}"
    y += _HEIGHT
    return f"M{x} {y}C{x} {y + 40} {u} {v - 40} {u} {v}"


def setup(app: Sphinx) -> None:
    app.add_node(statement_map, html=(_visit, None))
    app.add_directive("statement-map", StatementMap)
    app.add_directive("statements", Statements)
