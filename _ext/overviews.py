"""Directives of pages on the whole book, which are read after the chapters.

``scorecard``: every claim that the executed chapters recorded, in folded tables; what is proved
first, then what is observed.

``statements``: a table by name of all that the chapters state. ``statement-map``: which rest on
which, with a row for each chapter, and lines from each statement down to those that rest on it.
Boxes are links; while one is pointed at, its lines stand out.

``colophon``: from what, with what and on what the book was made, by the records of runs beside the
chapters, ``NN-name.json``. Versions are those of the environment that builds, which ran them.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import metadata
from itertools import groupby
from pathlib import Path

from docutils import nodes
from packaging.requirements import Requirement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

import lorapower
from lorapower.book.claims import Claim, read

# Each part's title, and what its claims were to be; by whether they belong to observations.
_PARTS = {False: ("Theorems", "Predicted"), True: ("Observations", "Required")}
_PREMISES = ("ass-", "def-")
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
# Extras that neither chapters nor pages are made with.
_UNUSED = ('"test"', '"cluster"')


def chapters(env: BuildEnvironment) -> dict[str, Path]:
    """The executed notebooks, by page, in the order of the book."""
    paths = {docname: Path(env.doc2path(docname)) for docname in env.config.external_site_map}
    return {docname: path for docname, path in paths.items() if path.suffix == ".ipynb"}


def _title(env: BuildEnvironment, docname: str) -> str:
    """The title of a page that was read, up to a colon."""
    return env.titles[docname].astext().partition(":")[0]


def _table(
    directive: SphinxDirective,
    rows: Iterable[tuple[str, ...]],
    kind: str,
    heads: tuple[str, ...] = (),
) -> list[nodes.Node]:
    """A table of the classes in `kind`, on the page of `directive`; cells are Markdown."""
    lines = [f":class: {kind}", ":widths: auto", f":header-rows: {int(bool(heads))}", ""]
    for first, *rest in [heads, *rows] if heads else rows:
        lines += [f"* - {first}", *(f"  - {cell}" for cell in rest)]
    return directive.parse_text_to_nodes("\n".join(["```{list-table}", *lines, "```"]))


def count(claims: Sequence[Claim]) -> str:
    """How many claims there are, and how many of them fail."""
    failing = sum(not claim.holds for claim in claims)
    if len(claims) == 1:
        return f"One claim, it {'fails' if failing else 'holds'}"
    return f"{len(claims)} claims, {f'{failing} fail' if failing else 'all hold'}"


def total(claims: Sequence[Claim]) -> str:
    """The same, and how many there are of either kind."""
    seen = sum(claim.observed for claim in claims)
    return f"{count(claims)}: {len(claims) - seen} of theorems, {seen} of observations."


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
                    section = self._section(f"{name} {page}", _title(self.env, docname))
                    heads = ("Verdict", "Claim", "Measured", expected)
                    kind = f"scorecard {expected.lower()}"
                    section += nodes.admonition(
                        "",
                        nodes.title("", count(chosen)),
                        *_table(self, map(_cells, chosen), kind, heads),
                        classes=["dropdown"],
                    )
                    part += section
            if len(part) > 1:
                yield part

    def _section(self, name: str, heading: str) -> nodes.section:
        parsed, messages = self.state.inline_text(heading, self.lineno)
        section = nodes.section(ids=[nodes.make_id(name)])
        section += nodes.title("", "", *parsed, *messages)
        return section


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
                f"{{doc}}`{_title(self.env, each.docname)} </{each.docname}>`",
                ", ".join(f"{{prf:ref}}`{label}`" for label in each.uses) or "–",
                str(each.checks or "–"),
            )
            for each in sorted(statements(self.env), key=lambda each: each.name.lower())
        ]
        heads = ("Name", "Statement", "Chapter", "Rests on", "Checks")
        return _table(self, rows, "statements", heads)


class statement_map(nodes.General, nodes.Element):  # noqa: N801 - as docutils names its nodes
    """Stands for the map until all statements have their numbers."""


class StatementMap(SphinxDirective):
    """A drawing of all statements."""

    def run(self) -> list[nodes.Node]:
        return [statement_map()]


def _visit(self: HTML5Translator, node: statement_map) -> None:
    """Write the map as SVG."""
    env, builder = self.builder.env, self.builder
    shown = [each for each in statements(env) if each.kind in _SHORT]
    places: Places = {}
    rows, heads, boxes = 0, [], []
    for docname, group in groupby(shown, lambda each: each.docname):
        heads.append(_text(0, rows * _RISE + 20, _title(env, docname), "head"))
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


def _git(root: Path, *words: str) -> str:
    git = ["git", "-C", str(root), *words]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def revision(root: Path) -> str:
    """The revision of the checkout at `root`, and whether files differ from it."""
    try:
        # A copy may lie in somebody else's checkout.
        if not _git(root, "rev-parse", "--show-prefix"):
            commit = _git(root, "describe", "--always", "--dirty= and changes since")
            return f"{commit}, of {_git(root, 'log', '-1', '--format=%cs')}"
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown, as this is no checkout"


def libraries() -> dict[str, str]:
    """The versions of what the project asks for by name."""
    asked = map(Requirement, metadata.requires("lorapower") or ())
    names = {each.name for each in asked if not str(each.marker).endswith(_UNUSED)} - {"lorapower"}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}


class Colophon(SphinxDirective):
    """A list of what made the book, and tables of chapters and of libraries."""

    def run(self) -> list[nodes.Node]:
        paths = chapters(self.env)
        runs = {
            name: json.loads(path.with_suffix(".json").read_text()) for name, path in paths.items()
        }
        root = Path(lorapower.__file__).resolve().parents[1]
        facts = {
            "Version": f"{metadata.version('lorapower')}, revision {revision(root)}",
            "Profile": _list(runs, "profile"),
            "Machine": _list(runs, "machine"),
            "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        }
        seconds = {f"{{doc}}`/{name}`": f"{run['seconds']:.0f}" for name, run in runs.items()}
        return [
            *_table(self, facts.items(), "colophon"),
            *_table(self, seconds.items(), "colophon", ("Chapter", "Seconds")),
            *_table(self, libraries().items(), "colophon", ("Library", "Version")),
        ]


def _list(runs: dict[str, dict[str, str]], key: str) -> str:
    return "; ".join(dict.fromkeys(run[key] for run in runs.values()))


def setup(app: Sphinx) -> None:
    app.add_directive("scorecard", Scorecard)
    app.add_node(statement_map, html=(_visit, None))
    app.add_directive("statement-map", StatementMap)
    app.add_directive("statements", Statements)
    app.add_directive("colophon", Colophon)
