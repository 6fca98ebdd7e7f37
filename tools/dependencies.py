"""Print, as part of a makefile, which modules and data each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it imports, at any remove, or a file
of data beside such a module.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from lorapower._code import imported, reach

ROOT = Path(__file__).resolve().parent.parent
PLACES = {name: ROOT / name for name in ("lorapower", "records")}


def needs(path: Path) -> set[Path]:
    """List the files that a program or a notebook runs by its imports."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        translate = TransformerManager().transform_cell  # magics become calls
        text = "\n".join(translate("".join(cell["source"])) for cell in cells)
    reached = reach(imported(ast.parse(text, path)), PLACES)
    return {module.path for module in reached.values()}


def with_data(module: Path) -> set[str]:
    """List the file of a module, and the data beside it."""
    data = {file for file in module.parent.iterdir() if file.is_file() and file.suffix != ".py"}
    return {str(file.relative_to(ROOT)) for file in {module, *data}}


def main() -> int:
    # Appendices take longer than most: they go first.
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"), reverse=True)
    try:
        tool = needs(ROOT / "tools" / "execute.py")
        needed = {path: set().union(*map(with_data, tool | needs(path))) for path in chapters}
    except SyntaxError as error:
        print(f"{Path(str(error.filename)).relative_to(ROOT)} is not Python", file=sys.stderr)
        return 1
    print("executed :=", *(f"$(out)/chapters/{path.name}" for path in needed))
    for path, files in needed.items():
        print(f"$(out)/chapters/{path.name} $(small)/{path.name}:", *sorted(files))
    every = set().union(*needed.values())
    # A file that is gone counts as changed, and is not missed.
    print(*(f"{file}:" for file in sorted(every)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
