"""Finished runs in one SQLite file: batches are there whole or not at all, floats to the bit."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import marshal
import re
import sqlite3
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from ..errors import InputError, ResultsError, brief

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT.name
# They start runs and keep results, which they do not change.
KEEPERS = {"experiments/_store.py", "experiments/sweeps.py"}
# Runs of the package import none of these.
APART = ("book/", "checkpoints/", "_cli.py")
# All that runs of text encoders import; they take long.
ENCODERS = (
    *("__init__.py", "_checks.py", "_hub.py", "_records.py", "errors.py", "randomness.py"),
    *("experiments/__init__.py", "experiments/encoders.py", "experiments/texts.py"),
)
# Distributions whose versions can change a result.
LIBRARIES = ("numba", "numpy", "peft", "scikit-learn", "scipy", "torch", "transformers")

# The mark of the application in an SQLite file, "LoRA", and the version of the schema.
APPLICATION, FORMAT = int.from_bytes(b"LoRA"), 1
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, version TEXT NOT NULL,
    revision TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (setting, fingerprint)
) STRICT;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
COMMIT;
"""
# Seconds for which readers and the writer wait for each other.
PATIENCE = 60.0


class Code(NamedTuple):
    """What a function runs: a digest of its own source, and files of this package."""

    own: str
    files: tuple[str, ...]


class Origin(NamedTuple):
    """What made a row: the columns that say so."""

    version: str
    revision: str
    fingerprint: str


class Row(NamedTuple):
    setting: str
    results: str
    version: str
    revision: str
    fingerprint: str


COLUMNS = ", ".join(Row._fields)


def code(work: Callable[..., Any]) -> Code:
    """What ``work`` runs, as far as `sweeps.run` looks."""
    if not inspect.isfunction(work) or work.__name__ == "<lambda>":
        raise InputError(
            "work",
            allowed="a function of a list of settings that has a name",
            given=brief(work),
            remedy="define one, and let the settings say what it needs",
        )
    home = work.__module__ or ""
    own = [home, work.__qualname__]
    ours = home.partition(".")[0] == PACKAGE
    if not ours:
        own.append(_source(work))
    if home == f"{PACKAGE}.experiments.encoders":
        return Code(_digest(own), ENCODERS)
    every = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    run = (name for name in every if name not in KEEPERS)
    return Code(_digest(own), tuple(x for x in run if not (ours and x.startswith(APART))))


def origin(made_by: Code) -> Origin:
    """What makes a row on the machine that calls this."""
    return Origin(*_release(), _digest([made_by.own, _package(made_by.files)]))


def _source(work: Callable[..., Any]) -> str:
    """The source of a function's module, of itself where it has none, or its bytecode."""
    file = getattr(sys.modules.get(work.__module__), "__file__", None)
    if file and Path(file).is_file():
        # Code that runs only when a script is started does not count.
        whole = Path(file).read_text(encoding="utf-8")
        return _bare(re.split(r"^if __name__ == ['\"]__main__['\"]:", whole, flags=re.M)[0])
    try:
        return _bare(inspect.getsource(work))
    except (OSError, TypeError):
        about = work.__code__, work.__defaults__, work.__kwdefaults__
        return marshal.dumps(about[0], 2).hex() + repr(about[1:])


def _bare(source: str) -> str:
    """The source's tokens without comments, docstrings and layout."""
    aside = {tokenize.COMMENT, tokenize.NL}
    ends = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    try:
        tokens = [
            (token.type, "" if token.type in ends else token.string)
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type not in aside
        ]
    except (tokenize.TokenError, SyntaxError):  # a notebook's magic
        return source
    kept: list[tuple[int, str]] = []
    following = [*(kind for kind, _ in tokens[1:]), tokenize.NEWLINE]
    for (kind, text), after in zip(tokens, following, strict=False):
        begins = not kept or kept[-1][0] in ends
        docstring = kind == tokenize.STRING and after == tokenize.NEWLINE
        if not (begins and (docstring or kind == tokenize.NEWLINE)):
            kept.append((kind, text))
    return repr(kept)


@functools.cache
def _package(files: tuple[str, ...]) -> str:
    """Digest of the files' sources and the libraries' versions, as they are installed here."""
    sources = [f"{name} {_bare((ROOT / name).read_text(encoding='utf-8'))}" for name in files]
    return _digest([*sources, *(f"{name} {_version(name)}" for name in LIBRARIES)])


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

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    try:
        # A package that is installed below somebody's checkout is not tracked there.
        git("ls-files", "--error-unmatch", "__init__.py")
        revision = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        revision = ""
    return _version(PACKAGE), revision


class Store:
    """The file of a sweep, opened for writing; see `opened`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection, self.path = connection, path

    def rows(self, fingerprint: str) -> dict[str, Row]:
        """The rows that code of this fingerprint made, by their settings."""
        query = f"SELECT {COLUMNS} FROM runs WHERE fingerprint = ?"
        with _explained(self.path):
            return {row[0]: Row(*row) for row in self.connection.execute(query, [fingerprint])}

    def settings(self) -> set[str]:
        """All settings that have a row, whichever code made it."""
        with _explained(self.path):
            return {s for (s,) in self.connection.execute("SELECT DISTINCT setting FROM runs")}

    def add(self, rows: Iterable[Row]) -> None:
        insert = f"INSERT INTO runs ({COLUMNS}) VALUES (?, ?, ?, ?, ?)"
        with _explained(self.path), self.connection:
            self.connection.executemany(insert, rows)


@contextmanager
def opened(path: Path | None) -> Iterator[Store]:
    """The file, open for one writer while others may read; without a path, one in memory."""
    if path is None:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(SCHEMA)
            yield Store(connection, Path(":memory:"))
        return
    with _locked(path), _connected(path, "rwc") as connection:
        with _explained(path):
            if not connection.execute("PRAGMA page_count").fetchone()[0]:
                connection.executescript(SCHEMA)
        _check(connection, path)
        yield Store(connection, path)


def newest(path: Path) -> list[Row]:
    """The row that was finished last for each setting, in the order of finishing."""
    if not path.is_file():
        raise ResultsError(path, "is no file", remedy="name a file that a sweep has written")
    with _connected(path, "rw") as connection:
        _check(connection, path)
        # With max(), SQLite takes the other columns from the row that has it.
        query = f"SELECT {COLUMNS}, max(id) FROM runs GROUP BY setting ORDER BY max(id)"
        with _explained(path):
            return [Row(*row[:-1]) for row in connection.execute(query)]


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse all but a whole file of a sweep."""
    with _explained(path):
        application, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        )
        if application != APPLICATION:
            raise ResultsError(path, "is no file of a sweep", remedy="name another file")
        if version != FORMAT:
            raise ResultsError(
                path,
                f"is of format {version}, this version of the package has format {FORMAT}",
                remedy="name another file",
            )
        ((state,),) = connection.execute("PRAGMA quick_check(1)")
        if state != "ok":
            raise sqlite3.DatabaseError(state)


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    with _explained(path):
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE)
    with closing(connection):
        yield connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as this package's own."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _unusable(path, str(error)) from error
    except (sqlite3.DatabaseError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ResultsError(
            path,
            f"is damaged, or no file of a sweep ({reason})",
            remedy="move it away, or name another file",
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock ``path`` for this process alone."""
    lock = filelock.FileLock(f"{path.resolve()}.lock", blocking=False)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise ResultsError(
            path,
            "is in use by another sweep",
            remedy="wait until that has ended, or name another file",
        ) from error
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(path: Path, reason: str) -> ResultsError:
    return ResultsError(
        path,
        f"cannot be used ({reason})",
        remedy="what was finished before is kept; make room or give access, or name another file, "
        "and the same call resumes",
    )
