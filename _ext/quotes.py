"""The roles ``{eval}`` and ``{quoted}``: what a chapter quotes of its run.

In the chapter ``06-training``, ``{eval}`book.quoted["plain_4:.0f"]` `` is the number that it glued
as ``plain_4``, in the format behind the colon; what was glued as Markdown has no format. JupyterLab
asks the kernel for it. On any other page it is ``{quoted}`06-training::plain_4:.0f` ``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import nbformat
from docutils import nodes
from docutils.nodes import Node, system_message
from myst_nb.core.variables import format_plain_text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

from lorapower.book.chapter import read_quotes

_NAMED = r"(?P<name>\w+)(?::(?P<format>[^\"]+))?"
_HERE = re.compile(rf'book\.quoted\["{_NAMED}"\]')
_ELSEWHERE = re.compile(rf"(?P<chapter>[\w-]+)::{_NAMED}")


@lru_cache
def _quotes(path: str) -> dict[str, dict[str, Any]]:
    return read_quotes(nbformat.read(path, as_version=4))


class Quoted(SphinxRole):
    """A number or a text of a run, of this page's or another's."""

    def run(self) -> tuple[list[Node], list[system_message]]:
        try:
            return self._nodes()
        except (OSError, LookupError, ValueError, SyntaxError) as error:
            message = self.inliner.reporter.error(
                f"{{{self.name}}}`{self.text}` quotes nothing: {error!r}", line=self.lineno
            )
            return [], [message]

    def _nodes(self) -> tuple[list[Node], list[system_message]]:
        if parts := _HERE.fullmatch(self.text):
            docname = self.env.docname
        elif parts := _ELSEWHERE.fullmatch(self.text):
            docname = f"chapters/{parts['chapter']}"
            self.env.note_dependency(self.env.doc2path(docname))
        else:
            raise ValueError('write book.quoted["name"], or chapter::name; then :format')
        forms = _quotes(self.env.doc2path(docname))[parts["name"]]
        if "text/markdown" not in forms:
            text = format_plain_text(forms["text/plain"], parts["format"] or "s")
            return [nodes.inline(text, text, classes=["pasted-text"])], []
        if parts["format"]:
            raise ValueError("it is Markdown, and takes no format")
        inline, here = nodes.inline(classes=["pasted-text"]), self.inliner
        memo = SimpleNamespace(
            reporter=here.reporter, document=here.document, language=here.language
        )
        parsed, messages = here.parse(forms["text/markdown"], self.lineno, memo, inline)
        inline += parsed
        return [inline], messages


def setup(app: Sphinx) -> None:
    app.add_role("eval", Quoted(), override=True)  # MyST-NB's own asks a kernel
    app.add_role("quoted", Quoted())
