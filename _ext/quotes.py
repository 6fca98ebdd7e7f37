"""The roles ``{eval}`` and ``{quoted}``: what chapters quote of their runs.

In the chapter ``07-training``, ``{eval}`book.quoted["plain_4:.0f"]` `` is the number that it glued
as ``plain_4``, in the format behind the colon; what was glued as Markdown has no format. JupyterLab
asks the kernel for it. On any other page it is ``{quoted}`07-training::plain_4:.0f` ``.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

from lorapower.book._executed import formatted, read_quotes

_NAMED = r"(?P<name>\w+)(?::(?P<format>[^\"]+))?"
_HERE = re.compile(rf'book\.quoted\["{_NAMED}"\]')
_ELSEWHERE = re.compile(rf"(?P<chapter>[\w-]+)::{_NAMED}")


@cache
def _quotes(path: str) -> dict[str, dict[str, Any]]:
    return read_quotes(json.loads(Path(path).read_text(encoding="utf-8")))


class Quoted(SphinxRole):
    """A number or a text of a run, of this page's or another's."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            return [self._node()], []
        except (OSError, LookupError, ValueError, SyntaxError) as error:
            message = self.inliner.reporter.error(
                f"{{{self.name}}}`{self.text}` quotes nothing: {error!r}", line=self.lineno
            )
            return [], [message]

    def _node(self) -> nodes.Node:
        if parts := _HERE.fullmatch(self.text):
            docname = self.env.docname
        elif parts := _ELSEWHERE.fullmatch(self.text):
            docname = f"chapters/{parts['chapter']}"
        else:
            raise ValueError('write book.quoted["name"], or chapter::name; then :format')
        forms = _quotes(self.env.doc2path(docname))[parts["name"]]
        if not (text := forms.get("text/markdown")):
            text = formatted(forms["text/plain"], parts["format"] or "")
        elif parts["format"]:
            raise ValueError("it is Markdown, and takes no format")
        elif text.startswith("$"):
            return nodes.math("", text.strip("$"))
        return nodes.inline("", text, classes=["pasted-text"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("eval", Quoted(), override=True)  # MyST-NB's own asks a kernel
    app.add_role("quoted", Quoted())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
