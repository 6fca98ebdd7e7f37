"""Build the HTML of the book from its pages and the executed chapters.

usage: python tools/build_html.py _build/quick

Stages the book's sources in ``_build/quick/source`` and builds them, with every warning an error,
into a new folder, which replaces ``_build/quick/html`` only if it is complete. Always from nothing:
Sphinx reports a warning only when it reads a page, so an incremental build would forget it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

from jupyter_book.sphinx import build_sphinx

from lorapower.book._executed import formatted, read_quotes

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("_static", "chapters", "tools/extensions")
_FILES = ("_config.yml", "_toc.yml", "index.md", "references.bib")


def stage(executed: Path, target: Path) -> None:
    """Fill the folder `target` with the sources, each notebook replaced by its executed form.

    With it come the record of its run and, in files of their own, the figures that it quotes and
    what it quotes of the command's output: other pages show them as they show any file.
    """
    ignore = shutil.ignore_patterns("*.ipynb", ".*", "__pycache__")
    for folder in _FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for file in _FILES:
        shutil.copy(ROOT / file, target)
    for notebook in sorted((ROOT / "chapters").glob("*-*.ipynb")):
        chapter, chapters = executed / notebook.name, target / "chapters"
        shutil.copy(chapter, chapters)
        shutil.copy(chapter.with_suffix(".json"), chapters)
        for name, forms in read_quotes(json.loads(chapter.read_text(encoding="utf-8"))).items():
            if svg := forms.get("image/svg+xml"):
                (chapters / f"{name}.svg").write_text(svg, encoding="utf-8")
            elif name.endswith("-output"):
                printed = formatted(forms["text/plain"], "")
                (chapters / f"{name}.txt").write_text(printed, encoding="utf-8")


def build(out: Path) -> None:
    """Replace ``out/html`` by a newly built book, if this succeeds."""
    source, fresh, final = out / "source", out / "fresh", out / "html"
    for folder in (source, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    # The page carries the time at which its inputs were read: what changes meanwhile is newer.
    started = time.time_ns()
    stage(out / "chapters", source)
    print("Building the HTML", flush=True)
    # That extension touches every living object, at which torch's deprecated ones protest.
    warnings.filterwarnings("ignore", "", FutureWarning, "sphinx_external_toc.collectors")
    # At its import transformers names what it does without.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    failed = build_sphinx(
        source,
        fresh / "html",
        path_config=source / "_config.yml",
        confoverrides={"latex_individualpages": False},
        quiet=True,
        warningiserror=True,
        keep_going=True,
        noconfig=True,  # but what comes from the file above
    )
    if failed:
        sys.exit("The book is not built: see above.")
    os.utime(fresh / "html" / "index.html", ns=(started, started))
    shutil.rmtree(final, ignore_errors=True)
    (fresh / "html").replace(final)
    shutil.rmtree(fresh)
    if out.name == "quick" and (picture := source / "chapters" / "front.svg").exists():
        # The README shows it too, in digits that machines share.
        drawn = picture.read_text(encoding="utf-8")
        svg = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.3f}", drawn)
        (ROOT / "_static" / picture.name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
