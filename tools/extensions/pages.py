"""Numbers of pages, and links between them by these.

On pages that Sphinx does not number figures, statements and equations count from one. The page
``chapters/A-name`` is an appendix: its title is "A. Title", its first theorem Theorem A.1, and its
sections have no numbers. A text names a page by the number in its file's name: ``Chapter
{chapter}`07-training` `` links to Chapter 7, and ``Appendix {chapter}`A-networks` `` to Appendix A.

Mathematics is a box before which, and behind which, a line may end: on written pages it keeps the
punctuation that belongs to it.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxRole

_APPENDIX = re.compile(r"chapters/([A-Z])-")
_MATHEMATICS = r'<span class="math notranslate nohighlight">[^<]*</span>'
_GLUED = re.compile(rf"[(\[“‘]?{_MATHEMATICS}(?:[,.;:!?…%’”)\]/–-]+|\w+)|[(\[“‘]{_MATHEMATICS}")


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


def _glue(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    if body := context.get("body"):
        context["body"] = _GLUED.sub(r'<span class="text-nowrap">\g<0></span>', body)


def setup(app: Sphinx) -> None:
    app.add_role("chapter", Chapter())
    app.setup_extension("sphinx_multitoc_numbering")  # counts chapters through all parts
    app.connect("env-check-consistency", _number)
    # An extension by a name that `import` would not take.
    app.connect("build-finished", import_module("sphinx-mathjax-offline").copy_mathjax_files)
    app.connect("html-page-context", _glue)
