"""Print, as part of a makefile, which modules of the package each chapter depends on.

usage: python tools/dependencies.py

Importing ``lorapower.a.b`` runs ``lorapower``, ``lorapower.a``, ``lorapower.a.b`` and all that they
import: a chapter has to be executed again once one of these files changed.
"""

from __future__ import annotations

import ast
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from grimp import ImportGraph, build_graph
from grimp.exceptions import SourceSyntaxError
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lorapower"


def code(source: Path) -> str:
    """The Python of a module or a notebook; IPython's magics become calls."""
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".ipynb":
        return text
    # Plain JSON: importing nbformat would take longer than all that is done here.
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    translate = TransformerManager().transform_cell
    return "\n".join(translate("".join(cell["source"])) for cell in cells)


def names(source: Path) -> Iterator[str]:
    """All that `source` may import, dotted; the last part may be a module or what is in one."""
    for node in ast.walk(ast.parse(code(source), source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(imported: Iterable[str], graph: ImportGraph) -> set[str]:
    """The modules of `graph` that run when the names `imported` are imported."""
    found: set[str] = set()
    left = list(imported)
    while left:
        name = left.pop()
        parent = name.rpartition(".")[0]
        if parent and parent not in found:
            left.append(parent)
        if name in graph.modules and name not in found:
            found.add(name)
            left += graph.find_modules_directly_imported_by(name)
    return found


def files(module: str) -> list[str]:
    """Where `module` is, from the root of the project; and the files of its name that it reads."""
    path = Path(*module.split("."))
    if (ROOT / path).is_dir():
        return [str(path / "__init__.py")]
    return [str(each.relative_to(ROOT)) for each in (ROOT / path).parent.glob(f"{path.name}.*")]


def rule(target: str, sources: Iterable[str]) -> str:
    return " \\\n  ".join([f"$(out)/{target}:", *sorted(sources)])


def main() -> int:
    sys.path.insert(0, str(ROOT))
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"), reverse=True)
    tool = ROOT / "tools" / "execute.py"
    try:
        graph = build_graph(PACKAGE, cache_dir=None)
        needs = {
            f"chapters/{path.name}": reached([*names(tool), *names(path)], graph)
            for path in chapters
        }
    except (SourceSyntaxError, SyntaxError) as error:
        print(f"{Path(str(error.filename)).relative_to(ROOT)} is not Python", file=sys.stderr)
        return 1
    # The more of the package a chapter uses, the longer it takes: those go first, lest one that
    # takes long be started last. Of equals the last one, which builds upon the others.
    executed = sorted(needs, key=lambda name: -len(needs[name]))
    print("executed :=", *(f"$(out)/{name}" for name in executed))
    for name in executed:
        print(rule(name, itertools.chain(*map(files, needs[name]))))
    # A file that is gone counts as changed, and is not missed.
    for path in sorted({path for module in set().union(*needs.values()) for path in files(module)}):
        print(f"{path}:")
    return 0


if __name__ == "__main__":
    sys.exit(main())
