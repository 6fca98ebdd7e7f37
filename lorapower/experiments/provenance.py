"""What made a result: the package's version, the revision of its code, and its fingerprint."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import grimp

from ..errors import InputError, brief

PACKAGE = __name__.partition(".")[0]
# They start runs and keep what these give, which they have no part in.
KEEPERS = {f"{PACKAGE}.experiments.{name}" for name in ("provenance", "store", "sweeps", "tables")}
# Distributions, by the name they are imported by, whose versions can change a result.
LIBRARIES = {
    name: name.replace("sklearn", "scikit-learn")
    for name in ("numba", "numpy", "peft", "scipy", "sklearn", "torch", "transformers")
}


class Code(NamedTuple):
    """What a function runs: a digest of its own source, and modules of this package."""

    own: str
    modules: tuple[str, ...]


class Origin(NamedTuple):
    """What made a row: the columns that say so."""

    version: str
    revision: str
    fingerprint: str


def code(work: Callable[..., Any]) -> Code:
    """What ``work`` runs, as far as it can be seen.

    - Of a function of this package: its module, and all modules of the package that this imports,
      at any remove.
    - Of a function of another module: this module's source, but for what it does when it is started
      (``if __name__ == "__main__"``), and what it imports of this package. Other modules are not
      followed.
    - Of a function without such a module, as in a notebook or at a prompt: its own source, or where
      there is none its bytecode and constants, and this package as a whole. What else it calls is
      not seen.

    Comments, docstrings and layout do not count; a function's name does, and so do the arguments of
    a `functools.partial` and the object whose method or whose call it is, but not what a closure
    holds, nor what is read from files. Sources are read when this is first asked in a process, so
    code that was edited after it was imported belongs into a new process. Raises `InputError` for
    what is no function, and for arguments and objects that cannot be pickled.
    """
    bound: list[Any] = []
    while isinstance(work, functools.partial):
        bound += [work.args, sorted(work.keywords.items())]
        work = work.func
    if not callable(work):
        raise InputError("work", allowed="a function of a list of settings", given=brief(work))
    if inspect.ismethod(work):
        bound.append(work.__self__)
    elif not inspect.isroutine(work):
        bound.append(work)
    function: Any = work if inspect.isroutine(work) else type(work)
    module = function.__module__ or ""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "nowhere.py")
    own = [module, function.__qualname__, *map(_pickled, bound)]
    if function.__name__ == "<lambda>":
        own.append(_bytecode(function))
    if _ours(module):
        return Code(_digest(own), _reached([module]))
    if file.is_file():
        tree = _tree(file.read_text(encoding="utf-8"))
        tree.body = [part for part in tree.body if not _starts(part)]
        return Code(_digest([*own, _bare(tree)]), _reached(_imported(tree)))
    try:
        own.append(_bare(_tree(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, TypeError, SyntaxError):  # also of what is only a part of a line
        own.append(_bytecode(function))
    return Code(_digest(own), _reached(_graph().modules))


def origin(made_by: Code) -> Origin:
    """What a row is made by where this is called, which may be another machine than `code`'s."""
    return Origin(*_release(), _digest([made_by.own, _package(made_by.modules)]))


@functools.cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)


def _reached(modules: Iterable[str]) -> tuple[str, ...]:
    """These modules, and all of the package and of `LIBRARIES` that they import at any remove.

    The packages that a module is in run before it.
    """
    known = _graph().modules
    found, new = set[str](), known.intersection(modules) - KEEPERS
    while new:
        found |= new
        new = {up for name in new for up in _graph().find_modules_directly_imported_by(name)}
        new |= {name.rpartition(".")[0] for name in found if "." in name}
        new -= found | KEEPERS
    return tuple(sorted(name for name in found if name in LIBRARIES or _ours(name)))


def _imported(tree: ast.Module) -> set[str]:
    """What a file may import, the names of what is no module among them."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _starts(part: ast.stmt) -> bool:
    """Whether this is what a script does only when it is started."""
    return isinstance(part, ast.If) and ast.unparse(part.test) == "__name__ == '__main__'"


def _ours(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE


@functools.cache
def _package(modules: tuple[str, ...]) -> str:
    """Digest of the modules' sources and the libraries' versions, as they are installed here."""
    parts = []
    for name in modules:
        if _ours(name):
            spec = find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            tree = _tree(Path(spec.origin).read_text(encoding="utf-8"))
            parts.append(f"{name} {_bare(tree)}")
        else:
            parts.append(f"{name} {_version(LIBRARIES[name])}")
    return _digest(parts)


def _pickled(value: Any) -> str:
    try:
        return hashlib.blake2b(pickle.dumps(value)).hexdigest()
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise InputError(
            "work", allowed="a function of what can be pickled", given=f"{value!r} ({error})"
        ) from error


def _bytecode(function: Any) -> str:
    found = getattr(function, "__code__", None)
    if found is None:
        return repr(function)
    return repr((_bytes(found), function.__defaults__, function.__kwdefaults__))


def _bytes(found: CodeType) -> list[Any]:
    """Bytecode and constants, those of inner functions among them."""
    constants = [_bytes(c) if isinstance(c, CodeType) else c for c in found.co_consts]
    return [found.co_code, found.co_names, constants]


def _tree(source: str) -> ast.Module:
    """The source's syntax tree.

    Before 3.11.8 and 3.12.2, Python counts the depth of all threads' parsing in one place, and
    raises SystemError where another thread has parsed meanwhile (cpython issue 106905).
    """
    for _ in range(9):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _bare(tree: ast.Module) -> str:
    """The tree in words, without docstrings."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Module(body=[ast.Expr(ast.Constant(str())), *rest])
                | ast.ClassDef(body=[ast.Expr(ast.Constant(str())), *rest])
                | ast.FunctionDef(body=[ast.Expr(ast.Constant(str())), *rest])
                | ast.AsyncFunctionDef(body=[ast.Expr(ast.Constant(str())), *rest])
            ):
                node.body = rest
    return ast.dump(tree)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _release() -> tuple[str, str]:
    """Version of the package, and git revision of its code where that is a checkout."""
    here = Path(__file__)
    git = functools.partial(
        subprocess.run, cwd=here.parent, check=True, capture_output=True, text=True
    )
    try:
        # A package that is installed below somebody's checkout is not tracked there.
        git(["git", "ls-files", "--error-unmatch", here.name])
        found = git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.CalledProcessError):
        return _version(PACKAGE), ""
    return _version(PACKAGE), found.stdout.strip()
