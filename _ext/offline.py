"""What pages read from disk could not fetch or save: MathJax, previews and downloads.

Previews are what ``_static/previews.js`` shows: statements, numbered equations, figures and claims,
by anchor, from the written pages, in which numbers and references are resolved. Links are left out:
a preview is no place to go on from. Pictures are named from the book's root.

The download button saves a page's source. Its text lies in a script beside it, which
``_static/download.js`` loads.
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
from sphinx.util.fileutil import copy_asset
from verdicts import SCORECARD

# What browsers ask for: the bundle, its fonts, and the TeX extensions.
_BUNDLE = "tex-chtml.js"
_PARTS = (_BUNDLE, "output/chtml/fonts/woff-v2", "input/tex/extensions")
_SHOWN = "div.proof[id]:not(#proof), div.math[id^='equation-'], figure[id], div.claims[id]"


def _copy_mathjax(folder: Path) -> None:
    package = import_module("sphinx-mathjax-offline")  # no name that `import` would take
    source = Path(package.__path__[0]) / "static" / "mathjax"
    target = folder / "_static" / "mathjax"
    for part in _PARTS:
        # copy_asset puts a file into the folder that it is given, and a folder's content into it.
        copy_asset(source / part, target if part == _BUNDLE else target / part)


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
    _copy_mathjax(folder)
    for docname in (*chapters(app.env), SCORECARD):
        previews.update(_previews((folder / f"{docname}.html").read_text("utf-8"), docname))
    text = f"window.previews = {json.dumps(previews, ensure_ascii=False)};\n"
    (folder / "_static" / "preview-data.js").write_text(text, encoding="utf-8")
    for path in [path for path in (folder / "_sources").rglob("*") if path.is_file()]:
        name, text = (json.dumps(each) for each in (path.name, path.read_text(encoding="utf-8")))
        path.with_name(f"{path.name}.js").write_text(f"save({name}, {text});\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
