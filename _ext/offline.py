"""What pages read from disk could not fetch or save: MathJax, previews and downloads.

Previews are what ``_static/previews.js`` shows: statements, numbered equations, figures and claims,
by anchor, from the written pages, in which numbers and references are resolved. Links are left out:
a preview is no place to go on from. Pictures are named from the book's root.

The download button saves a page's source and, for a chapter, the page as Markdown. Each text lies
in a script beside it, which ``_static/download.js`` loads.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from bs4.filter import SoupStrainer
from markdownify import MarkdownConverter
from overviews import chapters
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset
from verdicts import SCORECARD

# What browsers ask for: the bundle, its fonts, and the TeX extensions.
_BUNDLE = "tex-chtml.js"
_PARTS = (_BUNDLE, "output/chtml/fonts/woff-v2", "input/tex/extensions")
_SHOWN = "div.proof[id]:not(#proof), div.math[id^='equation-'], figure[id], div.claims[id]"
# What a page has for the mouse.
_CONTROLS = "a.headerlink, button, details > summary:first-child, script, style"
# Extra space would make it code or a list.
_EDGES = re.compile(r"^\s+|\s+$")


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


def _write_previews(folder: Path, docnames: Iterable[str]) -> None:
    previews: dict[str, str] = {}
    for docname in docnames:
        previews.update(_previews((folder / f"{docname}.html").read_text("utf-8"), docname))
    text = f"window.previews = {json.dumps(previews, ensure_ascii=False)};\n"
    (folder / "_static" / "preview-data.js").write_text(text, encoding="utf-8")


class _Markdown(MarkdownConverter):
    """Boxes are quoted, mathematics stays TeX, a figure is its caption and what it shows.

    The library's types leave out the methods that are overridden.
    """

    def convert_div(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        kinds = set(element.get_attribute_list("class"))
        if "math" in kinds:
            return self._displayed(element)
        if element.get("role") == "img":
            return f"\n\n*Shown:* {element.get('aria-label', '')}\n\n"
        if "admonition" in kinds:
            return "\n\n" + re.sub("^", "> ", text.strip(), flags=re.MULTILINE) + "\n\n"
        return f"\n\n{text.strip()}\n\n"

    convert_section = convert_figcaption = convert_div

    def convert_span(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        return f"${_tex(element)}$" if "math" in element.get_attribute_list("class") else text

    def convert_p(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        if "admonition-title" in element.get_attribute_list("class"):
            text = f"**{_EDGES.sub('', text)}**"
        return super().convert_p(element, text, parent_tags)  # type: ignore[misc]

    def convert_a(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        if not str(element.get("href")).startswith("http"):
            return text
        return super().convert_a(element, text, parent_tags)  # type: ignore[misc]

    def convert_img(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        return f"\n\n*Shown:* {element.get('alt', '')}\n\n"

    def _displayed(self, element: Tag) -> str:
        number = element.select_one("span.eqno")
        tag = f"\n\\tag{{{number.extract().get_text().strip(' ()#¶')}}}" if number else ""
        return f"\n\n$$\n{_tex(element)}{tag}\n$$\n\n"


def _tex(element: Tag) -> str:
    """The TeX of an element, without the brackets by which MathJax knows it."""
    return re.sub(r"^\\[(\[]|\\[)\]]$", "", element.get_text().strip()).strip()


def markdown(html: str) -> str:
    """What a page says, as Markdown: numbers and references as on the page, no pictures."""
    page = BeautifulSoup(html, "html.parser", parse_only=SoupStrainer("article"))
    for control in page.select(_CONTROLS):
        control.decompose()
    converter = _Markdown(
        heading_style="ATX",
        bullets="-",
        escape_underscores=False,
        code_language_callback=lambda pre: "python" if pre.find_parent(class_="cell_input") else "",
    )
    return re.sub(r"\n{3,}", "\n\n", converter.convert_soup(page)).strip() + "\n"


def _offer_markdown(
    app: Sphinx, docname: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if str(context.get("sourcename", "")).endswith(".ipynb"):
        menus = {menu["label"]: menu for menu in context["header_buttons"]}
        button = {
            "type": "link",
            "url": context["pathto"](f"_sources/{docname}.md", 1),
            "text": ".md",
            "tooltip": "Download as Markdown",
            "icon": "fas fa-file-lines",
            "label": "download-source-button",
        }
        menus["download-buttons"]["buttons"].insert(1, button)


def _write_downloads(folder: Path, docnames: Iterable[str]) -> None:
    sources = folder / "_sources"
    for docname in docnames:
        text = markdown((folder / f"{docname}.html").read_text(encoding="utf-8"))
        (sources / f"{docname}.md").write_text(text, encoding="utf-8")
    for path in [path for path in sources.rglob("*") if path.is_file()]:
        name, text = (json.dumps(each) for each in (path.name, path.read_text(encoding="utf-8")))
        path.with_name(f"{path.name}.js").write_text(f"save({name}, {text});\n", encoding="utf-8")


def _complete(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        folder, docnames = Path(app.outdir), chapters(app.env)
        _copy_mathjax(folder)
        _write_previews(folder, [*docnames, SCORECARD])
        _write_downloads(folder, docnames)


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", _offer_markdown, priority=900)  # after the theme's menu
    app.connect("build-finished", _complete)
