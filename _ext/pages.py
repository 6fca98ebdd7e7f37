"""What is put right in written pages, and what pages read from disk could not fetch.

For who listens to a page: folded cells are all announced under one name, which is not the text they
show; parameters in lines of their own make a list of definitions that define nothing; the
bibliography is a list without items; and what unfolds a part of the contents has a picture for a
name. For who looks at it: mathematics is a box before which, and behind which, a line may end, but
it keeps the punctuation that belongs to it.

Previews are what ``_static/previews.js`` shows: statements, numbered equations, figures and claims,
by anchor, from the written pages, in which numbers and references are resolved. Links are left out:
a preview is no place to go on from. Pictures are named from the book's root.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from bs4.filter import SoupStrainer
from executed import SCORECARD
from overviews import chapters
from sphinx.application import Sphinx

_SUBSTITUTES = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    'role="doc-biblioentry"': 'role="listitem"',
}
_MATHEMATICS = r'<span class="math notranslate nohighlight">[^<]*</span>'
_GLUED = re.compile(rf"[(\[“‘]?{_MATHEMATICS}(?:[,.;:!?…%’”)\]/–-]+|\w+)|[(\[“‘]{_MATHEMATICS}")
_PARAMETERS = re.compile(r"<dl>(\s*<dd><em class=\"sig-param\">.*?)</dl>", re.DOTALL)
_SHOWN = "div.proof[id]:not(#proof), div.math[id^='equation-'], figure[id], div.claims[id]"


def _mend(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if body := context.get("body"):
        for old, new in _SUBSTITUTES.items():
            body = body.replace(old, new)
        body = _GLUED.sub(r'<span class="text-nowrap">\g<0></span>', body)
        context["body"] = _PARAMETERS.sub(
            lambda match: f'<ul class="sig-params">{match[1].replace("dd>", "li>")}</ul>', body
        )
    contents = context["generate_toctree_html"]

    def name_folds(*given: Any, **options: Any) -> str:
        page = BeautifulSoup(str(contents(*given, **options)), "html.parser")
        for summary in page.select("li > details > summary"):
            if link := summary.find_previous("a"):
                summary["aria-label"] = f"Pages of {link.get_text()}"
        return str(page)

    context["generate_toctree_html"] = name_folds


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
    app.connect("html-page-context", _mend, priority=900)  # once the theme has added its functions
    return {"parallel_read_safe": True, "parallel_write_safe": True}
