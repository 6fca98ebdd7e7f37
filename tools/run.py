"""Run one chapter with parameters of one's own, and open it in JupyterLab.

usage: python tools/run.py 07 -p width 24 -p ranks 1,4

The chapter is named as its file begins, or by its number. It runs in the present folder; the
executed notebook is ``_build/run/NN-name.ipynb``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import execute
from papermill.exceptions import PapermillExecutionError

from lorapower.book.claims import read

CHAPTERS = sorted((execute.ROOT / "chapters").glob("*.ipynb"))
RUNS = execute.ROOT / "_build" / "run"


def chapter(name: str) -> Path:
    """The one chapter whose file begins with ``name``."""
    stem = Path(name).name.removesuffix(".ipynb").zfill(2)
    found = [path for path in CHAPTERS if path.stem.startswith(stem)]
    if len(found) != 1:
        every = ", ".join(path.stem for path in CHAPTERS)
        raise argparse.ArgumentTypeError(f"{name!r} is not the beginning of one of {every}")
    return found[0]


def value(text: str) -> int | str:
    """A number or a text; the chapter itself reads lists out of texts."""
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("chapter", type=chapter, help="such as 07, or 07-training")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("PARAMETER", "VALUE"),
        dest="parameters",
        help="one of its parameters; any number of times",
    )
    parser.add_argument("--only-run", action="store_true", help="do not open JupyterLab")
    given = parser.parse_args(arguments)
    target = RUNS / given.chapter.name
    parameters = {name: value(text) for name, text in given.parameters}
    try:
        execute.run(given.chapter, target, parameters, folder=Path.cwd())
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
