"""The directive ``{statement-map}``: a drawing of which statements rest on which.

A row for each chapter, and lines from each statement down to those that rest on it. Boxes are
links; while one is pointed at, its lines stand out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby

from docutils import nodes
from executed import chapters, title
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator
from statements import Statement, statements

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


class statement_map(nodes.General, nodes.Element):  # noqa: N801 - as docutils names its nodes
    """Stands for the map until all statements have their numbers."""


class StatementMap(SphinxDirective):
    """The map of all statements of the book."""

    def run(self) -> list[nodes.Node]:
        return [statement_map()]


def drawing(
    shown: list[Statement],
    titles: Mapping[str, str],
    addresses: Mapping[str, str],
    names: Mapping[str, str],
) -> str:
    """The map as SVG: pages have titles and addresses, statements, by label, the names in boxes."""
    places: dict[str, tuple[int, int]] = {}
    rows, heads = 0, []
    for docname, group in groupby(shown, lambda one: one.docname):
        heads.append(_text(0, rows * _RISE + 20, titles[docname], "head"))
        for row in _rows([*group]):
            places |= _row(row, places, rows * _RISE + _HEAD)
            rows += 1
    lines = [
        f'<path class="{one.label} {used}" d="{_curve(places[used], places[one.label])}"/>'
        for one in shown
        for used in one.uses
        if used in places
    ]
    boxes = [
        f'<a class="{one.kind} {"checked" if one.checks else ""}" href="{addresses[one.docname]}'
        f'#{one.label}" id="map-{one.label}"><title>{escape(one.name)}</title>'
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f"{_text(x + _WIDTH // 2, y + 17, names[one.label], 'box')}</a>"
        for one, (x, y) in ((one, places[one.label]) for one in shown)
    ]
    pointed = "".join(
        f"svg:has(#map-{one.label}:is(:hover, :focus-visible)) path.{one.label} {{"
        "stroke: var(--pst-color-primary); opacity: 1; stroke-width: 2}"
        for one in shown
    )
    size = f"-2 0 {_FULL + 4} {rows * _RISE}"
    return (
        f'<svg viewBox="{size}" role="group" aria-label="Map of statements">'
        f"<style>{pointed}</style>{''.join(heads + lines + boxes)}</svg>"
    )


def _rows(statements: list[Statement]) -> list[list[Statement]]:
    return [statements[at : at + _IN_A_ROW] for at in range(0, len(statements), _IN_A_ROW)]


def _row(
    statements: list[Statement], above: Mapping[str, tuple[int, int]], y: int
) -> dict[str, tuple[int, int]]:
    """The places of a row: below what it rests on, or else to the right, out of others' lines."""
    free = _FULL - (len(statements) - 1) * _STEP - _WIDTH
    used = [above[label][0] for one in statements for label in one.uses if label in above]
    wanted = sum(used) // len(used) - (_FULL - _WIDTH - free) // 2 if used else free
    left = min(max(wanted, 0), free)
    return {one.label: (left + place * _STEP, y) for place, one in enumerate(statements)}


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


def _visit(self: HTML5Translator, node: statement_map) -> None:
    env, builder = self.builder.env, self.builder
    paths = chapters(env)
    shown = [one for one in statements(env) if one.kind in _SHORT]
    numbers = {one.label: env.toc_fignumbers[one.docname][one.kind][one.label] for one in shown}
    svg = drawing(
        shown,
        {docname: title(path) for docname, path in paths.items()},
        {docname: builder.get_relative_uri(builder.current_docname, docname) for docname in paths},
        {
            one.label: f"{_SHORT[one.kind]} {'.'.join(map(str, numbers[one.label]))}"
            for one in shown
        },
    )
    self.body.append(f'<div class="statement-map">{svg}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_node(statement_map, html=(_visit, None))
    app.add_directive("statement-map", StatementMap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
