"""Print, as part of a makefile, which modules and data each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it imports, at any remove, a file of
data beside such a module, or a record of runs that it names; in profile paper it writes these.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterable
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "lorapower": ROOT / "lorapower",
    "loraplan": ROOT / "loraplan" / "src" / "loraplan",
    "records": ROOT / "records",
}


def code(path: Path) -> ast.AST:
    """Parse a program, or the code of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        translate = TransformerManager().transform_cell  # magics become calls
        text = "\n".join(translate("".join(cell["source"])) for cell in cells)
    return ast.parse(text, path)


def needs(path: Path) -> set[Path]:
    """List the modules that a program or a notebook runs by its imports, at any remove."""
    found: dict[str, Path] = {}
    waiting = [*imported(code(path))]
    while waiting:
        parts = waiting.pop().split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name not in found and (file := _file(name)):
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                found[name] = file
                waiting += _imports(file, package)
    return {*found.values()}


def _file(module: str) -> Path | None:
    first, *others = module.split(".")
    if first not in PLACES:
        return None
    place = PLACES[first].joinpath(*others)
    tried = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in tried if path.is_file()), None)


@functools.cache
def _imports(module: Path, package: str) -> set[str]:
    return imported(code(module), package)


def imported(code: ast.AST, package: str = "") -> set[str]:
    """List the dotted names that code in a package imports, wherever in it."""
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def beside(modules: Iterable[Path]) -> set[Path]:
    """List the data beside modules."""
    near = chain.from_iterable(module.parent.iterdir() for module in modules)
    return {file for file in near if file.is_file() and file.suffix != ".py"}


def recorded(chapter: Path) -> set[Path]:
    """List the records of runs that a chapter names, or a module of `records` that it imports."""
    modules = [module for module in needs(chapter) if module.parent.name == "records"]
    nodes = chain.from_iterable(ast.walk(code(path)) for path in (chapter, *modules))
    named = {node.value for node in nodes if isinstance(node, ast.Constant)}
    files = (ROOT / "records" / "sweeps").glob("*.jsonl.gz")
    return {file for file in files if file.name.partition(".")[0] in named}


def main() -> None:
    tool, every = needs(ROOT / "tools" / "execute.py"), set[Path]()
    # Appendices take longer than most: they go first.
    chapters = sorted((ROOT / "chapters").glob("*-*.ipynb"), reverse=True)
    print("executed :=", *(f"$(out)/chapters/{path.name}" for path in chapters))
    for path in chapters:
        modules = tool | needs(path)
        files, records = modules | beside(modules), recorded(path)
        for out, needed in (("$(out)", files), ("_build/quick", records)):
            print(f"{out}/chapters/{path.name}:", *_names(needed))
        every |= files | records
    # A file that is gone counts as changed, and is not missed.
    print(*(f"{name}:" for name in _names(every)), sep="\n")


def _names(files: Iterable[Path]) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in files)


if __name__ == "__main__":
    main()
