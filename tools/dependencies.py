"""Print, as part of a makefile, which modules and data each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it imports, at any remove, a file of
data beside such a module, or a record of runs that it names; in profile paper it writes these.
"""

from __future__ import annotations

import ast
import json
from itertools import chain
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from reach import Module, imported, reach

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


def needs(path: Path) -> list[Module]:
    """List the modules that a program or a notebook runs by its imports."""
    return [*reach(imported(code(path)), PLACES).values()]


def beside(modules: list[Module]) -> set[Path]:
    """List the data beside modules."""
    near = chain.from_iterable(module.path.parent.iterdir() for module in modules)
    return {file for file in near if file.is_file() and file.suffix != ".py"}


def recorded(chapter: Path) -> set[Path]:
    """List the records of runs that a chapter names, or a module of `records` that it imports."""
    modules = [module.path for module in needs(chapter) if module.path.parent.name == "records"]
    nodes = chain.from_iterable(ast.walk(code(path)) for path in (chapter, *modules))
    named = {node.value for node in nodes if isinstance(node, ast.Constant)}
    files = (ROOT / "records" / "sweeps").glob("*.jsonl.gz")
    return {file for file in files if file.name.partition(".")[0] in named}


def name(file: Path) -> str:
    """Name a file as the makefile does."""
    return str(file.relative_to(ROOT))


def main() -> None:
    tool, every = needs(ROOT / "tools" / "execute.py"), set[Path]()
    # Appendices take longer than most: they go first.
    chapters = sorted((ROOT / "chapters").glob("*-*.ipynb"), reverse=True)
    print("executed :=", *(f"$(out)/chapters/{path.name}" for path in chapters))
    for path in chapters:
        modules = [*tool, *needs(path)]
        files, records = {module.path for module in modules} | beside(modules), recorded(path)
        for out, needed in (("$(out)", files), ("_build/quick", records)):
            print(f"{out}/chapters/{path.name}:", *sorted(map(name, needed)))
        every |= files | records
    # A file that is gone counts as changed, and is not missed.
    print(*(f"{file}:" for file in sorted(map(name, every))), sep="\n")


if __name__ == "__main__":
    main()
