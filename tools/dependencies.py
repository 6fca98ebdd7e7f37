"""Print, as part of a makefile, which modules and data each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it imports, at any remove, a file of
data beside such a module, or a record of runs that it names; in profile paper it writes these.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from itertools import chain
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from lorapower._code import Module, digest, imported, reach

ROOT = Path(__file__).resolve().parent.parent
PLACES = {name: ROOT / name for name in ("lorapower", "records")}


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


def beside(module: Module) -> set[Path]:
    """List the data beside a module."""
    files = filter(Path.is_file, module.path.parent.iterdir())
    return {file for file in files if file.suffix != ".py"}


def recorded(chapter: Path) -> set[Path]:
    """List the records of runs that a chapter names, or a module of `records` that it imports."""
    modules = [module.path for module in needs(chapter) if module.path.parent.name == "records"]
    nodes = chain.from_iterable(ast.walk(code(path)) for path in (chapter, *modules))
    named = {node.value for node in nodes if isinstance(node, ast.Constant)}
    files = (ROOT / "records" / "sweeps").glob("*.jsonl.gz")
    return {file for file in files if file.name.partition(".")[0] in named}


def files(modules: list[Module]) -> set[str]:
    """List the files of modules, and the data beside them."""
    paths = {module.path for module in modules}.union(*map(beside, modules))
    return {str(path.relative_to(ROOT)) for path in paths}


def digested(chapter: Path) -> str:
    """Digest what a chapter computes with: metadata, code, modules and their data, and records."""
    modules = needs(chapter)
    data = sorted(recorded(chapter).union(*map(beside, modules)))
    parts = [
        json.loads(chapter.read_text(encoding="utf-8"))["metadata"],
        digest(code(chapter)),
        sorted(module.digest for module in modules),
        [hashlib.blake2b(file.read_bytes()).hexdigest() for file in data],
    ]
    return digest(json.dumps(parts))


def main() -> int:
    # Appendices take longer than most: they go first.
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"), reverse=True)
    try:
        tool = needs(ROOT / "tools" / "execute.py")
        needed = {path: files([*tool, *needs(path)]) for path in chapters}
        records = {
            path: {str(file.relative_to(ROOT)) for file in recorded(path)} for path in chapters
        }
    except SyntaxError as error:
        print(f"{Path(str(error.filename)).relative_to(ROOT)} is not Python", file=sys.stderr)
        return 1
    print("executed :=", *(f"$(out)/chapters/{path.name}" for path in needed))
    for path, names in needed.items():
        print(f"$(out)/chapters/{path.name}:", *sorted(names))
        if records[path]:
            print(f"_build/quick/chapters/{path.name}:", *sorted(records[path]))
    every = set().union(*needed.values(), *records.values())
    # A file that is gone counts as changed, and is not missed.
    print(*(f"{file}:" for file in sorted(every)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
