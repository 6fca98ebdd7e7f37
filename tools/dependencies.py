"""Print, as part of a makefile, which modules of the package each chapter depends on.

usage: python tools/dependencies.py

A chapter has to be executed again once a module changed that it loads. Importing
``lorapower.a.b`` runs ``lorapower``, ``lorapower.a``, ``lorapower.a.b`` and all that they import.
Packages are lazy: they load what is read off them, as their stubs (``__init__.pyi``) say. Where it
cannot be seen what is read off a package, everything that its stub names counts.
"""

from __future__ import annotations

import ast
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lorapower"


class Source(NamedTuple):
    """What a source imports by each name, the dotted names that it may load, and its strings."""

    imported: dict[str, set[str]]
    loaded: set[str]
    words: set[str]


def code(source: Path) -> str:
    """The Python of a module or a notebook; IPython's magics become calls."""
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".ipynb":
        return text
    # Plain JSON: importing nbformat would take longer than all that is done here.
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    translate = TransformerManager().transform_cell
    return "\n".join(translate("".join(cell["source"])) for cell in cells)


def read(path: Path, package: str = "") -> Source:
    """The imports of a source that lies in `package`, and what is read off the imported.

    ``a.b.*`` is what `a.b` names, if it is a package: the source does with it what is not seen.
    """
    tree = ast.parse(code(path), path)
    imported: dict[str, set[str]] = defaultdict(set)
    loaded, words = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name, given in ((alias.name, alias.asname) for alias in node.names):
                loaded.add(name)
                first = name.partition(".")[0]
                imported[given or first].add(name if given else first)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                loaded.add(f"{origin}.{alias.name}")
                imported[alias.asname or alias.name].add(f"{origin}.{alias.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
    for first, *rest in chains(tree):
        loaded |= {".".join([name, *rest, "*"]) for name in imported.get(first, ())}
    return Source(dict(imported), loaded, words)


def chains(node: ast.AST) -> Iterator[list[str]]:
    """The names ``a`` and chains ``a.b.c`` in the code below `node`, each as long as it is."""
    parts: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        yield [inner.id, *reversed(parts)]
    else:
        yield from itertools.chain.from_iterable(map(chains, ast.iter_child_nodes(inner)))


def _splits(name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each module that a dotted name may lead through, what is read off it, and what off that."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length]), ".".join(parts[length : length + 1]), parts[length + 1 :]


class Package:
    """The package below `root`: the paths of its modules by name, and what is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, Path] = {}
        self.sources: dict[str, Source] = {}
        # Of lazy packages, what their public names stand for.
        self.stubs: dict[str, dict[str, set[str]]] = {}
        for path in (root / PACKAGE).rglob("*.py"):
            *parents, last = path.relative_to(root).with_suffix("").parts
            module = ".".join(parents if last == "__init__" else [*parents, last])
            self.paths[module] = path
            self.sources[module] = read(path, ".".join(parents))
            if (stub := path.with_suffix(".pyi")).exists():
                self.stubs[module] = read(stub, module).imported

    def reach(self, names: Iterable[str]) -> set[str]:
        """The modules that run when the dotted `names` are loaded, at any remove."""
        reached, seen = set[str](), set[str]()
        left = list(names)
        while left:
            if (name := left.pop()) in seen:
                continue
            seen.add(name)
            for module, part, rest in _splits(name):
                if module not in self.paths:
                    break
                if module not in reached:
                    reached.add(module)
                    left += self.sources[module].loaded
                stub = self.stubs.get(module, {})
                meant = itertools.chain(*stub.values()) if part == "*" else stub.get(part, ())
                behind = self.sources[module].imported.get(part, ())
                within = f"{module}.{part}."  # is loaded next, whatever of the same name is in it
                left += [
                    ".".join([other, *rest])
                    for other in (*meant, *behind)
                    if not f"{other}.".startswith(within)
                ]
        return reached

    def files(self, module: str) -> set[str]:
        """Where `module` is, its stub, and the files beside it that it names."""
        path, words = self.paths[module], self.sources[module].words
        stub = path.with_suffix(".pyi").name
        beside = {file for file in path.parent.iterdir() if file.name in {stub, *words}}
        return {str(file.relative_to(self.root)) for file in {path, *beside} if file.is_file()}


def modules(source: Path, root: Path = ROOT) -> set[str]:
    """All modules of the package in the folder `root` that a notebook or script may load."""
    return Package(root).reach(read(source).loaded)


def minutes(chapter: Path) -> float:
    """What a chapter takes about, if its metadata say so."""
    metadata = json.loads(chapter.read_text(encoding="utf-8"))["metadata"]
    return float(metadata.get("lorapower", {}).get("minutes", 0))


def rule(targets: str, sources: Iterable[str]) -> str:
    return " \\\n  ".join([f"{targets}:", *sorted(sources)])


def main() -> int:
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"), reverse=True)
    try:
        package = Package(ROOT)
        tool = read(ROOT / "tools" / "execute.py").loaded
        needs = {path.name: package.reach(tool | read(path).loaded) for path in chapters}
    except SyntaxError as error:
        print(f"{Path(str(error.filename)).relative_to(ROOT)} is not Python", file=sys.stderr)
        return 1
    # One that takes minutes goes first, as its metadata ask. Of equals the last, which builds upon
    # the others.
    ordered = sorted(needs, key=lambda name: -minutes(ROOT / "chapters" / name))
    print("executed :=", *(f"$(out)/chapters/{name}" for name in ordered))
    for name in ordered:
        targets = f"$(out)/chapters/{name} $(small)/{name}"
        print(rule(targets, itertools.chain(*map(package.files, needs[name]))))
    # A file that is gone counts as changed, and is not missed.
    for path in sorted({*itertools.chain(*map(package.files, set().union(*needs.values())))}):
        print(f"{path}:")
    return 0


if __name__ == "__main__":
    sys.exit(main())
