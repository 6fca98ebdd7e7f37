"""Finished runs in one SQLite file: each batch is there whole or not at all.

A row has a setting and its results as JSON texts, in which floats keep every bit and NaN stays what
it is, and what made them. A setting has one row for each fingerprint of code.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import filelock

from ..errors import ResultsError
from .provenance import Origin

# "LoRA" in the place where SQLite's files say whose they are, and the version of what follows.
APPLICATION, FORMAT = int.from_bytes(b"LoRA"), 1
SCHEMA = (
    "CREATE TABLE sweep (record TEXT NOT NULL) STRICT",
    "CREATE TABLE runs (id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, "
    "version TEXT NOT NULL, revision TEXT NOT NULL, fingerprint TEXT NOT NULL, "
    "UNIQUE (setting, fingerprint)) STRICT",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {FORMAT}",
)
COLUMNS = f"setting, results, {', '.join(Origin._fields)}"
# Seconds for which readers and the writer wait for each other; a transaction takes a moment.
PATIENCE = 60.0


class Row(NamedTuple):
    """One finished run."""

    setting: str
    results: str
    origin: Origin


class Store:
    """The file of a sweep, opened for writing; see `opened`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection, self.path = connection, path

    def rows(self, fingerprint: str) -> dict[str, Row]:
        """The rows that code of this fingerprint made, by their settings."""
        with _explained(self.path):
            found = self.connection.execute(
                f"SELECT {COLUMNS} FROM runs WHERE fingerprint = ?", [fingerprint]
            )
            return {row.setting: row for row in map(_row, found)}

    def settings(self) -> set[str]:
        """All settings that have a row, whichever code made it."""
        with _explained(self.path):
            return {s for (s,) in self.connection.execute("SELECT DISTINCT setting FROM runs")}

    def add(self, rows: Iterable[Row]) -> None:
        """Keep these, in one transaction."""
        marks = ", ".join("?" * (2 + len(Origin._fields)))
        values = [(row.setting, row.results, *row.origin) for row in rows]
        with _explained(self.path), self.connection:
            self.connection.executemany(f"INSERT INTO runs ({COLUMNS}) VALUES ({marks})", values)


@contextmanager
def opened(path: Path | None, record: str) -> Iterator[Store]:
    """The file with settings of this class for one writer, made where there is none.

    Without a path it is in memory. Readers read on meanwhile, and the system frees the file
    whichever way the process ends. Raises `ResultsError` for a file that is none of a sweep's, is
    damaged or of another class of settings, is being written by another process, or cannot be
    written; it is left as it is.
    """
    if path is None:
        with closing(sqlite3.connect(":memory:")) as connection:
            _make(connection, record)
            yield Store(connection, Path(":memory:"))
        return
    with _locked(path), _connected(path, "rwc") as connection:
        with _explained(path):
            new = not connection.execute("PRAGMA page_count").fetchone()[0]
            if new:
                _make(connection, record)
        if not new and (theirs := _checked(connection, path)) != record:
            raise ResultsError(
                path, f"has runs of {theirs}, not of {record}", remedy="name another file"
            )
        yield Store(connection, path)


def newest(path: Path) -> list[Row]:
    """Of each setting in the file the row that was finished last, in the order of finishing."""
    if not path.is_file():
        raise ResultsError(path, "is no file", remedy="name a file that a sweep has written")
    with _connected(path, "rw") as connection:
        _checked(connection, path)
        with _explained(path):
            # With max(), SQLite takes the other columns from the row that has it.
            query = f"SELECT {COLUMNS}, max(id) FROM runs GROUP BY setting ORDER BY max(id)"
            return [_row(found[:-1]) for found in connection.execute(query)]


def _row(values: tuple[str, ...]) -> Row:
    setting, results, *origin = values
    return Row(setting, results, Origin(*origin))


def _make(connection: sqlite3.Connection, record: str) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO sweep VALUES (?)", [record])


def _checked(connection: sqlite3.Connection, path: Path) -> str:
    """The class of a file's settings; raises `ResultsError` unless it is a whole one of ours."""
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
        ((found,),) = connection.execute("PRAGMA quick_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        ((record,),) = connection.execute("SELECT record FROM sweep")
        return str(record)


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    with _explained(path):
        uri = f"{path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE)
    with closing(connection):
        yield connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as this package's own."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _unwritable(path, str(error)) from error
    except (sqlite3.DatabaseError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ResultsError(
            path,
            f"is damaged, or no file of a sweep ({reason})",
            remedy="move it away, or name another file",
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """``path`` for this process alone."""
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
        raise _unwritable(path, error.strerror or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(path: Path, reason: str) -> ResultsError:
    return ResultsError(
        path,
        f"cannot be used ({reason})",
        remedy="what was finished before is kept; make room or give access, or name another file, "
        "and the same call resumes",
    )
