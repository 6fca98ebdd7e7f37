"""Build the HTML of the book from its pages and the executed chapters.

usage: python tools/build_html.py _build/quick

Stages the book's sources in ``_build/quick/source`` and builds them, with every warning an error,
into a new folder, which replaces ``_build/quick/html`` only if it is complete. Always from nothing:
Sphinx reports a warning only when it reads a page, so an incremental build would forget it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup

from lorapower.book._executed import read_quotes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorapower"
# That extension touches every living object, at which torch's deprecated ones protest.
_QUIET = {
    "PYTHONWARNINGS": "ignore::FutureWarning:sphinx_external_toc.collectors",
    # At whose import it names what it does without.
    "TRANSFORMERS_VERBOSITY": "error",
}
_SOURCES = (
    "_config.yml",
    "_toc.yml",
    "_ext",
    "_static",
    "api",
    "chapters",
    "index.md",
    "references.bib",
)


def stage(executed: Path, target: Path) -> None:
    """Fill the folder `target` with the sources, each notebook replaced by its executed form.

    The record of its run comes with it.
    """
    target.mkdir()
    ignore = shutil.ignore_patterns("*.ipynb", ".*", "__pycache__")
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        else:
            shutil.copy(source, target / name)
    for notebook in sorted((ROOT / "chapters").glob("*.ipynb")):
        for name in (notebook.name, f"{notebook.stem}.json"):
            shutil.copy(executed / name, target / "chapters" / name)
        _write_glued_figures(executed / notebook.name, target / "chapters")


def _write_glued_figures(executed: Path, folder: Path) -> None:
    """Write each figure that a chapter glues as ``NAME.svg``, for other pages to show.

    MyST-NB can glue a figure from another page, but without caption and alternative text.
    """
    for name, forms in read_quotes(nbformat.read(executed, as_version=4)).items():
        if svg := forms.get("image/svg+xml"):
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def build(out: Path) -> int:
    """Replace ``out/html`` by a newly built book; on failure leave it and return nonzero."""
    source, fresh, final = out / "source", out / "fresh", out / "html"
    for folder in (source, fresh):
        shutil.rmtree(folder, ignore_errors=True)
    # The page carries the time at which its inputs were read: what changes meanwhile is newer.
    started = time.time_ns()
    stage(out / "chapters", source)
    print("Building the HTML", flush=True)
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    options = ["-q", "-W", "-n", "--keep-going", "--path-output", str(fresh)]
    # Warnings come on stderr, as they arise. The rest names the folder that is about to be renamed.
    run = subprocess.run(
        [jupyter_book, "build", str(source), *options],
        env=os.environ | _QUIET,
        stdout=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        print(run.stdout, "The book is not built: see above.", sep="\n", file=sys.stderr)
        return run.returncode
    html = fresh / "_build" / "html"
    os.utime(html / "index.html", ns=(started, started))
    shutil.rmtree(final, ignore_errors=True)
    html.replace(final)
    shutil.rmtree(fresh)
    return 0


def words(page: Path) -> int:
    """Count the words of a page's text, without code, outputs, mathematics and folded parts."""
    article = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select_one("article")
    if article is None:
        return 0
    for left_out in article.select(".cell, .math, details, .dropdown, pre"):
        left_out.decompose()
    return len(re.findall(r"\S*\w\S*", article.get_text(" ")))


def public(folder: Path) -> int:
    """Count the functions and classes of a package whose path has no underscore."""
    paths = folder.rglob("*.py")
    open_to_all = (p for p in paths if not any(part[0] == "_" for part in p.parts[-3:-1]))
    modules = [ast.parse(p.read_text("utf-8")).body for p in open_to_all if p.name[0] != "_"]
    kinds = ast.FunctionDef | ast.ClassDef
    return sum(isinstance(node, kinds) and node.name[0] != "_" for m in modules for node in m)


def report(html: Path) -> None:
    """Print how long the chapters are, and how much the package offers."""
    names = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
    counts = {name: words(html / "chapters" / f"{name}.html") for name in names}
    print("Words:", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"Together {sum(counts.values()):,}; the package has {public(PACKAGE)} public names.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--where", action="store_true", help="only say where it is, and how long")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not arguments.where:
        return build(out)
    page = out / "html" / "index.html"
    report(page.parent)
    print(f"The book is up to date: {page}\nOpen it in a browser: {page.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
