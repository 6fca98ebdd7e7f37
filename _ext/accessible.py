"""What the writers of HTML get wrong for who listens to a page, put right in the written page.

Folded cells are all announced under one name, which is not the text they show. Parameters in lines
of their own make a list of definitions that define nothing. The bibliography is a list without
items. And what unfolds a part of the contents has a picture for a name.
"""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup
from sphinx.application import Sphinx

_SUBSTITUTES = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    'role="doc-biblioentry"': 'role="listitem"',
}
_PARAMETERS = re.compile(r"<dl>(\s*<dd><em class=\"sig-param\">.*?)</dl>", re.DOTALL)


def _mend(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if body := context.get("body"):
        for old, new in _SUBSTITUTES.items():
            body = body.replace(old, new)
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


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", _mend, priority=900)  # once the theme has added its functions
    return {"parallel_read_safe": True, "parallel_write_safe": True}
