"""Make the next chapter or appendix from the template, and list it in the contents.

usage: python tools/new.py 15-name
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NEXT = """\
Made {chapter}, and listed it in _toc.yml. Next:
  make lab: write it; CONTRIBUTING.md has the list of what a chapter needs
  make _build/quick/{chapter}: run it alone
  make book test: once index.md and chapters/answers.md lead to it"""


def new(name: str) -> str:
    """Write the chapter, and say what to do next; exit if it cannot have this name."""
    if not (kind := re.match(r"(?:(\d\d)|[A-Z])-[a-z]+(?:-[a-z]+)*$", name)):
        sys.exit(f"NAME must be a number or a capital, a dash and words, as 15-name; got {name!r}")
    contents = ROOT / "_toc.yml"
    lines = contents.read_text(encoding="utf-8").splitlines(keepends=True)
    entry = r" *- file: chapters/\d\d-" if kind[1] else r" *- file: chapters/[A-Z]-"
    listed = [k for k, line in enumerate(lines) if re.match(entry, line)]
    number = f"{len(listed) + 1:02}" if kind[1] else chr(ord("A") + len(listed))
    if not name.startswith(f"{number}-"):
        sys.exit(f"NAME must begin with {number}-, which is the next; got {name!r}")
    chapter = Path("chapters", f"{name}.ipynb")
    if (ROOT / chapter).exists():
        sys.exit(f"{chapter} exists: choose another NAME, or remove it")
    template = (ROOT / "chapters" / "TEMPLATE.ipynb").read_text(encoding="utf-8")
    (ROOT / chapter).write_text(template.replace("TEMPLATE", name.partition("-")[2]), "utf-8")
    lines.insert(listed[-1] + 1, re.sub(r"chapters/.*", f"chapters/{name}", lines[listed[-1]]))
    contents.write_text("".join(lines), encoding="utf-8")
    return _NEXT.format(chapter=chapter)


if __name__ == "__main__":
    print(new(*sys.argv[1:]))
