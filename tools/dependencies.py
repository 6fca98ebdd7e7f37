"""Print, as part of a makefile, which modules and data each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it imports, at any remove, or a file
of data beside such a module.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import grimp
from grimp.exceptions import SourceSyntaxError
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lorapower", "records")


def imported(path: Path) -> set[str]:
    """List the dotted names that a module or a notebook imports."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        translate = TransformerManager().transform_cell  # magics become calls
        text = "\n".join(translate("".join(cell["source"])) for cell in cells)
    names = set()
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reach(graph: grimp.ImportGraph, names: Iterable[str]) -> set[str]:
    """List the modules that run when names are imported: with parents, and all that they import."""
    reached = set[str]()
    waiting = [*names]
    while waiting:
        name = waiting.pop()
        parents = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)]
        for module in {*parents} & graph.modules - reached:
            reached.add(module)
            waiting += graph.find_modules_directly_imported_by(module)
    return reached


def files(module: str) -> set[str]:
    """List the file of a module, and the data beside it."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    data = {file for file in path.parent.iterdir() if file.is_file() and file.suffix != ".py"}
    return {str(file.relative_to(ROOT)) for file in {path, *data}}


def minutes(chapter: Path) -> float:
    """Read how long a chapter takes about, if its metadata say so."""
    metadata = json.loads(chapter.read_text(encoding="utf-8"))["metadata"]
    return float(metadata.get("lorapower", {}).get("minutes", 0))


def main() -> int:
    sys.path.insert(0, str(ROOT))
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"), reverse=True)
    packages = [name for name in PACKAGES if (ROOT / name).is_dir()]
    try:
        graph = grimp.build_graph(*packages, cache_dir=None)
        tool = imported(ROOT / "tools" / "execute.py")
        needs = {path: reach(graph, tool | imported(path)) for path in chapters}
    except (SyntaxError, SourceSyntaxError) as error:
        print(f"{Path(str(error.filename)).relative_to(ROOT)} is not Python", file=sys.stderr)
        return 1
    # What takes minutes goes first.
    ordered = sorted(needs, key=lambda path: -minutes(path))
    print("executed :=", *(f"$(out)/chapters/{path.name}" for path in ordered))
    every = set[str]()
    for path in ordered:
        needed = set().union(*map(files, needs[path]))
        print(f"$(out)/chapters/{path.name} $(small)/{path.name}:", *sorted(needed))
        every |= needed
    # A file that is gone counts as changed, and is not missed.
    print(*(f"{file}:" for file in sorted(every)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
