"""Run settings and make one tidy table, kept batch by batch and resumable.

A setting is a `Record`, often with a ``problem`` and a ``method``; a run gives `Results`. Fields of
both, and of records in them, are columns. The ``kind`` of a nested record is the column of the
field that holds it: ``method=Trained(ranks=2)`` gives ``method`` ``"trained"`` and ``ranks`` 2.
Fields that the method of a row lacks are missing values. Columns of settings come first, then those
of results, the ``version`` and the git ``revision`` of the package that made the row.

Batches run through joblib: side by side in ``with joblib.parallel_config(n_jobs=2):``, on a cluster
in ``with joblib.parallel_config("dask"):`` beside its ``distributed.Client(address)``.
"""

from __future__ import annotations

import ast
import functools
import gzip
import inspect
import itertools
import json
import math
import platform
import sqlite3
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import joblib
import pandas as pd
from tqdm import tqdm

from .. import _code
from .._records import Record, Results
from ..errors import InputError, ResultsError

__all__ = ["Record", "Results", "grid", "recorded", "run"]

R = TypeVar("R", bound=Record)
_ROOT = Path(__file__).parent.parent
# Between processors, runs of a few hundred steps differ by up to some 10⁻⁷, and exact fits by their
# rounding; a change of one of Adam's constants by a thousandth shows as 10⁻⁴ after twenty steps.
_RTOL, _ATOL = 1e-5, 1e-20
# Distributions whose versions can change a result.
_LIBRARIES = {"numpy", "peft", "scikit-learn", "scipy", "torch", "transformers"}
_COLUMNS = "setting, results, version, revision"
_SCHEMA = """runs (
    id INTEGER PRIMARY KEY, setting TEXT NOT NULL, results TEXT NOT NULL, version TEXT NOT NULL,
    revision TEXT NOT NULL, seconds REAL NOT NULL, fingerprint TEXT NOT NULL,
    UNIQUE (setting, fingerprint)
)"""
_INSERT = f"INSERT OR REPLACE INTO runs ({_COLUMNS}, seconds, fingerprint) VALUES (?,?,?,?,?,?)"
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
        Several sweeps may use a file at a time.
    """
    return _table([row[:4] for row in _run(settings, work, path, size, progress)])


def _run(
    settings: Sequence[R],
    work: Callable[[list[R]], Sequence[Record]],
    path: Path | str | None,
    size: int = 256,
    progress: bool = True,
) -> list[tuple[Any, ...]]:
    """Run as `run` does; give rows of texts and the seconds of a processor that each took."""
    if not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    keys = [_write(setting) for setting in settings]
    given = dict(zip(keys, settings, strict=True))
    with _opened(path) as file:
        parts = (one for setting in settings for one in (setting, *dict(setting).values()))
        modules = frozenset(type(one).__module__ for one in parts if isinstance(one, Record))
        store = _Store(file, _fingerprint(work, modules) if path else "")
        kept = store.rows()
        batches = _batches({key: given[key] for key in given if key not in kept}, size)
        done = len(given) - sum(map(len, batches))
        runs = joblib.Parallel(return_as="generator_unordered", pre_dispatch="2 * n_jobs")
        finished = runs(joblib.delayed(_time)(work, batch) for batch in batches)
        with tqdm(total=len(given), initial=done, unit="run", disable=not progress) as bar:
            for batch, results, seconds in finished:
                store.put([*batch], _texts([*batch], results), seconds / len(batch))
                bar.update(len(batch))
        rows = store.rows()
    return [rows[key] for key in keys]


def _write(record: Record) -> str:
    """Write a record, with all records in it, as the text under which its run is kept."""
    return record.model_dump_json(serialize_as_any=True)


def recorded(
    file: Path | str,
    settings: Sequence[R],
    work: Callable[[list[R]], Sequence[Record]],
    path: Path | str | None = None,
    *,
    protocol: str,
    again: bool = False,
    repeat: int | Sequence[int] = 0,
) -> pd.DataFrame:
    """Give the table of `run` from a record of the runs, of which some are repeated.

    ``file``, compressed lines of JSON, has what made the runs and then one run a line. Where it
    lacks one or more of the settings, all are run, kept in ``path``, without a record. A line of
    text says which it was. Raises as `run` does, `ResultsError` if a repeated run differs, and
    `InputError` for a new record of some of the recorded settings.

    Parameters
    ----------
    protocol : str
        What was run, in a sentence or two, which is kept and said.
    again : bool
        Run everything, and write the record.
    repeat : int or sequence of int
        The indices of settings that are run once more, each alone and nowhere kept. Their results
        equal the recorded ones but for rounding: numbers to 10⁻⁵, or 10⁻²⁰ absolute. None
        where this machine lacks what the runs were made of. Where the record has other settings
        besides, nothing is repeated.
    """
    place = Path(file)
    kept = _read_record(place)
    keys = [json.dumps(json.loads(_write(setting)), sort_keys=True) for setting in settings]
    missing, others = sum(key not in kept for key in keys), len(kept.keys() - {*keys})
    if again:
        if others and not missing:
            remedy = "delete the record first, if it is to have no others"
            given = f"{len(keys)} of {len(kept)}"
            raise InputError("settings", allowed="all recorded ones", given=given, remedy=remedy)
        rows, end = _run(settings, work, path), "were made now"
        _write_record(place, rows, protocol)
    elif missing:
        print(f"Not all of these runs are in a record: {len(keys)} start now.")
        return run(settings, work, path)
    else:
        rows = [kept[key] for key in keys]
        chosen = [repeat] if isinstance(repeat, int) else [*repeat]
        for index in [] if others else chosen:
            _repeat(place, rows[index], settings[index], work)
        end = f"read from a record; {_say_repeated(len(chosen), others)}"
    seconds = sum(row[-1] for row in rows)
    took = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    said = f"{protocol} {len(rows)} runs, {took} of a processor, {end}."
    print(textwrap.fill(said, 72))  # no wider than a page
    return _table([row[:4] for row in rows])


def _say_repeated(number: int, others: int) -> str:
    if others:
        return f"{others} others are left out, and nothing was repeated"
    if not number:
        return "none can be repeated here"
    return f"{number} of them, repeated now, {'is' if number == 1 else 'are'} equal"


def _write_record(file: Path, rows: Sequence[tuple[Any, ...]], protocol: str) -> None:
    """Write what made runs and the runs, whole or not at all."""
    libraries = {d.name: d.version for d in metadata.distributions() if d.name in _LIBRARIES}
    about = {"protocol": protocol, "processor": platform.machine(), "libraries": libraries}
    lines = [json.dumps(about, sort_keys=True)]
    for setting, results, version, revision, seconds in rows:
        origin = f'"version": "{version}", "revision": "{revision}", "seconds": {seconds:.2g}'
        lines.append(f'{{"setting": {setting}, "results": {results}, {origin}}}')
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    partial.replace(file)


def _read_record(file: Path) -> dict[str, tuple[Any, ...]]:
    """The runs of a record by setting; none of a file that is not there."""
    if not file.is_file():
        return {}
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()[1:]
    runs = {}
    for run in map(json.loads, lines):
        texts = json.dumps(run["setting"]), json.dumps(run["results"])
        row = *texts, run["version"], run["revision"], run["seconds"]
        runs[json.dumps(run["setting"], sort_keys=True)] = row
    return runs


def _repeat(file: Path, row: tuple[Any, ...], setting: R, work: Callable[..., Any]) -> None:
    """Run a setting once more; refuse results other than the recorded ones."""
    found = json.loads(_texts([_write(setting)], work([setting]))[0])
    wanted = json.loads(row[1])
    if differ := [name for name in wanted | found if not _equal(wanted.get(name), found.get(name))]:
        name, *_ = differ
        raise ResultsError(
            file,
            f"holds {name} = {wanted.get(name)} of a run that now gives {found.get(name)}",
            remedy="if the new code is right, make the record again: make book PROFILE=paper",
        )


def _equal(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_equal, wanted, found))
    if isinstance(wanted, float) and isinstance(found, float):
        near = math.isclose(wanted, found, rel_tol=_RTOL, abs_tol=_ATOL)
        return near or (math.isnan(wanted) and math.isnan(found))
    return type(wanted) is type(found) and bool(wanted == found)


class _Store:
    """Has the runs of one code in a file."""

    def __init__(self, file: sqlite3.Connection, fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint
        self._origin = metadata.version(_ROOT.name), _revision()

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """The rows of finished runs, by the key of a setting."""
        query = f"SELECT {_COLUMNS}, seconds FROM runs WHERE fingerprint = ?"
        return {row[0]: row for row in self._file.execute(query, [self._fingerprint])}

    def put(self, keys: Sequence[str], results: Sequence[str], seconds: float) -> None:
        """Keep finished runs, all or none."""
        runs = zip(keys, results, strict=True)
        rows = [(*run, *self._origin, seconds, self._fingerprint) for run in runs]
        with self._file as file:
            file.executemany(_INSERT, rows)


def _batches(settings: dict[str, R], size: int) -> list[dict[str, R]]:
    """At most ``size`` settings of one problem at a time."""
    groups = defaultdict(list)
    for key, setting in settings.items():
        groups[getattr(setting, "problem", None)].append((key, setting))
    return [dict(g[i : i + size]) for g in groups.values() for i in range(0, len(g), size)]


def _time(work: Callable[..., Any], batch: dict[str, R]) -> tuple[dict[str, R], Any, float]:
    """A batch with its results and the seconds of a processor that they took."""
    start = time.process_time()
    return batch, work([*batch.values()]), time.process_time() - start


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
