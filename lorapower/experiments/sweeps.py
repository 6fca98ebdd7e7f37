"""Run settings and make one tidy table, kept batch by batch and resumable.

A setting is a `Record`, often with a ``problem`` and a ``method``; a run gives `Results`. Fields of
both, and of records in them, are columns. The ``kind`` of a nested record is the column of the
field that holds it: ``method=Lora(ranks=2)`` gives ``method`` ``"lora"`` and ``ranks`` 2. Fields
that the method of a row lacks are missing values. The ``version`` and git ``revision`` of the
package that made a row end it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from .._records import Record, Results
from ..errors import InputError, ResultsError

__all__ = ["Record", "Results", "columns", "grid", "read", "run"]

R = TypeVar("R", bound=Record)
_ROOT = Path(__file__).parent.parent
# Distributions whose versions can change a result.
_LIBRARIES = {"numba", "numpy", "peft", "scikit-learn", "scipy", "torch", "transformers"}
_COLUMNS = "setting, results, version, revision"
_INSERT = f"INSERT OR REPLACE INTO runs ({_COLUMNS}, fingerprint) VALUES (?, ?, ?, ?, ?)"
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
        repeated unless code has changed: any byte of this package's files, comments too, or of the
        Python files in the folder of ``work``, its own text if it is in a notebook, or the version
        of a library that computes. `book` never counts, `checkpoints` not if ``work`` is of this
        package. What else ``work`` calls, or reads from variables and files, is not noticed.
    executor : concurrent.futures.Executor, optional
        Runs the batches; without one they run here, one after another. Dask's is
        ``Client(address).get_executor()``. Whether workers have the same code is not checked.
    """
    if not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    keys = [setting.model_dump_json(serialize_as_any=True) for setting in settings]
    fingerprint = _fingerprint(work) if path else ""
    origin = (metadata.version(_ROOT.name), _revision())
    with _opened(path) as file:
        query = f"SELECT {_COLUMNS} FROM runs WHERE fingerprint = ?"
        rows = {row[0]: row for row in file.execute(query, [fingerprint])}
        missing = {k: s for k, s in zip(keys, settings, strict=True) if k not in rows}
        total, done = len({*keys}), len({*keys} - {*missing})
        with tqdm(total=total, initial=done, unit="run", disable=not progress) as bar:
            for batch, results in _finished(work, missing, size, executor):
                _require_fit([missing[key] for key in batch], results)
                texts = [result.model_dump_json() for result in results]
                new = [(key, text, *origin) for key, text in zip(batch, texts, strict=True)]
                with file:
                    file.executemany(_INSERT, [(*row, fingerprint) for row in new])
                rows |= {row[0]: row for row in new}
                bar.update(len(batch))
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
        query = f"SELECT {_COLUMNS}, max(id) FROM runs GROUP BY setting ORDER BY max(id)"
        return _table([row[:-1] for row in file.execute(query)])


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


def _finished(
    work: Callable[..., Any], settings: dict[str, Any], size: int, executor: Executor | None
) -> Iterator[tuple[list[str], Any]]:
    """Keys of batches, each of one problem, with their results, in the order of finishing."""
    groups = defaultdict(list)
    for key, setting in settings.items():
        groups[getattr(setting, "problem", None)].append(key)
    batches = [keys[i : i + size] for keys in groups.values() for i in range(0, len(keys), size)]
    given = [[settings[key] for key in batch] for batch in batches]
    if executor is None:
        yield from zip(batches, map(work, given), strict=True)
        return
    futures = {executor.submit(work, one): keys for one, keys in zip(given, batches, strict=True)}
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
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError("columns", allowed="of different names", given=f"two {', '.join(twice)}")


def _table(rows: list[Any]) -> pd.DataFrame:
    settings, results = (pd.DataFrame([_cells(json.loads(row[i])) for row in rows]) for i in (0, 1))
    origin = pd.DataFrame([row[2:] for row in rows], columns=["version", "revision"])
    return pd.concat([settings, results, origin], axis=1)


def _cells(values: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The cells of a record by column; ``name`` is the field that holds it."""
    cells: dict[str, Any] = {}
    for field, value in values.items():
        if isinstance(value, dict):
            cells |= _cells(value, field)
        else:
            column = name if field == "kind" else field
            cells[column] = tuple(value) if isinstance(value, list) else value
    return cells


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
    home = getattr(sys.modules[work.__module__], "__file__", None)
    files = {*_ROOT.rglob("*.py")} - {*_ROOT.glob("book/**/*.py")}
    if work.__module__.startswith(f"{_ROOT.name}."):
        files -= {*_ROOT.glob("checkpoints/**/*.py")}
    elif home:
        files |= {*Path(home).resolve().parent.glob("*.py")}
    versions = {d.name: d.version for d in metadata.distributions() if d.name in _LIBRARIES}
    about = f"{work.__module__}.{work.__qualname__} {sorted(versions.items())}"
    own = "" if home else inspect.getsource(work)
    contents = [about.encode(), own.encode(), *(file.read_bytes() for file in sorted(files))]
    return hashlib.blake2b(b"".join(contents), digest_size=8).hexdigest()


@functools.cache
def _revision() -> str:
    """The git revision of this package if it is a checkout."""
    if not (_ROOT.parent / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True).stdout.strip()
