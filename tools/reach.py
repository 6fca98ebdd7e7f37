"""Follow the imports of code, and digest what they reach."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple


class Module(NamedTuple):
    """A module's file, the dotted names that it imports, and a digest of what it does."""

    path: Path
    imports: set[str]
    digest: str


def reach(names: Iterable[str], places: Mapping[str, Path]) -> dict[str, Module]:
    """Find the modules that run when names are imported: with parents, and all that they import.

    ``places`` has the folder, or the one file, of each top-level module to follow.
    """
    found: dict[str, Module] = {}
    waiting = [*names]
    while waiting:
        parts = waiting.pop().split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name not in found and (path := _file(name, places)):
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                found[name] = _read(path, path.read_bytes(), package)
                waiting += found[name].imports
    return found


def _file(module: str, places: Mapping[str, Path]) -> Path | None:
    first, *others = module.split(".")
    if first not in places:
        return None
    place = places[first].joinpath(*others)
    tried = (place, place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in tried if path.is_file()), None)


@functools.cache
def _read(path: Path, text: bytes, package: str) -> Module:
    code = ast.parse(text, path)
    return Module(path, imported(code, package), digest(code))


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


def digest(code: ast.AST | str) -> str:
    """Digest code, but for comments and docstrings, or a text."""
    text = code if isinstance(code, str) else ast.dump(_Bare().visit(code))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _Bare(ast.NodeTransformer):
    """Leaves out texts that stand alone, as docstrings do."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else self.generic_visit(node)
