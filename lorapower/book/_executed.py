"""Read what executed chapters recorded, their claims and quotes, and finish what papermill ran."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import _run
from .claims import MIME, Claim

#: Begins the MIME types of what is quoted, as MyST-NB's ``glue`` has it: no front end shows it.
GLUE = "application/papermill.record/"
#: A name in a text, and behind a colon the format of a number; and how a chapter quotes it.
NAMED = r"(?P<name>\w+)(?::(?P<format>[^\"]+))?"
QUOTED = rf'book\.quoted\["{NAMED}"\]'


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims that an executed notebook recorded, in its order."""
    return claims_of(json.loads(Path(path).read_text(encoding="utf-8"))["cells"])


def claims_of(cells: Iterable[Mapping[str, Any]]) -> list[Claim]:
    """Read the claims that these cells recorded."""
    bundles = (output.get("data", {}) for output in _outputs(cells))
    return [Claim(**bundle[MIME]) for bundle in bundles if MIME in bundle]


def read_quotes(notebook: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read what an executed notebook quoted: by name, each in all its forms by MIME type."""
    quotes = {}
    for output in _outputs(notebook["cells"]):
        if about := output.get("metadata", {}).get("scrapbook"):
            prefix, forms = about.get("mime_prefix", ""), output["data"].items()
            quotes[about["name"]] = {kind.removeprefix(prefix): form for kind, form in forms}
    return quotes


def formatted(text: str, form: str) -> str:
    """Format the number or the text that ``text`` is the ``repr`` of, as ``form`` says."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # such as nan
        value = text
    if form.endswith(("e", "f", "g", "%")):
        return format(float(value), form)
    if form.endswith("d") and value != "nan":  # of nothing, at other parameters than the book's
        return format(int(value), form)
    return format(str(value), "" if form.endswith("d") else form)


def fill(text: str, quotes: Mapping[str, Mapping[str, Any]]) -> str:
    """Put what was quoted into Markdown, and an ellipsis for what is not there."""

    def quoted(found: re.Match[str]) -> str:
        forms = quotes.get(found["name"], {"text/markdown": "…"})
        markdown = forms.get("text/markdown")
        return markdown or formatted(forms["text/plain"], found["format"] or "")

    text = re.sub(rf"\{{eval\}}`{QUOTED}`", quoted, text)
    return re.sub(r"\{quoted\}`[^`]+`", "…", text)


def finish(notebook: Any) -> None:
    """Write numbers into the text of an executed chapter, and its parameters above it, in place.

    The cell of a claim that fails ends in an error, for which papermill raises its own. Other
    notebooks stay as they are.
    """
    from nbformat.v4 import new_markdown_cell, new_output

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any("from lorapower import book" in cell.source for cell in cells):
        return
    quotes = read_quotes(notebook)
    claims = [(cell, claim) for cell in cells for claim in claims_of([cell])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = fill(cell.source, quotes)
    for cell, claim in claims:
        if claim.fails:
            error = {"ename": "ClaimError", "evalue": claim.statement, "traceback": [claim.line]}
            cell.outputs.append(new_output("error", **error))
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    text = _run.say(given) if given else "the book's parameters"
    about = f"*Run with {text}. Numbers in the text are of this run, and findings of the book's.*"
    # Papermill expects of each cell what it knows of those that it began with.
    known = notebook.cells[0].metadata.get("papermill", {})
    first = new_markdown_cell(about, metadata={"papermill": known, "tags": []})
    notebook.cells.insert(0, first)


def _outputs(cells: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (output for cell in cells for output in cell.get("outputs", ()))
