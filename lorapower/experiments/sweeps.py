"""Sweeps: settings → runs → one tidy table, kept as it goes, resumable.

Settings are of a subclass of `Record`, often with a ``problem`` and a ``method``, results of one of
`Results`. What a run does is the caller's ``work``.

A table has a row per run: the fields of the setting, the results, and what made them (``version``,
``revision``, ``fingerprint``). Fields of a nested record are columns too; its ``kind`` is the
column of the field that holds it: ``method=Lora(ranks=2)`` gives ``method`` ``"lora"`` and
``ranks`` 2. ``None`` and what a row's method lacks are missing; pandas then makes integers floats.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import itertools
import json
import marshal
import re
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import closing, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import filelock
import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import _checks
from .._records import Record, Results
from ..errors import InputError, ResultsError

__all__ = ["Record", "Results", "columns", "grid", "read", "run"]

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT.name
# Starts runs and keeps results, which it does not change.
_KEEPER = "experiments/sweeps.py"
# Runs of the package import none of these.
_APART = ("book/", "checkpoints/")
# Distributions whose versions can change a result.
_LIBRARIES = ("numba", "numpy", "peft", "scikit-learn", "scipy", "torch", "transformers")

# The mark of the application in an SQLite file, "LoRA", and the version of the schema.
_APPLICATION, _FORMAT = int.from_bytes(b"LoRA"), 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, version TEXT NOT NULL,
    revision TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (setting, fingerprint)
) STRICT;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
COMMIT;
"""
# Seconds for which readers and the writer wait for each other.
_PATIENCE = 60.0


class _Code(NamedTuple):
    """What a function runs: a digest of its own source, and files of this package."""

    own: str
    files: tuple[str, ...]


class _Origin(NamedTuple):
    """What made a row: the columns that say so."""

    version: str
    revision: str
    fingerprint: str


class _Row(NamedTuple):
    setting: str
    results: str
    version: str
    revision: str
    fingerprint: str


_COLUMNS = ", ".join(_Row._fields)


R = TypeVar("R", bound=Record)
Work = Callable[[list[R]], Sequence[Record]]
Done = Generator[tuple[list[R], Sequence[Record], _Origin]]


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Records for the Cartesian product of ``values``, the last keyword varying fastest.

    A list, a range or a one-dimensional array is an axis; any other value, such as a tuple or a
    record, is one for all: ``grid(Setting, problem=grid(Problem, seed=range(3)),
    method=Lora(ranks=2))``. Raises `InputError` for an empty axis and as ``record`` does.
    """
    if not _is_record(record):
        raise InputError("record", allowed="a class of records", value=record)
    axes = [_axis(name, value) for name, value in values.items()]
    return [record(**dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def run(
    settings: Sequence[R],
    work: Work[R],
    path: Path | str | None = None,
    *,
    size: int = 256,
    executor: Executor | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run ``work`` for each setting; a table with one row for each, in their order.

    Parameters
    ----------
    settings : sequence of Record
        Of one class, and different from one another.
    work : callable
        A named function from a list of settings to as many records of results, all of one class.
        What it raises ends the sweep.
    path : path, optional
        A file that keeps each finished batch. Runs in it are not repeated, unless their code
        changed; these are kept aside. _Code is versions of the libraries that compute, and sources
        without comments and docstrings: of a function of this package, the package up to the
        experiments; of another, the whole package and the function's module, without what runs when
        that is started (in a notebook, the function alone). Other calls and closures are not seen.
    size : int
        Most settings in one call of ``work``. They share the ``problem``, where they have one.
    executor : concurrent.futures.Executor, optional
        Where batches run: processes, loky's, or a dask cluster's
        (``Client(address).get_executor()``). By default they run here, one after another.

    Raises
    ------
    InputError
        Unusable settings, work, size, executor or results, or workers that have other code.
    ResultsError
        ``path`` is another kind of file, damaged, in use by another sweep, or not writable.
    """
    keys = _keys(settings)
    size = _checks.integer("size", size, 1)
    if executor is not None and not isinstance(executor, Executor):
        raise InputError(
            "executor",
            allowed="one of concurrent.futures, or like these",
            value=executor,
            remedy="a dask client makes one by get_executor()",
        )
    code = _code(work)
    fingerprint = _origin(code).fingerprint
    place = None if path is None else _checks.path("path", path)
    with _opened(place) as kept:
        rows = kept.rows(fingerprint)
        missing = [setting for setting in settings if keys[setting] not in rows]
        known = {key for (key,) in kept.ask("SELECT DISTINCT setting FROM runs")}
        if aside := len({keys[setting] for setting in missing} & known):
            # Not among the results of a notebook's cell.
            about = f"{place}: {aside} runs were made by other code; kept aside, done again"
            tqdm.write(about, file=sys.stderr)
        with (
            closing(_results(executor, work, code, _batches(missing, size))) as done,
            tqdm(
                total=len(settings),
                initial=len(settings) - len(missing),
                unit="run",
                smoothing=0,
                disable=not progress,
            ) as bar,
        ):
            for batch, results, origin in done:
                if origin.fingerprint != fingerprint:
                    raise InputError(
                        "executor",
                        allowed="one whose workers have this code and these libraries",
                        given=f"version {origin.version}, revision {origin.revision or 'unknown'}",
                    )
                texts = _texts(results, batch)
                new = [_Row(keys[s], text, *origin) for s, text in zip(batch, texts, strict=True)]
                kept.add(new)
                rows |= {row.setting: row for row in new}
                bar.update(len(batch))
    return _frame(rows[key] for key in keys.values())


def read(path: Path | str) -> pd.DataFrame:
    """The table of the newest run of each setting in ``path``, in the order of finishing.

    Any code may have made them (see ``fingerprint``), and a sweep may be at work. Raises
    `ResultsError` for a file that is damaged or not a sweep's.
    """
    return _frame(_newest(_checks.path("path", path)))


def columns(record: type[Record], name: str = "") -> list[str]:
    """The columns that settings of this class have in a table, those of all kinds of its fields."""
    names = []
    for field, about in record.model_fields.items():
        kinds = [k for k in (about.annotation, *get_args(about.annotation)) if _is_record(k)]
        inner = [column for kind in kinds for column in columns(kind, field)]
        names += [*dict.fromkeys(inner)] or [name if field == "kind" else field]
    return names


def _axis(name: str, value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.ndim > 1:
            raise InputError(name, allowed="of one dimension", given=f"shape {value.shape}")
        value = value.tolist()
    if not isinstance(value, list | range):
        return [value]
    if not value:
        raise InputError(name, allowed="a value or a list of at least one", value=value)
    return list(value)


def _keys(settings: Sequence[R]) -> dict[R, str]:
    """What each setting is called in the file; refuses what makes no table."""
    if not isinstance(settings, Sequence) or not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    if len(kinds := {type(setting) for setting in settings}) > 1 or not _is_record(*kinds):
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError("settings", allowed="of one class, made from sweeps.Record", given=given)
    _distinct(type(settings[0]).__name__, [*columns(type(settings[0])), *_Origin._fields])
    texts = [setting.model_dump_json(serialize_as_any=True) for setting in settings]
    try:
        (twice, count), *_ = Counter(settings).most_common(1)
    except TypeError as error:
        raise InputError(
            "settings", allowed="of hashable fields", given=error, remedy="make lists tuples"
        ) from error
    if count > 1 or len({*texts}) < len(texts):
        given = f"{count} times {twice!r}" if count > 1 else "two that are written alike"
        raise InputError("settings", allowed="different from one another", given=given)
    return dict(zip(settings, texts, strict=True))


def _texts(results: Any, batch: list[Any]) -> list[str]:
    """Results as they are kept; refuses what does not fit into one table."""
    promise = f"a function that returns a list of sweeps.Results of one class, here {len(batch)}"
    kinds = {type(result) for result in results} if isinstance(results, Sequence) else set()
    if len(kinds) != 1 or not _is_record(*kinds) or len(results) != len(batch):
        raise InputError("work", allowed=promise, value=results)
    (kind,) = kinds
    _distinct(kind.__name__, [*columns(type(batch[0])), *kind.model_fields, *_Origin._fields])
    return [result.model_dump_json() for result in results]


def _batches(settings: Iterable[R], size: int) -> list[list[R]]:
    groups = defaultdict(list)
    for setting in settings:
        groups[getattr(setting, "problem", None)].append(setting)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _results(
    executor: Executor | None, work: Work[R], code: _Code, batches: list[list[R]]
) -> Done[R]:
    """Batches with their results and what made these, in the order in which they finish."""
    if executor is None:
        for batch in batches:
            yield batch, *_measured(work, code, batch)
        return
    futures = {executor.submit(_measured, work, code, batch): batch for batch in batches}
    try:
        for future in as_completed(futures):
            yield futures[future], *future.result()
    finally:
        for future in futures:
            future.cancel()


def _measured(work: Work[R], code: _Code, batch: list[R]) -> tuple[Sequence[Record], _Origin]:
    # A copy, as nobody promises that `work` leaves the order of its list alone.
    return work([*batch]), _origin(code)


def _frame(rows: Iterable[_Row]) -> pd.DataFrame:
    """One line per row, in their order."""
    rows = list(rows)
    parts: list[list[dict[str, Any]]] = [
        [_flat(row.setting) for row in rows],
        [_flat(row.results) for row in rows],
        [{name: getattr(row, name) for name in _Origin._fields} for row in rows],
    ]
    return pd.concat([pd.DataFrame(part) for part in parts], axis=1)


def _flat(text: str) -> dict[str, Any]:
    """The cells of a record that is kept as this text, by their columns."""
    return dict(_leaves(json.loads(text)))


def _leaves(values: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for field, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, field)
        else:
            yield name if field == "kind" else field, _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Record)


def _distinct(name: str, names: list[str]) -> None:
    """Refuse columns of which two have one name; ``name`` says whose they are."""
    if twice := [column for column, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"columns of {name}", allowed="different from one another", given=", ".join(twice)
        )


def _code(work: Callable[..., Any]) -> _Code:
    """What ``work`` runs, as far as `run` looks."""
    if not inspect.isfunction(work) or work.__name__ == "<lambda>":
        raise InputError(
            "work",
            allowed="a function of a list of settings that has a name",
            value=work,
            remedy="define one, and let the settings say what it needs",
        )
    home = work.__module__ or ""
    own = [home, work.__qualname__]
    inside = home.partition(".")[0] == _PACKAGE
    if not inside:
        own.append(_source(work))
    files = sorted(path.relative_to(_ROOT).as_posix() for path in _ROOT.rglob("*.py"))
    apart = (_KEEPER, *_APART) if inside else _KEEPER
    return _Code(_digest(own), tuple(name for name in files if not name.startswith(apart)))


def _origin(code: _Code, root: Path = _ROOT) -> _Origin:
    """What makes a row on the machine that calls this, where ``root`` holds the package."""
    return _Origin(*_release(), _digest([code.own, _package(code.files, root)]))


def _source(work: Callable[..., Any]) -> str:
    """The source of a function's module, of itself where it has none, or its bytecode."""
    file = getattr(sys.modules.get(work.__module__), "__file__", None)
    if file and Path(file).is_file():
        # Code that runs only when a script is started does not count.
        whole = Path(file).read_text(encoding="utf-8")
        return _bare(re.split(r"^if __name__ == ['\"]__main__['\"]:", whole, flags=re.M)[0])
    try:
        return _bare(textwrap.dedent(inspect.getsource(work)))
    except (OSError, TypeError):
        about = work.__code__, work.__defaults__, work.__kwdefaults__
        return marshal.dumps(about[0], 2).hex() + repr(about[1:])


class _Bare(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        says = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if says else node


def _bare(source: str) -> str:
    """The source without comments, docstrings and layout."""
    try:
        return ast.dump(_Bare().visit(ast.parse(source)))
    except SyntaxError:  # a notebook's magic
        return source


@functools.cache
def _package(files: tuple[str, ...], root: Path) -> str:
    """Digest of the files' sources and the libraries' versions, as they are installed here."""
    sources = [f"{name} {_bare((root / name).read_text(encoding='utf-8'))}" for name in files]
    return _digest([*sources, *(f"{name} {_version(name)}" for name in _LIBRARIES)])


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
        run = subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    try:
        # A package that is installed below somebody's checkout is not tracked there.
        git("ls-files", "--error-unmatch", "__init__.py")
        revision = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        revision = ""
    return _version(_PACKAGE), revision


class _File:
    """Finished runs in one SQLite file: batches are there whole or not at all."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection, self.path = connection, path

    def ask(self, query: str, *values: str) -> list[Any]:
        with _explained(self.path):
            return self.connection.execute(query, values).fetchall()

    def rows(self, fingerprint: str) -> dict[str, _Row]:
        """The rows that code of this fingerprint made, by their settings."""
        found = self.ask(f"SELECT {_COLUMNS} FROM runs WHERE fingerprint = ?", fingerprint)
        return {row[0]: _Row(*row) for row in found}

    def add(self, rows: Iterable[_Row]) -> None:
        insert = f"INSERT INTO runs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)"
        with _explained(self.path), self.connection:
            self.connection.executemany(insert, rows)

    def check(self) -> None:
        """Refuse all but a whole file of a sweep."""
        ((application,),) = self.ask("PRAGMA application_id")
        ((version,),) = self.ask("PRAGMA user_version")
        if application != _APPLICATION:
            raise ResultsError(self.path, "is no file of a sweep", remedy="name another file")
        if version != _FORMAT:
            about = f"is of format {version}, this version of the package has format {_FORMAT}"
            raise ResultsError(self.path, about, remedy="name another file")
        ((state,),) = self.ask("PRAGMA quick_check(1)")
        if state != "ok":
            raise _damaged(self.path, state)


@contextmanager
def _opened(path: Path | None) -> Iterator[_File]:
    """The file, open for one writer while others may read; without a path, one in memory."""
    with nullcontext() if path is None else _locked(path), _connected(path, "rwc") as file:
        ((pages,),) = file.ask("PRAGMA page_count")
        if not pages:
            with _explained(file.path):
                file.connection.executescript(_SCHEMA)
        file.check()
        yield file


def _newest(path: Path) -> list[_Row]:
    """The row that was finished last for each setting, in the order of finishing."""
    if not path.is_file():
        raise ResultsError(path, "is no file", remedy="name a file that a sweep has written")
    with _connected(path, "rw") as file:
        file.check()
        # With max(), SQLite takes the other columns from the row that has it.
        query = f"SELECT {_COLUMNS}, max(id) FROM runs GROUP BY setting ORDER BY max(id)"
        return [_Row(*row[:-1]) for row in file.ask(query)]


@contextmanager
def _connected(path: Path | None, mode: str) -> Iterator[_File]:
    uri = f"{path.absolute().as_uri()}?mode={mode}" if path else "file::memory:"
    path = path or Path(":memory:")
    with _explained(path):
        connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE)
    with closing(connection):
        yield _File(connection, path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as this package's own."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _unusable(path, str(error)) from error
    except (sqlite3.DatabaseError, ValueError) as error:
        raise _damaged(path, str(error)) from error


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
        remedy = "wait until that has ended, or name another file"
        raise ResultsError(path, "is in use by another sweep", remedy=remedy) from error
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _damaged(path: Path, reason: str) -> ResultsError:
    about = f"is damaged, or no file of a sweep ({' '.join(reason.split())})"
    return ResultsError(path, about, remedy="move it away, or name another file")


def _unusable(path: Path, reason: str) -> ResultsError:
    return ResultsError(
        path,
        f"cannot be used ({reason})",
        remedy="what was finished before is kept; make room or give access, or name another file, "
        "and the same call resumes",
    )
