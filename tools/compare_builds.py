"""Compare claims and quoted values of two builds: print each that is other, gone or new.

usage: python tools/compare_builds.py OLD NEW

OLD and NEW are folders of executed chapters, such as ``_build/quick/chapters``. Chapters are
matched by name, claims by their label and statement, quotes by name. The exit status is 1 if a
claim that held fails or is gone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lorapower.book._executed import read_claims, read_quotes


def read(folder: Path) -> dict[str, str]:
    """Read all claims, with their numbers, and all quotes in plain text, by chapter and name."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        for claim in read_claims(path):
            verdict = "holds" if claim.holds else "FAILS"
            numbers = f"{verdict}: {claim.measured}; {claim.expected} {claim.predicted}"
            found[f"claim {path.stem} {claim.label}: {claim.statement}"] = numbers
        for name, forms in read_quotes(json.loads(path.read_text(encoding="utf-8"))).items():
            text = forms.get("text/plain", forms.get("text/markdown", ""))
            # Objects that are shown, such as figures, print their address in memory.
            found[f"quote {path.stem} {name}"] = text.partition(" at 0x")[0]
    return found


def main(old: Path, new: Path) -> bool:
    """Print what differs; say whether a claim that held fails or is gone."""
    before, after = read(old), read(new)
    differ = [name for name in before | after if before.get(name) != after.get(name)]
    for name in sorted(differ):
        print(name, f"  {before.get(name, 'new')}", f"  {after.get(name, 'gone')}", sep="\n")
    print(f"{len(before | after) - len(differ)} are equal, {len(differ)} differ")
    held = (name for name in differ if before.get(name, "").startswith("holds: "))
    return any(not after.get(name, "").startswith("holds: ") for name in held)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])) if len(sys.argv) == 3 else __doc__)
