"""What ``_static/previews.js`` shows: statements, numbered equations and figures, by anchor.

Taken from the written pages, in which numbers and references are resolved. Links are left out: a
preview is no place to go on from. Where a picture is, is said from the book's root, as previews
open on any page.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.filter import SoupStrainer
from pages import chapters
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

_BOXES = "div.proof.admonition[id]:not(#proof)"
_EQUATIONS = "div.math[id^='equation-']"
_FIGURES = "figure[id]"


def previews(html: str, docname: str) -> Iterator[tuple[str, str]]:
    """The anchors of a page's statements, equations and figures, and their HTML."""
    page = BeautifulSoup(html, "html.parser", parse_only=SoupStrainer("article"))
    for part in page.select(f"{_BOXES}, {_EQUATIONS}, {_FIGURES}"):
        anchor = str(part["id"])
        # A copy, as an equation may be within a statement.
        copy = BeautifulSoup(str(part), "html.parser")
        for link in copy.select("a"):
            if "headerlink" in link.get_attribute_list("class"):
                link.decompose()
            else:
                link.unwrap()
        for own in copy.select("script, style"):
            own.decompose()
        for picture in copy.select("img[src]"):
            source = str(picture["src"])
            if not source.startswith("data:"):
                picture["data-src"] = posixpath.normpath(f"{posixpath.dirname(docname)}/{source}")
                del picture["src"]
        for named in copy.select("[id]"):
            del named["id"]
        yield anchor, str(copy)


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    found: dict[str, str] = {}
    for docname in chapters(app.env):
        html = (folder / f"{docname}.html").read_text(encoding="utf-8")
        found.update(previews(html, docname))
    text = f"window.previews = {json.dumps(found, ensure_ascii=False)};\n"
    (folder / "_static" / "preview-data.js").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
