"""Compare claims and quoted values of two builds: what is equal, other, gone and new.

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


def read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read all claims, with their numbers, and all quotes in plain text, by chapter and name."""
    claims, quotes = {}, {}
    for path in sorted(folder.glob("*.ipynb")):
        for claim in read_claims(path):
            verdict = "holds" if claim.holds else "FAILS"
            numbers = f"{verdict}: {claim.measured}; {claim.expected} {claim.predicted}"
            claims[f"{path.stem} {claim.label}: {claim.statement}"] = numbers
        for name, forms in read_quotes(json.loads(path.read_text(encoding="utf-8"))).items():
            text = forms.get("text/plain", forms.get("text/markdown", ""))
            # Objects that are shown, such as figures, print their address in memory.
            quotes[f"{path.stem} {name}"] = text.partition(" at 0x")[0]
    return claims, quotes


def compare(kind: str, old: dict[str, str], new: dict[str, str]) -> None:
    """Print how many are equal, and each that is not."""
    both = old.keys() & new.keys()
    changed = sorted(name for name in both if old[name] != new[name])
    gone, added = sorted(old.keys() - both), sorted(new.keys() - both)
    equal = len(both) - len(changed)
    counts = f"{equal} equal, {len(changed)} other, {len(gone)} gone, {len(added)} new"
    print(f"{kind}: {counts}")
    for name in changed:
        print(f"  other  {name}\n         {old[name]}\n         {new[name]}")
    for word, names in (("gone", gone), ("new", added)):
        for name in names:
            print(f"  {word:<6} {name}")


def main(old: Path, new: Path) -> int:
    before, after = read(old), read(new)
    for kind, one, other in zip(("claims", "quotes"), before, after, strict=True):
        compare(kind, one, other)
    return any(
        numbers.startswith("holds") and not after[0].get(name, "").startswith("holds")
        for name, numbers in before[0].items()
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    raise SystemExit(main(*map(Path, sys.argv[1:])))
