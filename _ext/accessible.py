"""What the writers of HTML get wrong for who listens to a page, put right in the written page.

Folded cells are all announced under one name, which is not the text they show. Parameters in lines
of their own make a list of definitions that define nothing. The bibliography is a list without
items. And what unfolds a part of the contents has a picture for a name.
"""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx

_SUBSTITUTES = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    'role="doc-biblioentry"': 'role="listitem"',
}
_PARAMETERS = re.compile(r"<dl>(\s*<dd><em class=\"sig-param\">.*?)</dl>", re.DOTALL)


def mended(body: str) -> str:
    """The HTML of a page's content, without what its writers got wrong."""
    for theirs, ours in _SUBSTITUTES.items():
        body = body.replace(theirs, ours)
    return _PARAMETERS.sub(
        lambda found: f'<ul class="sig-params">{found[1].replace("dd>", "li>")}</ul>', body
    )


def named(contents: BeautifulSoup | str) -> str:
    """The HTML of the contents, in which what unfolds a part is named after it."""
    page = BeautifulSoup(str(contents), "html.parser")
    for summary in page.select("li > details > summary"):
        link = summary.find_previous("a")
        if link is not None:
            summary["aria-label"] = f"Pages of {link.get_text()}"
    return str(page)


def _mend(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    if "body" in context:
        context["body"] = mended(context["body"])
    contents = context["generate_toctree_html"]
    context["generate_toctree_html"] = lambda *given, **options: named(contents(*given, **options))


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", _mend, priority=900)  # once the theme has added its functions
