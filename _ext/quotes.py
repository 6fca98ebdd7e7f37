"""The role ``{quoted}``: what a chapter quotes of its run, on a page that is no chapter.

``{quoted}`06-rank::plain_4:.0f` `` is the number that the executed chapter ``06-rank`` glued as
``plain_4``, in the format behind the second colon; what was glued as Markdown has no format. It is
what ``{glue:text}`` and ``{glue:md}`` are inside the chapter: MyST-NB takes only the former across
pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from docutils import nodes
from docutils.nodes import Node, system_message
from executed import glued
from myst_nb.core.variables import format_plain_text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole
from sphinx.util.typing import ExtensionMetadata

_QUOTED = re.compile(r"(?P<chapter>[\w-]+)::(?P<name>\w+)(?::(?P<format>.+))?")


class Quoted(SphinxRole):
    """A number or a text of another page's run."""

    def run(self) -> tuple[list[Node], list[system_message]]:
        try:
            return self._nodes()
        except (OSError, LookupError, ValueError, SyntaxError) as error:
            message = self.inliner.reporter.error(
                f"{{quoted}}`{self.text}` quotes nothing: {error!r}", line=self.lineno
            )
            return [], [message]

    def _nodes(self) -> tuple[list[Node], list[system_message]]:
        parts = _QUOTED.fullmatch(self.text)
        if parts is None:
            raise ValueError("write chapter::name, or chapter::name:format")
        docname = f"chapters/{parts['chapter']}"
        self.env.note_dependency(self.env.doc2path(docname))
        forms = glued(Path(self.env.doc2path(docname)))[parts["name"]]
        if "text/markdown" not in forms:
            text = format_plain_text(forms["text/plain"], parts["format"] or "s")
            return [nodes.inline(text, text, classes=["pasted-text"])], []
        if parts["format"]:
            raise ValueError("it is Markdown, and takes no format")
        inline = nodes.inline(classes=["pasted-text"])
        here = self.inliner
        memo = SimpleNamespace(
            reporter=here.reporter, document=here.document, language=here.language
        )
        parsed, messages = here.parse(forms["text/markdown"], self.lineno, memo, inline)
        inline += parsed
        return [inline], messages


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_role("quoted", Quoted())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
