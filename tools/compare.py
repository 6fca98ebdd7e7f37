"""Compare what a later build of the book claims and quotes with what an earlier one did.

usage: python tools/compare.py OLD NEW

Each is a folder of executed chapters, or one of them. Prints what has other numbers, is gone, new
or failing, and how much is equal. Fails if a claim of the later build does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import shorten

from lorapower.book._executed import read_claims, read_quotes


def read(build: Path) -> dict[str, str]:
    """Read what a build claims and quotes, by chapter and by what names it there."""
    said: dict[str, str] = {}
    paths = sorted(build.glob("*.ipynb")) if build.is_dir() else [build]
    for path in (path for path in paths if "." not in path.stem):  # others did not finish
        for claim in read_claims(path):
            name = f"{path.stem}: {claim.label}: {claim.statement}"
            while name in said:
                name += " (again)"
            verdict = "" if claim.holds else "FAILS: "
            said[name] = f"{verdict}{claim.measured}; {claim.expected} {claim.predicted}"
        for name, forms in read_quotes(json.loads(path.read_text(encoding="utf-8"))).items():
            text = forms.get("text/markdown") or forms["text/plain"]
            said[f"{path.stem}: quote {name}"] = text
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = read(arguments.old), read(arguments.new)
    both = [name for name in old if name in new]
    failing = {name: text for name, text in new.items() if text.startswith("FAILS")}
    print("Equal:", sum(old[name] == new[name] for name in both))
    for title, lines in {
        "Changed": {n: f"{old[n]} -> {new[n]}" for n in both if old[n] != new[n]},
        "Gone": {name: text for name, text in old.items() if name not in new},
        "New": {name: text for name, text in new.items() if name not in old},
        "Failing": failing,
    }.items():
        print(f"{title}: {len(lines)}")
        for name, text in lines.items():
            print(f"  {name}: {shorten(text, 200)}")
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
