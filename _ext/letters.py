"""Numbers on pages that Sphinx does not number.

Their figures, statements and equations count from one on each page. The page ``chapters/A-name`` is
an appendix: its title is "A. Title", its first theorem Theorem A.1, and its sections have no
numbers.

A text names a page by the number in its file's name: ``Chapter {chapter}`07-training` `` links to
Chapter 7, and ``Appendix {chapter}`A-networks` `` to Appendix A.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.roles import XRefRole
from sphinx_proof.domain import ProofDomain

_APPENDIX = re.compile(r"chapters/([A-Z])-")


def _letter(docname: str) -> tuple[Any, ...]:
    """What stands before the numbers of a page: the letter of an appendix, or nothing."""
    return found.groups() if (found := _APPENDIX.match(docname)) else ()


def _count_from_one(app: Sphinx, env: BuildEnvironment) -> None:
    """Sphinx counts through all pages without a number."""
    for docname, kinds in env.toc_fignumbers.items():
        for numbers in kinds.values():
            if numbers and {len(number) for number in numbers.values()} == {1}:
                before = min(numbers.values())[0] - 1
                letter = _letter(docname)
                numbers.update({name: (*letter, at - before) for name, (at,) in numbers.items()})


def _number_titles(app: Sphinx, env: BuildEnvironment) -> None:
    for docname, contents in env.tocs.items():
        if letter := _letter(docname):
            title, *sections = contents.findall(nodes.reference)
            title["secnumber"] = env.titles[docname]["secnumber"] = letter
            env.toc_secnumbers[docname] = {part["anchorname"]: () for part in sections}
            env.toc_secnumbers[docname][""] = letter


class Chapter(XRefRole):
    """Link to a page as the role ``doc`` does, by its number or letter."""

    def process_link(
        self,
        env: BuildEnvironment,
        refnode: nodes.Element,
        has_explicit_title: bool,
        title: str,
        target: str,
    ) -> tuple[str, str]:
        refnode.attributes.update({"refdomain": "std", "reftype": "doc", "refexplicit": True})
        return target.rpartition("/")[2].partition("-")[0].lstrip("0"), target


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("chapter", Chapter(warn_dangling=True, innernodeclass=nodes.inline))
    # Chapters are counted through all parts, and statements by page. Neither extension says that
    # processes may share the reading: the one works once all is read, the other's domain is empty.
    app.setup_extension("sphinx_multitoc_numbering")
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    ProofDomain.merge_domaindata = lambda *_: None
    app.connect("env-check-consistency", _count_from_one)
    app.connect("env-check-consistency", _number_titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
