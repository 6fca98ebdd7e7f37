"""What the download button saves: a page's source and, for a chapter, the page as Markdown.

A page read from disk can neither fetch a file nor save one that it links to. So the text of each
lies in a script beside it, which ``_static/download.js`` loads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from bs4.filter import SoupStrainer
from markdownify import MarkdownConverter
from pages import add_after_build, chapters
from sphinx.application import Sphinx

# What a page has for the mouse.
_CONTROLS = "a.headerlink, button, details > summary:first-child, script, style"
# Extra space would make it code or a list.
_EDGES = re.compile(r"^\s+|\s+$")


class _Markdown(MarkdownConverter):
    """Boxes are quoted, mathematics stays TeX, a figure is its caption and what it shows.

    The library's types leave out the methods that are overridden.
    """

    def convert_div(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        kinds = set(element.get_attribute_list("class"))
        if "math" in kinds:
            return self._displayed(element)
        if "admonition" in kinds:
            return "\n\n" + re.sub("^", "> ", text.strip(), flags=re.MULTILINE) + "\n\n"
        return f"\n\n{text.strip()}\n\n"

    convert_section = convert_div

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

    def convert_figcaption(self, element: Tag, text: str, parent_tags: set[str]) -> str:
        return f"\n\n{text.strip()}\n\n"

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
        heading_style="ATX", bullets="-", escape_underscores=False, code_language_callback=_language
    )
    return re.sub(r"\n{3,}", "\n\n", converter.convert_soup(page)).strip() + "\n"


def _language(pre: Tag) -> str:
    return "python" if pre.find_parent(class_="cell_input") else ""


def _offer_markdown(
    app: Sphinx, docname: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if str(context.get("sourcename", "")).endswith(".ipynb"):
        (menu,) = (each for each in context["header_buttons"] if each["label"] == "download-buttons")
        button = {
            "type": "link",
            "url": context["pathto"](f"_sources/{docname}.md", 1),
            "text": ".md",
            "tooltip": "Download as Markdown",
            "icon": "fas fa-file-lines",
            "label": "download-source-button",
        }
        menu["buttons"].insert(1, button)


def _write(app: Sphinx, folder: Path) -> None:
    sources = folder / "_sources"
    for docname in chapters(app.env):
        text = markdown((folder / f"{docname}.html").read_text(encoding="utf-8"))
        (sources / f"{docname}.md").write_text(text, encoding="utf-8")
    for path in [path for path in sources.rglob("*") if path.is_file()]:
        name, text = (json.dumps(each) for each in (path.name, path.read_text(encoding="utf-8")))
        path.with_name(f"{path.name}.js").write_text(f"save({name}, {text});\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", _offer_markdown, priority=900)  # after the theme's menu
    add_after_build(app, _write)
