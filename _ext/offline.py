"""What pages read from disk could not fetch: MathJax, and what ``_static/previews.js`` shows.

Of MathJax's distribution, which the package ``sphinx-mathjax-offline`` carries, only the files that
a browser asks for are copied: the bundle, its fonts, and the TeX extensions.

Previews are statements, numbered equations and figures, by anchor, taken from the written pages, in
which numbers and references are resolved. Links are left out: a preview is no place to go on from.
Where a picture is, is said from the book's root, as previews open on any page.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.filter import SoupStrainer
from pages import add_after_build, chapters
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.fileutil import copy_asset

_BUNDLE = "tex-chtml.js"
_PARTS = (_BUNDLE, "output/chtml/fonts/woff-v2", "input/tex/extensions")
_SHOWN = "div.proof.admonition[id]:not(#proof), div.math[id^='equation-'], figure[id]"


def _point_to_copy(app: Sphinx, config: Config) -> None:
    config["mathjax_path"] = f"mathjax/{_BUNDLE}"


def _copy_mathjax(app: Sphinx, folder: Path) -> None:
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
        for unwanted in copy.select("a.headerlink, script, style"):
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


def _write_previews(app: Sphinx, folder: Path) -> None:
    previews: dict[str, str] = {}
    for docname in chapters(app.env):
        previews.update(_previews((folder / f"{docname}.html").read_text("utf-8"), docname))
    text = f"window.previews = {json.dumps(previews, ensure_ascii=False)};\n"
    (folder / "_static" / "preview-data.js").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("config-inited", _point_to_copy)
    add_after_build(app, _copy_mathjax)
    add_after_build(app, _write_previews)
