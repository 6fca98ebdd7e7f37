"""Run settings and make one tidy table, kept batch by batch and resumable.

A setting is a `Record`, often with a ``problem`` and a ``method``; a run gives `Results`. Fields of
both, and of records in them, are columns. The ``kind`` of a nested record is the column of the
field that holds it: ``method=Trained(ranks=2)`` gives ``method`` ``"trained"`` and ``ranks`` 2.
Fields that the method of a row lacks are missing values. Columns of settings come first, then those
of results, the ``version`` and the git ``revision`` of the package that made the row.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import sqlite3
import subprocess
import sys
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from tqdm import tqdm

from .. import _code
from .._records import Record, Results
from ..errors import InputError, ResultsError

__all__ = ["Record", "Results", "grid", "read", "run"]

R = TypeVar("R", bound=Record)
_ROOT = Path(__file__).parent.parent
# Distributions whose versions can change a result.
_LIBRARIES = {"numpy", "peft", "scikit-learn", "scipy", "torch", "transformers"}
_COLUMNS = "setting, results, version, revision"
# A run that somebody has begun has no results yet.
_SCHEMA = """runs (
    id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, version TEXT NOT NULL,
    revision TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (setting, fingerprint)
)"""
_INSERT = f"INSERT OR {{}} INTO runs ({_COLUMNS}, fingerprint) VALUES (?, ?, ?, ?, ?)"
_TABLES = "SELECT sql FROM sqlite_master WHERE type = 'table'"


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Make the records of the Cartesian product of ``values``, the last keyword varying fastest.

    A list or a range is an axis. Any other value, such as a tuple or a record, is the same for all:
    ``grid(Setting, problem=grid(Digits, seed=range(3)), method=Trained(ranks=2))``. Raises
    `InputError` for an empty axis and as ``record`` does.
    """
    axes = []
    for name, value in values.items():
        axes.append(value if isinstance(value, list | range) else [value])
        if not axes[-1]:
            raise InputError(name, allowed="a value or a list of at least one", value=value)
    return [record(**dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def run(
    settings: Sequence[R],
    work: Callable[[list[R]], Sequence[Record]],
    path: Path | str | None = None,
    *,
    size: int = 256,
    executor: Executor | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run ``work`` on all settings and return a table with a row for each, in their order.

    ``work`` takes a list of at most ``size`` settings, of one ``problem`` if they have the field,
    and returns as many `Results`. What it raises ends the sweep. Raises `InputError` for no
    settings, a nameless ``work``, results that do not fit and columns of one name, `ResultsError`
    if ``path`` is no file of runs or cannot be written.

    Parameters
    ----------
    path : path, optional
        A file that keeps each batch when it is finished, whole or not at all. Runs in it are not
        repeated unless a library that computes has another version, or code has changed in the
        modules of ``work`` and of the settings' records or in one that they import, at any remove,
        of this package or from outside the environment; comments and docstrings do not count. Of a
        ``work`` in a notebook its own code counts, and the modules that it names. What it reads
        from variables and files does not.
        Several sweeps may use a file at a time: each leaves for last what another has begun.
    executor : concurrent.futures.Executor, optional
        Runs the batches; without one they run here, one after another. Dask's is
        ``Client(address).get_executor()``. Whether workers have the same code is not checked.
    """
    if not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    keys = [setting.model_dump_json(serialize_as_any=True) for setting in settings]
    given = dict(zip(keys, settings, strict=True))
    with _opened(path) as file:
        parts = (one for setting in settings for one in (setting, *dict(setting).values()))
        modules = frozenset(type(one).__module__ for one in parts if isinstance(one, Record))
        store = _Store(file, _fingerprint(work, modules) if path else "")
        kept = store.rows()
        batches = _batches({key: given[key] for key in given if key not in kept}, size)
        done = len(given) - sum(map(len, batches))
        with tqdm(total=len(given), initial=done, unit="run", disable=not progress) as bar:
            for batch, results in _finished(work, batches, store, executor):
                store.put(batch, _texts([*batch], results))
                bar.update(len(batch))
        rows = store.rows()
    return _table([rows[key] for key in keys])


def read(path: Path | str) -> pd.DataFrame:
    """Read the table of each setting's newest run in a file, in the order of finishing.

    Any code may have made them, and a sweep may be at work. Raises `ResultsError` for a file that
    is damaged or no file of runs.
    """
    if not Path(path).is_file():
        raise ResultsError(Path(path), "is no file", remedy="name a file that a sweep has written")
    with _opened(path) as file:
        # With max(), SQLite takes the other columns from the row that has it.
        query = f"SELECT {_COLUMNS}, max(id) FROM runs WHERE results != '' GROUP BY setting"
        return _table([row[:-1] for row in file.execute(f"{query} ORDER BY max(id)")])


class _Store:
    """Has the runs of one code in a file."""

    def __init__(self, file: sqlite3.Connection, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint
        self._origin = metadata.version(_ROOT.name), _revision(), fingerprint

    def rows(self, *, finished: bool = True) -> dict[str, tuple[str, ...]]:
        """The rows of finished runs, or of those that are only begun, by the key of a setting."""
        query = f"SELECT {_COLUMNS} FROM runs WHERE fingerprint = ? AND (results != '') = ?"
        return {row[0]: row for row in self._file.execute(query, [self._fingerprint, finished])}

    def begin(self, keys: Iterable[str]) -> set[str]:
        """Keep that runs are begun; give those that nobody has begun before."""
        rows = [(key, "", *self._origin) for key in keys]
        with self._file as file:
            return {row[0] for row in rows if file.execute(_INSERT.format("IGNORE"), row).rowcount}

    def put(self, keys: Iterable[str], results: Iterable[str]) -> None:
        """Keep finished runs, all or none."""
        rows = [(*run, *self._origin) for run in zip(keys, results, strict=True)]
        with self._file as file:
            file.executemany(_INSERT.format("REPLACE"), rows)


def _batches(settings: dict[str, R], size: int) -> list[dict[str, R]]:
    """At most ``size`` settings of one problem at a time."""
    groups = defaultdict(list)
    for key, setting in settings.items():
        groups[getattr(setting, "problem", None)].append((key, setting))
    return [dict(g[i : i + size]) for g in groups.values() for i in range(0, len(g), size)]


def _finished(
    work: Callable[..., Any], batches: list[dict[str, R]], store: _Store, executor: Executor | None
) -> Iterator[tuple[dict[str, R], Any]]:
    """Batches with their results, in the order of finishing; last what another sweep has begun."""
    if executor is None:
        while batches:
            begun = store.rows(finished=False).keys()
            free = (i for i, batch in enumerate(batches) if not begun & batch.keys())
            batch = batches.pop(next(free, -1))
            done = store.rows()
            if left := {key: setting for key, setting in batch.items() if key not in done}:
                store.begin(left)
                yield left, work([*left.values()])
        return
    own = store.begin(key for batch in batches for key in batch)
    ordered = [batch for batch in batches if batch.keys() <= own]
    # The rest backwards, so that two sweeps meet in the middle.
    ordered += [batch for batch in reversed(batches) if not batch.keys() <= own]
    waiting = {executor.submit(work, [*batch.values()]): batch for batch in ordered}
    try:
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
            kept = store.rows().keys()
            waiting = {f: b for f, b in waiting.items() if not (b.keys() <= kept and f.cancel())}
    finally:
        for future in waiting:
            future.cancel()


def _texts(keys: list[str], results: Any) -> list[str]:
    """Results as they are kept; refuse what makes no table with the settings."""
    fits = isinstance(results, Sequence) and all(isinstance(one, Record) for one in results)
    if not fits or len(results) != len(keys):
        allowed = f"a function that returns a list of sweeps.Results, here {len(keys)}"
        raise InputError("work", allowed=allowed, value=results)
    texts = [result.model_dump_json() for result in results]
    names = _table([(*run, "", "") for run in zip(keys, texts, strict=True)]).columns
    if twice := [*names[names.duplicated()].unique()]:
        raise InputError("columns", allowed="of different names", given=f"two {', '.join(twice)}")
    return texts


def _table(rows: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    parts = [pd.json_normalize([json.loads(row[i]) for row in rows]) for i in (0, 1)]
    table = pd.concat(parts, axis=1).map(lambda cell: tuple(cell) if type(cell) is list else cell)
    origin = pd.DataFrame([row[2:] for row in rows], columns=["version", "revision"])
    # A kind stands in the column of the record that has it.
    names = (str(name).removesuffix(".kind").rpartition(".")[2] for name in table)
    return pd.concat([table.set_axis([*names], axis=1), origin], axis=1)


@contextmanager
def _opened(path: Path | str | None) -> Iterator[sqlite3.Connection]:
    """The file of runs, or one in memory; SQLite's errors become this package's own."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        # Readers and writers wait for each other, a minute at most.
        with closing(sqlite3.connect(path or ":memory:", timeout=60)) as file:
            if not (tables := file.execute(_TABLES).fetchall()):
                file.execute(f"CREATE TABLE IF NOT EXISTS {_SCHEMA}")
            elif tables != [(f"CREATE TABLE {_SCHEMA}",)]:
                raise ResultsError(Path(path or ""), "is no file of runs", remedy="name another")
            yield file
    except sqlite3.Error as error:
        remedy = "make room or name another file; what was finished is kept"
        raise ResultsError(Path(path or ""), f"cannot be used ({error})", remedy=remedy) from error


@functools.cache
def _fingerprint(work: Callable[..., Any], modules: frozenset[str] = frozenset()) -> str:
    """Digest the code that makes results, as `run` says; modules are those of the records."""
    if not inspect.isfunction(work) or work.__name__ == "<lambda>":
        raise InputError("work", allowed="a function that has a name", value=work)
    module = sys.modules[work.__module__]
    start = sorted(modules - {module.__name__, "__main__"})
    own = ""
    if hasattr(module, "__file__"):
        start.append(module.__spec__.name if module.__spec__ else module.__name__)
    else:
        named = inspect.getclosurevars(work).globals.values()
        start += [getattr(one, "__module__", getattr(one, "__name__", "")) or "" for one in named]
        own = _code.digest(ast.parse(textwrap.dedent(inspect.getsource(work))))
    reached = _code.reach(start, _places(work.__module__))
    versions = [(d.name, d.version) for d in metadata.distributions() if d.name in _LIBRARIES]
    code = own, sorted((name, module.digest) for name, module in reached.items())
    return _code.digest(f"{start if not own else ''} {work.__qualname__} {code} {sorted(versions)}")


def _places(module: str) -> dict[str, Path]:
    """Top-level modules whose code counts: this package, ``module``'s, and what is not installed.

    They are looked for, since which of them are loaded already is chance.
    """
    installed = {Path(folder).resolve() for folder in sysconfig.get_paths().values()}
    places = {}
    for folder in (Path(folder).resolve() for folder in reversed(sys.path)):
        if folder.is_dir() and not installed & {folder, *folder.parents}:
            for path in folder.iterdir():
                if path.suffix == ".py" or (path / "__init__.py").is_file():
                    places[path.stem] = path
    top = module.partition(".")[0]
    if file := getattr(sys.modules.get(top), "__file__", None):  # a program is not found by name
        path = Path(file).resolve()
        if not installed & {*path.parents}:
            places[top] = path.parent if path.name == "__init__.py" else path
    return places | {_ROOT.name: _ROOT}


@functools.cache
def _revision() -> str:
    """The git revision of this package if it is a checkout."""
    if not (_ROOT.parent / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True).stdout.strip()
