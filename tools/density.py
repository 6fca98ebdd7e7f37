"""Print how dense the pages of the built book are: a guide for who writes them.

usage: python tools/density.py _build/quick/html

For each page but those on the package: its words of prose, the numbers among 100 of them, figures,
and exercises with a solution. Prose is what paragraphs and lists say, without code, tables,
captions, mathematics, titles of boxes, and names of what references lead to.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from bs4 import BeautifulSoup
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parent.parent
_NO_PROSE = (
    "code, pre, table, figure, .math, .cell, .statement-map, p.admonition-title, a.reference, "
    "a.headerlink"
)
_WORD = re.compile(r"\w+(?:[.,'’-]\w+)*")
_SOLUTION = re.compile("^Solution")


@dataclass
class Density:
    """What a page has; `numbers` are those of its words that begin with a digit."""

    words: int
    numbers: int
    figures: int
    exercises: int

    @property
    def per_100(self) -> float:
        """Numbers among 100 words."""
        return 100 * self.numbers / max(1, self.words)


def measure(html: str) -> Density:
    """The density of a page."""
    article = BeautifulSoup(html, "html.parser").select_one("article")
    assert article is not None
    figures = len(article.select("figure"))
    exercises = len(article.find_all(class_="admonition-title", string=_SOLUTION))
    for part in article.select(_NO_PROSE):
        part.replace_with(" ")
    text = " ".join(part for part in article.strings if part.find_parent(["p", "li"]))
    words = _WORD.findall(text)
    return Density(len(words), sum(word[0].isdigit() for word in words), figures, exercises)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("html", type=Path)
    folder = parser.parse_args().html
    print(f"{'page':32} words  numbers per 100  figures  exercises")
    for name in parse_toc_yaml(ROOT / "_toc.yml"):
        if not name.startswith("api/"):
            page = measure((folder / f"{name}.html").read_text(encoding="utf-8"))
            print(
                f"{name:32} {page.words:5} {page.per_100:16.1f} {page.figures:8}"
                f" {page.exercises:10}"
            )


if __name__ == "__main__":
    main()
