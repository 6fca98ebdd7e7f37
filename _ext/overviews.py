"""Pages on the whole book, which are read after the chapters.

They are templates of what this module finds: claims, statements, and the records of runs beside the
chapters, ``NN-name.json``. Versions are those of the environment that builds, which ran them.

A ``div`` of class ``statement-map`` becomes a map of which statements rest on which, with a row for
each chapter, and lines from each statement down to those that rest on it. Boxes are links; while
one is pointed at, its lines stand out.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import metadata
from itertools import groupby
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any

from docutils import nodes
from jinja2 import Template
from packaging.requirements import Requirement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from verdicts import badges, verdict

import lorapower
from lorapower.book.claims import read

_TEMPLATES = [f"chapters/{name}" for name in ("built", "scorecard", "statements")]
_ROOT = Path(lorapower.__file__).resolve().parents[1]
_MAP = '<div class="statement-map">'
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


def chapters(env: BuildEnvironment) -> dict[str, Path]:
    """The executed notebooks, by page, in the order of the book."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.config.external_site_map}
    return {docname: path for docname, path in paths.items() if path.suffix == ".ipynb"}


def _title(env: BuildEnvironment, docname: str) -> str:
    """The title of a page that was read, up to a colon."""
    return env.titles[docname].astext().partition(":")[0]


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
                premises = [label for label in used if label.startswith(("ass-", "def-"))]
                name = box["title"].strip().removeprefix("(").removesuffix(")")
                kind, count = env.proof_list[label]["realtype"], checks[label]  # type: ignore[attr-defined]
                found.append(Statement(kind, name, label, docname, count, premises))
    return found


def _draw(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Put the map as SVG into its place."""
    if _MAP not in context.get("body", ""):
        return
    env = app.env
    shown = [each for each in statements(env) if each.kind in _SHORT]
    places: Places = {}
    rows, heads, boxes = 0, [], []
    for docname, group in groupby(shown, lambda each: each.docname):
        heads.append(_text(0, rows * _RISE + 20, _title(env, docname), "head"))
        address = app.builder.get_relative_uri(pagename, docname)
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
    context["body"] = context["body"].replace(
        _MAP,
        f'{_MAP}<svg viewBox="-2 0 {_FULL + 4} {rows * _RISE}" role="group" aria-label="Map of '
        f'statements"><style>{pointed}</style>{"".join(heads + lines + boxes)}</svg>',
    )


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


def _git(*words: str) -> str:
    return check_output(["git", *words], cwd=_ROOT, stderr=DEVNULL, text=True).strip()


def revision() -> str:
    """The revision of the checkout, and whether files differ from it."""
    try:
        # A copy may lie in somebody else's checkout.
        if not _git("rev-parse", "--show-prefix"):
            commit = _git("describe", "--always", "--dirty= and changes since")
            return f"{commit}, of {_git('log', '-1', '--format=%cs')}"
    except (OSError, CalledProcessError):
        pass
    return "unknown, as this is no checkout"


def libraries() -> dict[str, str]:
    """The versions of what the project asks for by name, to make chapters and pages."""
    asked = map(Requirement, metadata.requires("lorapower") or ())
    unused = ('"test"', '"cluster"')
    names = {each.name for each in asked if not str(each.marker).endswith(unused)} - {"lorapower"}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}


def runs(env: BuildEnvironment) -> dict[str, dict[str, Any]]:
    """The records of the chapters' runs."""
    paths = chapters(env)
    return {name: json.loads(path.with_suffix(".json").read_text()) for name, path in paths.items()}


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Render the page, if it is one of these."""
    if docname in _TEMPLATES:
        template = Template(source[0], trim_blocks=True, lstrip_blocks=True)
        found = [badge for name in chapters(app.env) for badge in badges(app.env, name).values()]
        source[0] = template.render(
            badges=found,
            env=app.env,
            libraries=libraries,
            metadata=metadata,
            platform=platform,
            revision=revision,
            runs=runs,
            statements=statements,
            title=_title,
            verdict=verdict,
        )


def setup(app: Sphinx) -> None:
    app.connect("source-read", _fill)
    app.connect("html-page-context", _draw)
