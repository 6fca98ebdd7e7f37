"""Read what executed chapters recorded: their claims and quotes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .claims import MIME, Claim


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


def _outputs(notebook: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
