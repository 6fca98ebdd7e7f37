"""The roles ``{eval}`` and ``{quoted}``, and the directive ``{printed}``: what chapters quote.

In the chapter ``07-training``, ``{eval}`book.quoted["plain_4:.0f"]` `` is the number that it glued
as ``plain_4``, in the format behind the colon; what was glued as Markdown has no format. JupyterLab
asks the kernel for it. On any other page it is ``{quoted}`07-training::plain_4:.0f` ``.

``{printed}`` shows what a command printed, a text that a chapter glued: all of it, or those of its
lines that have one of the parts below::

    :::{printed} 15-planning::plan-output
    Verdict
    Estimate
    :::
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from docutils import nodes
from docutils.nodes import Node, system_message
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from lorapower.book._executed import formatted, read_quotes

_NAMED = r"(?P<name>\w+)(?::(?P<format>[^\"]+))?"
_HERE = re.compile(rf'book\.quoted\["{_NAMED}"\]')
_ELSEWHERE = re.compile(rf"(?P<chapter>[\w-]+)::{_NAMED}")


@lru_cache
def _quotes(path: str) -> dict[str, dict[str, Any]]:
    return read_quotes(json.loads(Path(path).read_text(encoding="utf-8")))


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
        else:
            raise ValueError('write book.quoted["name"], or chapter::name; then :format')
        forms = _quotes(self.env.doc2path(docname))[parts["name"]]
        if "text/markdown" not in forms:
            text = formatted(forms["text/plain"], parts["format"] or "")
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


class Printed(SphinxDirective):
    """What a command printed in a chapter's run, or some lines of it."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[Node]:
        chapter, _, name = self.arguments[0].partition("::")
        try:
            quoted = _quotes(self.env.doc2path(f"chapters/{chapter}"))[name]["text/plain"]
            text = choose(formatted(quoted, ""), list(self.content))
        except (OSError, LookupError) as error:
            message = f"{{{self.name}}} {self.arguments[0]} shows nothing: {error!r}"
            raise self.error(message) from error
        # A terminal's output is no code to copy, and has the colours of none.
        block = nodes.literal_block(text, text, language="text", classes=["output", "terminal"])
        self.set_source_info(block)
        return [block]


def choose(text: str, parts: list[str]) -> str:
    """The lines of a text that hold one of some parts, each of which must be in one, or all lines.

    An indented line goes with the one above, which it continues. An ellipsis stands for what is
    left out between two lines.
    """
    if missing := [part for part in parts if part not in text]:
        raise LookupError(*missing)
    chosen: list[str] = []
    kept = not parts
    for line in text.strip("\n").splitlines():
        if parts and not line.startswith(" "):
            kept = any(part in line for part in parts)
        if kept:
            chosen.append(line)
        elif chosen and chosen[-1] != "…":
            chosen.append("…")
    return "\n".join(chosen).removesuffix("\n…")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("eval", Quoted(), override=True)  # MyST-NB's own asks a kernel
    app.add_role("quoted", Quoted())
    app.add_directive("printed", Printed)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
