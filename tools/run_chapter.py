"""Run one chapter with parameters of one's own, and open it in JupyterLab.

usage: python tools/run_chapter.py 05 width=24 ranks=1,4

The chapter is named as its file begins. It runs in the present folder; the executed notebook is
``_build/run/NN-name.ipynb``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from execute import ROOT, run
from papermill.exceptions import PapermillExecutionError

from lorapower.book.claims import read

CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


def chapter(name: str) -> Path:
    """The one chapter whose file begins with ``name``."""
    found = [path for path in CHAPTERS if path.stem.startswith(name)]
    if len(found) != 1:
        every = ", ".join(path.stem for path in found or CHAPTERS)
        raise argparse.ArgumentTypeError(f"{name!r} is not the beginning of one of {every}")
    return found[0]


def parameter(text: str) -> tuple[str, int | str]:
    """Name and value of ``name=value``; the chapter itself reads lists out of texts."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, int(value) if value.lstrip("-").isdecimal() else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chapter", type=chapter)
    parser.add_argument("parameters", nargs="*", type=parameter, metavar="name=value")
    parser.add_argument("--only-run", action="store_true", help="do not open JupyterLab")
    given = parser.parse_args(arguments)
    target = ROOT / "_build" / "run" / given.chapter.name
    try:
        run(given.chapter, target, dict(given.parameters), folder=Path.cwd())
    except PapermillExecutionError as error:
        print(f"{given.chapter.stem} stopped: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    claims = read(target)
    for claim in claims:
        if not claim.holds:
            print(f"does not hold: {claim.statement}; measured {claim.measured}")
    print(f"{sum(claim.holds for claim in claims)} of {len(claims)} claims hold: {target}")
    if given.only_run:
        return 0
    return subprocess.run([sys.executable, "-m", "jupyterlab", str(target)]).returncode


if __name__ == "__main__":
    sys.exit(main())
