"""Print how many words the chapters have, and how many names the package offers.

usage: python tools/words.py _build/html
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent


def words(page: Path) -> int:
    """Count the words of a page's text, without code, outputs, mathematics and folded parts."""
    article = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").article
    assert article is not None, page
    for left_out in article.select(".cell, .math, details, .dropdown, pre"):
        left_out.decompose()
    return len(re.findall(r"\S*\w\S*", article.get_text(" ")))


def public(folder: Path) -> int:
    """Count the functions and classes of a package whose path has no underscore."""
    paths = [path for path in folder.rglob("*.py") if "/_" not in str(path.relative_to(ROOT))]
    nodes = [node for path in paths for node in ast.parse(path.read_text("utf-8")).body]
    kinds = ast.FunctionDef | ast.ClassDef
    return sum(isinstance(node, kinds) and not node.name.startswith("_") for node in nodes)


def main() -> None:
    pages = Path(sys.argv[1], "chapters")
    names = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
    counts = {name: words(pages / f"{name}.html") for name in names}
    print("Words:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"Together {sum(counts.values()):,}; public names {public(ROOT / 'lorapower')}.")


if __name__ == "__main__":
    main()
