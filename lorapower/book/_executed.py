"""Read what executed chapters recorded: their claims and quotes."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .claims import MIME, Claim

#: Begins the MIME types of what is quoted, as MyST-NB's ``glue`` has it: no front end shows it.
GLUE = "application/papermill.record/"


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims that an executed notebook recorded, in its order."""
    outputs = _outputs(json.loads(Path(path).read_text(encoding="utf-8")))
    return [Claim(**output["data"][MIME]) for output in outputs if MIME in output.get("data", {})]


def read_quotes(notebook: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read what an executed notebook quoted: by name, each in all its forms by MIME type."""
    quotes = {}
    for output in _outputs(notebook):
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
    return format(int(value) if form.endswith("d") else str(value), form)


def _outputs(notebook: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
