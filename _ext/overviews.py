"""Fill the pages on the whole book, which are read after the chapters.

They are templates of what this module finds: claims, statements, and the records of runs beside the
chapters, ``NN-name.json``. Versions are those of the environment that builds, which ran them.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any

from docutils import nodes
from executed import badges, verdict
from jinja2 import Template
from packaging.requirements import Requirement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import lorapower
from lorapower.book._executed import read_claims

_TEMPLATES = [f"chapters/{name}" for name in ("built", "scorecard", "statements")]
_ROOT = Path(lorapower.__file__).resolve().parents[1]


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
    git = ["git", "-C", str(_ROOT)]
    try:
        at = check_output([*git, "log", "-1", "--format=%h of %cs"], stderr=DEVNULL, text=True)
        changes = check_output([*git, "status", "-s", "-uno"], stderr=DEVNULL)
    except (OSError, CalledProcessError):
        return "unknown, as this is no checkout"
    return at.strip() + (" and changes since" if changes else "")


def libraries() -> dict[str, str]:
    """The versions of what the project asks for by name, to make chapters and pages."""
    asked = map(Requirement, metadata.requires("lorapower") or ())
    names = {each.name for each in asked if not str(each.marker).endswith('"test"')} - {"lorapower"}
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


def _leave_out(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Leave these pages out among those that several processes read."""
    docnames[:] = [docname for docname in docnames if docname not in _TEMPLATES]


def _read_last(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Read these pages, once all others are read and before anything counts what they hold."""
    present = [docname for docname in _TEMPLATES if docname in env.found_docs]
    for docname in present:
        app.builder.read_doc(docname)
    return present


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-before-read-docs", _leave_out)
    app.connect("env-updated", _read_last, priority=100)
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
