"""Numbers of pages, what is put right in written ones, and what those read from disk cannot fetch.

On pages that Sphinx does not number figures, statements and equations count from one. The page
``chapters/A-name`` is an appendix: its title is "A. Title", its first theorem Theorem A.1, and its
sections have no numbers. A text names a page by the number in its file's name: ``Chapter
{chapter}`07-training` `` links to Chapter 7, and ``Appendix {chapter}`A-networks` `` to Appendix A.

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
from docutils import nodes
from executed import SCORECARD, chapters
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole
from sphinx_proof.domain import ProofDomain

_APPENDIX = re.compile(r"chapters/([A-Z])-")
_SUBSTITUTES = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    'role="doc-biblioentry"': 'role="listitem"',
}
_MATHEMATICS = r'<span class="math notranslate nohighlight">[^<]*</span>'
_GLUED = re.compile(rf"[(\[“‘]?{_MATHEMATICS}(?:[,.;:!?…%’”)\]/–-]+|\w+)|[(\[“‘]{_MATHEMATICS}")
_PARAMETERS = re.compile(r"<dl>(\s*<dd><em class=\"sig-param\">.*?)</dl>", re.DOTALL)
_SHOWN = "div.proof[id]:not(#proof), div.math[id^='equation-'], figure[id], div.claims[id]"


class Chapter(SphinxRole):
    """A link to a page as the role ``doc`` makes it, by its number or letter."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        number = self.text.rpartition("/")[2].partition("-")[0].lstrip("0")
        link = pending_xref("", nodes.inline("", number), refdomain="std", reftype="doc")
        link.attributes |= {"reftarget": self.text, "refdoc": self.env.docname}
        link.attributes |= {"refexplicit": True, "refwarn": True}
        self.set_source_info(link)
        return [link], []


def _number(app: Sphinx, env: BuildEnvironment) -> None:
    """Number appendices by letters, and what is on pages without a number from one."""
    for docname, contents in env.tocs.items():
        appendix = _APPENDIX.match(docname)
        letter: tuple[Any, ...] = appendix.groups() if appendix else ()
        # Sphinx counts through all pages without a number.
        for numbers in env.toc_fignumbers.get(docname, {}).values():
            if numbers and {len(number) for number in numbers.values()} == {1}:
                before = min(numbers.values())[0] - 1
                numbers.update({name: (*letter, at - before) for name, (at,) in numbers.items()})
        if letter:
            title, *sections = contents.findall(nodes.reference)
            title["secnumber"] = env.titles[docname]["secnumber"] = letter
            env.toc_secnumbers[docname] = {part["anchorname"]: () for part in sections}
            env.toc_secnumbers[docname][""] = letter


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
            path = f"{posixpath.dirname(docname)}/{picture.attrs.pop('src')}"
            picture["data-src"] = posixpath.normpath(path)
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
    app.add_role("chapter", Chapter())
    # Chapters are counted through all parts, and statements by page. Neither extension says that
    # processes may share the reading: the one works once all is read, the other's domain is empty.
    app.setup_extension("sphinx_multitoc_numbering")
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    ProofDomain.merge_domaindata = lambda *_: None
    app.connect("env-check-consistency", _number)
    # An extension by a name that `import` would not take, which does not say what it is safe for.
    app.connect("build-finished", import_module("sphinx-mathjax-offline").copy_mathjax_files)
    app.connect("build-finished", _complete, priority=700)  # once pages have all their links
    app.connect("html-page-context", _mend, priority=900)  # once the theme has added its functions
    return {"parallel_read_safe": True, "parallel_write_safe": True}
