"""Run settings and make one tidy table, kept batch by batch and resumable.

A setting is a `Record`, often with a ``problem`` and a ``method``; a run gives `Results`. Fields of
both, and of records in them, are columns. The ``kind`` of a nested record is the column of the
field that holds it: ``method=Lora(ranks=2)`` gives ``method`` ``"lora"`` and ``ranks`` 2. Fields
that the method of a row lacks are missing values. The ``version`` and git ``revision`` of the
package that made a row end it.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import _code
from .._records import Record, Results
from ..errors import InputError, ResultsError

__all__ = ["Record", "Results", "columns", "grid", "read", "run"]

R = TypeVar("R", bound=Record)
_ROOT = Path(__file__).parent.parent
# Distributions whose versions can change a result.
_LIBRARIES = {"numpy", "peft", "scikit-learn", "scipy", "torch", "transformers"}
_COLUMNS = "setting, results, version, revision"
# A run that somebody has begun has no results yet.
_SCHEMA = """CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, version TEXT NOT NULL,
    revision TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (setting, fingerprint)
)"""


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Make the records of the Cartesian product of ``values``, the last keyword varying fastest.

    A list, a range or an array is an axis. Any other value, such as a tuple or a record, is the
    same for all: ``grid(Setting, problem=grid(Problem, seed=range(3)), method=Lora(ranks=2))``.
    Raises `InputError` for an empty axis and as ``record`` does.
    """
    axes = []
    for name, value in values.items():
        axis = value.tolist() if isinstance(value, np.ndarray) else value
        axes.append(axis if isinstance(axis, list | range) else [axis])
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
        module of ``work`` or in one that it imports, at any remove, of this package or from outside
        the environment; comments and docstrings do not count. Of a ``work`` in a notebook its own
        code counts, and the modules that it names. What it reads from variables and files does not.
        Several sweeps may use a file at a time: without an executor each leaves for last what
        another has begun.
    executor : concurrent.futures.Executor, optional
        Runs the batches; without one they run here, one after another. Dask's is
        ``Client(address).get_executor()``. Whether workers have the same code is not checked.
    """
    if not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    keys = [setting.model_dump_json(serialize_as_any=True) for setting in settings]
    given = dict(zip(keys, settings, strict=True))
    with _opened(path) as file:
        store = _Store(file, _fingerprint(work) if path else "")
        kept = store.rows()
        batches = _batches({key: given[key] for key in given if key not in kept}, size)
        done = len(given) - sum(map(len, batches))
        with tqdm(total=len(given), initial=done, unit="run", disable=not progress) as bar:
            for batch, results in _finished(work, batches, store, executor):
                _require_fit([*batch.values()], results)
                store.put([*batch], [result.model_dump_json() for result in results])
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


def columns(record: type[Record], name: str = "") -> list[str]:
    """List the columns that settings of a class have in a table, of all kinds of its fields."""
    names = []
    for field, about in record.model_fields.items():
        kinds = [kind for kind in (about.annotation, *get_args(about.annotation)) if _nested(kind)]
        inner = [column for kind in kinds for column in columns(kind, field)]
        names += [*dict.fromkeys(inner)] or [name if field == "kind" else field]
    return names


def _nested(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Record)


class _Store:
    """Has the runs of one code in a file."""

    def __init__(self, file: sqlite3.Connection, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint

    def rows(self, *, finished: bool = True) -> dict[str, tuple[str, ...]]:
        """The rows of finished runs, or of those that are only begun, by the key of a setting."""
        query = f"SELECT {_COLUMNS} FROM runs WHERE fingerprint = ? AND (results != '') = ?"
        return {row[0]: row for row in self._file.execute(query, [self._fingerprint, finished])}

    def put(self, keys: Sequence[str], results: Sequence[str] | None = None) -> None:
        """Keep runs, all or none; without results, that they are begun if they were not."""
        origin = (metadata.version(_ROOT.name), _revision(), self._fingerprint)
        texts = [""] * len(keys) if results is None else results
        rows = [(*run, *origin) for run in zip(keys, texts, strict=True)]
        insert = f"INSERT OR {'IGNORE' if results is None else 'REPLACE'} INTO runs"
        with self._file as file:
            file.executemany(f"{insert} ({_COLUMNS}, fingerprint) VALUES (?, ?, ?, ?, ?)", rows)


def _batches(settings: dict[str, R], size: int) -> list[dict[str, R]]:
    """At most ``size`` settings of one problem at a time."""
    groups = defaultdict(list)
    for key, setting in settings.items():
        groups[getattr(setting, "problem", None)].append((key, setting))
    return [dict(g[i : i + size]) for g in groups.values() for i in range(0, len(g), size)]


def _finished(
    work: Callable[..., Any], batches: list[dict[str, R]], store: _Store, executor: Executor | None
) -> Iterator[tuple[dict[str, R], Any]]:
    """Batches with their results, in the order of finishing."""
    if executor is None:
        while batches:
            begun = store.rows(finished=False)
            free = (i for i, batch in enumerate(batches) if not begun.keys() & batch.keys())
            batch = batches.pop(next(free, 0))
            done = store.rows()
            if left := {key: setting for key, setting in batch.items() if key not in done}:
                store.put([*left])
                yield left, work([*left.values()])
        return
    futures = {executor.submit(work, [*batch.values()]): batch for batch in batches}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def _require_fit(settings: list[Any], results: Any) -> None:
    """Refuse results that make no table with the settings."""
    fits = isinstance(results, Sequence) and all(_nested(type(one)) for one in results)
    if not fits or len(results) != len(settings):
        allowed = f"a function that returns a list of sweeps.Results, here {len(settings)}"
        raise InputError("work", allowed=allowed, value=results)
    names = [*columns(type(settings[0])), *type(results[0]).model_fields, "version", "revision"]
    if twice := [*dict.fromkeys(name for name in names if names.count(name) > 1)]:
        raise InputError("columns", allowed="of different names", given=f"two {', '.join(twice)}")


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
            file.execute(_SCHEMA)
            yield file
    except sqlite3.Error as error:
        remedy = "make room or name another file; what was finished is kept"
        raise ResultsError(Path(path or ""), f"cannot be used ({error})", remedy=remedy) from error


@functools.cache
def _fingerprint(work: Callable[..., Any]) -> str:
    """Digest the code that makes results, as `run` says."""
    if not inspect.isfunction(work) or work.__name__ == "<lambda>":
        raise InputError("work", allowed="a function that has a name", value=work)
    module = sys.modules[work.__module__]
    own = ""
    if hasattr(module, "__file__"):
        start = [module.__spec__.name if module.__spec__ else module.__name__]
    else:
        named = inspect.getclosurevars(work).globals.values()
        start = [getattr(one, "__module__", getattr(one, "__name__", "")) or "" for one in named]
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
