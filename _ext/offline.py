"""What pages read from disk could not fetch: MathJax and previews.

Previews are what ``_static/previews.js`` shows: statements, numbered equations, figures and claims,
by anchor, from the written pages, in which numbers and references are resolved. Links are left out:
a preview is no place to go on from. Pictures are named from the book's root.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.filter import SoupStrainer
from overviews import chapters
from sphinx.application import Sphinx
from verdicts import SCORECARD

_SHOWN = "div.proof[id]:not(#proof), div.math[id^='equation-'], figure[id], div.claims[id]"


def _previews(html: str, docname: str) -> Iterator[tuple[str, str]]:
    """The anchors of a page's statements, equations and figures, and their HTML."""
    page = BeautifulSoup(html, "html.parser", parse_only=SoupStrainer("article"))
    for part in page.select(_SHOWN):
        # A copy, as an equation may be within a statement.
        copy = BeautifulSoup(str(part), "html.parser")
        for unwanted in copy.select("a.headerlink, a.verdict, script, style"):
            unwanted.decompose()
        for link in copy.select("a"):
            link.unwrap()
        for picture in copy.select("img[src]:not([src^='data:'])"):
            path = f"{posixpath.dirname(docname)}/{picture['src']}"
            picture["data-src"] = posixpath.normpath(path)
            del picture["src"]
        for named in copy.select("[id]"):
            del named["id"]
        yield str(part["id"]), str(copy)


def _complete(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    folder, previews = Path(app.outdir), dict[str, str]()
    for docname in (*chapters(app.env), SCORECARD):
        previews.update(_previews((folder / f"{docname}.html").read_text("utf-8"), docname))
    text = f"window.previews = {json.dumps(previews, ensure_ascii=False)};\n"
    (folder / "_static" / "preview-data.js").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    # An extension by a name that `import` would not take, which does not say what it is safe for.
    app.connect("build-finished", import_module("sphinx-mathjax-offline").copy_mathjax_files)
    app.connect("build-finished", _complete, priority=700)  # once pages have all their links
    return {"parallel_read_safe": True, "parallel_write_safe": True}
