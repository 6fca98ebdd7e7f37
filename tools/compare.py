"""Compare what a later build of the book claims and quotes with what an earlier one did.

usage: python tools/compare.py OLD NEW

Each is a folder of executed chapters, or one of them. Prints what has other numbers, is gone, new
or failing, and how much is equal. Fails if a claim of the later build does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from textwrap import shorten

from lorapower.book._executed import read_claims, read_quotes

# What is said, by chapter and by what names it there.
Said = dict[tuple[str, ...], str]


def read(build: Path) -> tuple[Said, Said]:
    """Read the claims and the quotes of a build; a claim that fails says so."""
    claims, quotes = Said(), Said()
    paths = sorted(build.glob("*.ipynb")) if build.is_dir() else [build]
    for path in (path for path in paths if "." not in path.stem):  # others did not finish
        times = Counter[tuple[str, str]]()
        for claim in read_claims(path):
            times[claim.label, claim.statement] += 1
            again = f" [{times[claim.label, claim.statement]}]"
            name = claim.statement + again.replace(" [1]", "")
            verdict = "" if claim.holds else ", fails"
            numbers = f"measured {claim.measured}; {claim.expected} {claim.predicted}{verdict}"
            claims[path.stem, claim.label, name] = numbers
        for name, forms in read_quotes(json.loads(path.read_text(encoding="utf-8"))).items():
            quotes[path.stem, name] = forms.get("text/markdown") or forms["text/plain"]
    return claims, quotes


def show(title: str, lines: dict[tuple[str, ...], str]) -> None:
    """Print a title with a number, and so many lines."""
    print(f"{title}: {len(lines)}")
    for key, text in lines.items():
        print(f"  {': '.join(key)}: {shorten(text, 200)}")


def compare(what: str, old: Said, new: Said) -> None:
    """Print what became of everything of one kind."""
    both = old.keys() & new.keys()
    changed = [key for key in old if key in both and old[key] != new[key]]
    print(f"{what} equal: {len(both) - len(changed)}")
    show(f"{what} changed", {key: f"{old[key]} -> {new[key]}" for key in changed})
    show(f"{what} gone", {key: text for key, text in old.items() if key not in new})
    show(f"{what} new", {key: text for key, text in new.items() if key not in old})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old_claims, old_quotes = read(arguments.old)
    new_claims, new_quotes = read(arguments.new)
    compare("Claims", old_claims, new_claims)
    compare("Quotes", old_quotes, new_quotes)
    failing = {key: text for key, text in new_claims.items() if text.endswith(", fails")}
    show("Claims failing", failing)
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
