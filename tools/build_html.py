"""Build the HTML of the book from its pages and the executed chapters.

usage: python tools/build_html.py _build/quick --jobs 2

Stages the book's sources in ``_build/quick/source`` and builds them, with every warning an error,
into a new folder, which replaces ``_build/quick/html`` only if it is complete. Always from nothing:
Sphinx reports a warning only when it reads a page, so an incremental build would forget it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

from lorapower.book._executed import formatted, read_quotes

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("_ext", "_static", "api", "chapters")
_SOURCES = (*_FOLDERS, "_config.yml", "_toc.yml", "index.md", "references.bib")


def stage(executed: Path, target: Path) -> None:
    """Fill the folder `target` with the sources, each notebook replaced by its executed form.

    With it come the record of its run and, in files of their own, the figures that it quotes and
    what it quotes of the command's output: other pages show them as they show any file.
    """
    target.mkdir()
    ignore = shutil.ignore_patterns("*.ipynb", ".*", "__pycache__")
    for source in (ROOT / name for name in _SOURCES):
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=ignore)
        else:
            shutil.copy(source, target)
    for notebook in sorted((ROOT / "chapters").glob("*.ipynb")):
        chapter, chapters = executed / notebook.name, target / "chapters"
        shutil.copy(chapter, chapters)
        shutil.copy(chapter.with_suffix(".json"), chapters)
        for name, forms in read_quotes(json.loads(chapter.read_text(encoding="utf-8"))).items():
            if svg := forms.get("image/svg+xml"):
                (chapters / f"{name}.svg").write_text(svg, encoding="utf-8")
            elif name.endswith("-output"):
                printed = formatted(forms["text/plain"], "")
                (chapters / f"{name}.txt").write_text(printed, encoding="utf-8")


def show_in_readme(picture: Path) -> None:
    """Copy a figure to where the README shows it, in digits that machines share."""
    svg = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.3f}", picture.read_text("utf-8"))
    (ROOT / "docs" / picture.name).write_text(svg, encoding="utf-8")


def build(out: Path, jobs: int) -> bool:
    """Replace ``out/html`` by a newly built book; say whether this succeeded, else leave it."""
    from jupyter_book.sphinx import build_sphinx

    source, fresh, final = out / "source", out / "fresh", out / "html"
    for folder in (source, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    # The page carries the time at which its inputs were read: what changes meanwhile is newer.
    started = time.time_ns()
    stage(out / "chapters", source)
    print("Building the HTML", flush=True)
    # That extension touches every living object, at which torch's deprecated ones protest.
    warnings.filterwarnings("ignore", "", FutureWarning, "sphinx_external_toc.collectors")
    overrides = {"external_toc_path": str(source / "_toc.yml"), "nitpicky": True}
    failed = build_sphinx(
        source,
        fresh / "html",
        path_config=source / "_config.yml",
        confoverrides=overrides | {"latex_individualpages": False},
        quiet=True,
        warningiserror=True,
        keep_going=True,
        noconfig=True,  # but what comes from the file above
        jobs=jobs,
    )
    if failed:
        print("The book is not built: see above.", file=sys.stderr)
        return False
    os.utime(fresh / "html" / "index.html", ns=(started, started))
    shutil.rmtree(final, ignore_errors=True)
    (fresh / "html").replace(final)
    shutil.rmtree(fresh)
    if out.name == "quick" and (picture := source / "chapters" / "front.svg").exists():
        show_in_readme(picture)
    return True


def slowest(chapters: Path) -> str:
    """Name the five chapters that took the most seconds of a processor."""
    files = chapters.glob("*.json")
    took = {file.stem: json.loads(file.read_text(encoding="utf-8"))["processor"] for file in files}
    five = sorted(took, key=took.__getitem__, reverse=True)[:5]
    return ", ".join(f"{name} {took[name]:.0f} s" for name in five)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="processes that read and write pages")
    arguments = parser.parse_args()
    # At whose import it names what it does without.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    out = arguments.out.resolve()
    if not build(out, arguments.jobs):
        return 1
    print("The slowest chapters, in seconds of a processor:", slowest(out / "chapters"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
