"""Sweeps: settings as validated records → runs → one tidy table, written as it goes, resumable.

A record is an instance of a dataclass whose fields are declared as ``int``, ``float``, ``str``,
``bool``, ``None``, tuples of these or unions of them, and which raises `InputError` in
``__post_init__`` for settings that are not usable. What a run does with its record is the caller's
``work``; nothing here knows of networks.

A table has one row per run and three groups of columns: the record's fields, the results, and what
made them: ``version`` of the package and git ``revision`` of its code. Numbers, truth values and
texts are columns of their own type, with missing values where they are ``None``. A field that may
be a tuple, or of more than one type, is a column of JSON texts: ``(2, 4, 8)`` is ``"[2, 4, 8]"``,
and ``3`` beside it is ``"3"``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import (
    Callable,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from contextlib import closing, contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import filelock
import numpy as np
import pandas as pd
import pyarrow
from tqdm import tqdm

from .. import _checks
from ..errors import InputError, ResultsError

if TYPE_CHECKING:
    from distributed import Client

R = TypeVar("R")
Results = Mapping[str, float | int | str | bool | None]
Work = Callable[[list[R]], Sequence[Results]]
Origin = tuple[str, str]
Done = Generator[tuple[list[R], Sequence[Results], Origin]]
Key = tuple[Any, ...]
Row = dict[str, Any]

FORMAT = 1
ORIGIN = {"version": "str", "revision": "str"}
MANIFEST, LOCK, UNFINISHED = "sweep.json", "sweep.lock", ".unfinished"
PART = re.compile(r"part-[0-9a-f]{16}\.parquet")
JSON = "json"
SCALARS = {int, float, str, bool, NoneType}
DTYPES = {"int64", "Int64", "float64", "bool", "boolean", "str", "object", JSON}


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Records for the Cartesian product of ``values``, the last keyword varying fastest.

    A list, a range or a one-dimensional array is an axis; any other value, a tuple among them, is
    one setting for all. Raises `InputError` for names that ``record`` does not have, for those that
    it needs and that are not given, for an empty axis, and what ``record`` itself raises.
    """
    settings = [f for f in _fields(record) if f.init]
    known = [f.name for f in settings]
    if unknown := [name for name in values if name not in known]:
        raise InputError(
            "settings",
            allowed=f"among {', '.join(known)} (of {record.__name__})",
            given=", ".join(unknown),
        )
    needed = [f.name for f in settings if f.default is f.default_factory is MISSING]
    if absent := [name for name in needed if name not in values]:
        raise InputError(
            "settings",
            allowed=f"given for {', '.join(needed)} (of {record.__name__})",
            given=f"none for {', '.join(absent)}",
        )
    axes = [_axis(name, value) for name, value in values.items()]
    return [record(**dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def run(
    records: Sequence[R],
    work: Work[R],
    folder: Path | str | None = None,
    *,
    batch: Callable[[R], Hashable] = lambda record: None,
    size: int = 64,
    scheduler: str | Client | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per record, in the order of ``records``: its fields, its results, what made them.

    Parameters
    ----------
    records : of one type and different from one another.
    work : takes a list of records and returns as many mappings from the names of results to
        numbers, truth values, texts or ``None``; the names are the same for all.
    folder : keeps the finished runs, each batch in a file that is there whole or not at all. Runs
        that it holds already are not repeated, whatever ended the sweep that made them, and those
        that are not asked for stay. By default nothing is kept.
    batch, size : missing records of which ``batch`` returns the same go to ``work`` together, at
        most ``size`` at a time.
    scheduler : address of a dask scheduler, or a client, on whose workers the batches run; what a
        worker that dies had not delivered runs again on another. By default they run here.
    progress : shows the runs done and the time remaining.

    Raises `InputError` for records, sizes or a scheduler that are not usable, and when ``work``
    returns something else; `ResultsError` when ``folder`` holds something else than this package's
    results for such records, is in use by another sweep or cannot be written. What ``work`` raises
    ends the sweep. In each case finished batches are kept, and the same call resumes.
    """
    if not isinstance(records, Sequence):
        raise InputError("records", allowed="a list, as `grid` makes it", given=repr(records))
    table = _Table.of(records)
    keys = table.keys(records)
    size = _checks.integer("size", size, 1)
    if not callable(batch):
        raise InputError("batch", allowed="a function of a record", given=repr(batch))
    place = None if folder is None else Path(folder)
    with _client(scheduler) as client, _opened(place, table, type(records[0])) as finished:
        missing = [r for r, key in zip(records, keys, strict=True) if key not in finished.rows]
        batches = _batches(missing, batch, size)
        with (
            closing(_on(client, work, batches) if client else _here(work, batches)) as done,
            tqdm(
                total=len(records),
                initial=len(records) - len(missing),
                unit="run",
                smoothing=0,
                disable=not progress,
            ) as bar,
        ):
            for members, results, origin in done:
                finished.add(table.keys(members), results, origin)
                bar.update(len(members))
        return finished.frame(keys)


def read(folder: Path | str) -> pd.DataFrame:
    """All finished runs that ``folder`` holds, sorted by their settings.

    Also while a sweep is at work in it, and whichever version of the package wrote it. Raises
    `ResultsError` when it holds something else than the results of a sweep.
    """
    place = Path(folder)
    if not (place / MANIFEST).is_file():
        raise ResultsError(
            place, f"has no {MANIFEST}", remedy="name a folder that a sweep has written"
        )
    manifest = _manifest(place / MANIFEST)
    finished = _Finished(_Table(manifest["record"], manifest["fields"]), place)
    finished.load(_parts(place))
    frame = finished.frame(finished.rows)
    return frame.sort_values(list(manifest["fields"]), ignore_index=True)


@dataclass(frozen=True)
class _Table:
    """The columns of a kind of record: how each field is stored, and the types declared for it."""

    record: str
    dtypes: dict[str, str]
    declared: dict[str, frozenset[type]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Any]) -> _Table:
        if not records:
            raise InputError("records", allowed="at least one", given="none")
        record, *others = {type(record) for record in records}
        if others:
            given = ", ".join(sorted(kind.__name__ for kind in (record, *others)))
            raise InputError("records", allowed="of one type", given=given)
        names = [f.name for f in _fields(record)]
        if taken := [name for name in names if name in ORIGIN]:
            raise InputError(
                f"fields of {record.__name__}",
                allowed=f"other than {' and '.join(ORIGIN)}, which are columns of each table",
                given=", ".join(taken),
            )
        hints = get_type_hints(record)
        declared = {name: _declared(f"{record.__name__}.{name}", hints[name]) for name in names}
        dtypes = {name: _dtype(kinds) for name, kinds in declared.items()}
        return cls(record.__name__, dtypes, declared)

    def key(self, record: Any) -> Key:
        """The values of a record's fields, each of a type that is declared for it."""
        return tuple(self._value(name, getattr(record, name)) for name in self.dtypes)

    def keys(self, records: Sequence[Any]) -> list[Key]:
        """The key of each record; raises `InputError` where two are the same."""
        keys = [self.key(record) for record in records]
        (key, count), *_ = Counter(keys).most_common(1)
        if count > 1:
            raise InputError(
                "records",
                allowed="different from one another",
                given=f"{count} times {records[keys.index(key)]!r}",
            )
        return keys

    def _value(self, name: str, value: Any) -> Any:
        declared, value = self.declared[name], _plain(value)
        kind = float if type(value) is int and int not in declared else type(value)
        usable = _is_setting(value) and kind in declared
        if usable and self.dtypes[name] == "float64" and value is not None:
            usable = float(value) == value
            value = float(value)
        if not usable:
            raise InputError(
                f"{self.record}.{name}",
                allowed=f"of type {_names(declared)}, as it is declared, no NaN and within 64 bits",
                given=repr(value),
            )
        return value


class _Finished:
    """Finished runs: results and origin by the key of their record, and the folder they are in."""

    def __init__(self, table: _Table, folder: Path | None) -> None:
        self.table, self.folder = table, folder
        self.rows: dict[Key, Row] = {}
        self.types: dict[str, set[type]] = {}

    def frame(self, keys: Iterable[Key]) -> pd.DataFrame:
        """The table of these runs."""
        return self._frame([(key, self.rows[key]) for key in keys])

    def add(self, keys: list[Key], results: Any, origin: Origin) -> None:
        """Check and keep what a batch has given, in the folder first."""
        rows = self._admit(results, len(keys))
        made = dict(zip(ORIGIN, origin, strict=True))
        runs = [(key, row | made) for key, row in zip(keys, rows, strict=True)]
        if self.folder:
            digest = hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).hexdigest()
            data = self._frame(runs).to_parquet(index=False, write_page_checksum=True)
            _write(self.folder / f"part-{digest}.parquet", data)
        self.rows.update(runs)

    def load(self, parts: list[Path], record: type | None = None) -> None:
        """Read these files; where ``record`` is given, each of their runs must be one of it."""
        for path in parts:
            try:
                self._load(path, record)
            except (TypeError, ValueError) as error:
                raise ResultsError(
                    path,
                    f"is torn or from elsewhere ({error})",
                    remedy="move it out of the folder; runs that are then missing are done again",
                ) from error

    def _admit(self, results: Any, count: int) -> list[Row]:
        """Results of ``count`` runs; raises `InputError` unless they fit one table with ours."""
        promise = "a function that returns"
        try:
            rows = [{name: _plain(value) for name, value in row.items()} for row in results]
        except (AttributeError, TypeError) as error:
            raise InputError(
                "work", allowed=f"{promise} a list of mappings", given=repr(results)
            ) from error
        if len(rows) != count:
            raise InputError(
                "work",
                allowed=f"{promise} one mapping for each of its {count} records",
                given=len(rows),
            )
        names = list(self.types or rows[0])
        if not names:
            raise InputError("work", allowed=f"{promise} at least one result", given="none")
        for row in rows:
            if row.keys() != set(names):
                raise InputError(
                    "names of results",
                    allowed=f"the same in all runs: {', '.join(map(str, names))}",
                    given=", ".join(map(str, row)) or "none",
                )
        for name in names:
            if not isinstance(name, str) or name in self.table.dtypes | ORIGIN:
                raise InputError(
                    "names of results",
                    allowed=f"texts other than {', '.join(self.table.dtypes | ORIGIN)}",
                    given=repr(name),
                )
            if bad := [row[name] for row in rows if not _is_scalar(row[name])]:
                raise InputError(
                    f"result {name}",
                    allowed="a number of at most 64 bits, a truth value, a text or None",
                    given=repr(bad[0]),
                )
        types = {
            name: self.types.get(name, set()) | {type(row[name]) for row in rows} for name in names
        }
        for name, kinds in types.items():
            if _dtype(kinds) == JSON:
                raise InputError(
                    f"result {name}", allowed="of one type in all runs", given=_names(kinds)
                )
        self.types = types
        return [{name: row[name] for name in names} for row in rows]

    def _frame(self, runs: list[tuple[Key, Row]]) -> pd.DataFrame:
        rows = [dict(zip(self.table.dtypes, key, strict=True)) | row for key, row in runs]
        results = {name: _dtype({type(row[name]) for row in rows}) for name in self.types}
        dtypes = self.table.dtypes | results | ORIGIN
        return pd.DataFrame(
            {name: _column([row[name] for row in rows], dtype) for name, dtype in dtypes.items()}
        )

    def _load(self, path: Path, record: type | None) -> None:
        try:
            frame = pd.read_parquet(io.BytesIO(path.read_bytes()), page_checksum_verification=True)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError("it", allowed="a Parquet file", given=error) from error
        settings = self.table.dtypes
        results = [name for name in frame.columns if name not in settings | ORIGIN]
        if list(frame.columns) != [*settings, *results, *ORIGIN] or not results or frame.empty:
            raise InputError(
                "columns",
                allowed=f"{', '.join(settings)}, results, {', '.join(ORIGIN)}",
                given=", ".join(map(str, frame.columns)),
            )
        for name, dtype in (settings | ORIGIN).items():
            stored = "str" if dtype == JSON else dtype
            if frame[name].dtype != stored:
                raise InputError(f"column {name}", allowed=stored, given=frame[name].dtype)
        columns = [[_setting(v, settings[n]) for v in _cells(frame[n])] for n in settings]
        keys = list(zip(*columns, strict=True))
        found = zip(*(_cells(frame[name]) for name in results), strict=True)
        rows = self._admit([dict(zip(results, row, strict=True)) for row in found], len(keys))
        origins = zip(*(_cells(frame[name]) for name in ORIGIN), strict=True)
        for key, row, origin in zip(keys, rows, origins, strict=True):
            row.update(zip(ORIGIN, origin, strict=True))
            if record:
                self._validate(record, key)
            if not _same(self.rows.setdefault(key, row), row):
                raise InputError(
                    "runs",
                    allowed="there once, or with the same results",
                    given=f"{dict(zip(settings, key, strict=True))} again with others",
                )

    def _validate(self, record: type, key: Key) -> None:
        settings = dict(zip(self.table.dtypes, key, strict=True))
        made = record(**{f.name: settings[f.name] for f in _fields(record) if f.init})
        if self.table.key(made) != key:
            raise InputError("settings", allowed=made, given=settings)


def _fields(record: Any) -> tuple[Field[Any], ...]:
    if not is_dataclass(record):
        raise InputError("record", allowed="a dataclass", given=repr(record))
    return fields(record)


def _axis(name: str, value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.ndim > 1:
            raise InputError(name, allowed="of one dimension", given=f"shape {value.shape}")
        value = value.tolist()
    if not isinstance(value, list | range):
        return [value]
    if not value:
        raise InputError(name, allowed="a setting or a list of at least one", given=repr(value))
    return list(value)


def _declared(name: str, hint: Any) -> frozenset[type]:
    """The types that an annotation allows."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return frozenset().union(*(_declared(name, member) for member in get_args(hint)))
    kinds = {type(value) for value in get_args(hint)} if origin is Literal else {origin or hint}
    if not kinds <= SCALARS | {tuple}:
        raise InputError(
            name,
            allowed="declared as int, float, str, bool, None, tuples of these or unions of them",
            given=hint,
        )
    return frozenset(kinds)


def _dtype(kinds: Set[type]) -> str:
    """The type of a column for values of these types."""
    match sorted(kind.__name__ for kind in kinds - {NoneType}):
        case []:
            return "object"
        case ["int"]:
            return "Int64" if NoneType in kinds else "int64"
        case ["float"] | ["float", "int"]:
            return "float64"
        case ["bool"]:
            return "boolean" if NoneType in kinds else "bool"
        case ["str"]:
            return "str"
        case _:
            return JSON


def _names(kinds: Iterable[type]) -> str:
    return " or ".join(sorted(kind.__name__.removesuffix("Type") for kind in kinds))


def _column(values: list[Any], dtype: str) -> pd.Series[Any]:
    if dtype == JSON:
        values = [
            None if value is None else json.dumps(value, ensure_ascii=False) for value in values
        ]
    return pd.Series(values, dtype="str" if dtype == JSON else dtype)


def _cells(column: pd.Series[Any]) -> list[Any]:
    """The values of a column, ``None`` where they are missing; NaN among numbers is none such."""
    if column.dtype == "float64":
        return column.tolist()
    return [None if gone else v for v, gone in zip(column.tolist(), column.isna(), strict=True)]


def _setting(cell: Any, dtype: str) -> Any:
    """A record's field from its cell in the table."""
    if dtype == JSON and cell is not None:
        return _tuples(json.loads(cell))
    return None if cell != cell else cell


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_scalar(value: Any) -> bool:
    return type(value) in SCALARS and not (type(value) is int and not -(2**63) <= value < 2**63)


def _is_setting(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_setting, value))
    # NaN equals nothing, so that a run with it would never be found again.
    return _is_scalar(value) and not (type(value) is float and math.isnan(value))


def _same(one: Row, other: Row) -> bool:
    pairs = ((value, other[name]) for name, value in one.items() if name not in ORIGIN)
    return all(a == b or (a != a and b != b) for a, b in pairs)


def _batches(records: Sequence[R], batch: Callable[[R], Hashable], size: int) -> list[list[R]]:
    groups = defaultdict(list)
    for record in records:
        group = batch(record)
        try:
            groups[group].append(record)
        except TypeError as error:
            raise InputError(
                "batch", allowed="a function whose results are hashable", given=repr(group)
            ) from error
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _with_origin(work: Work[R], batch: list[R]) -> tuple[Sequence[Results], Origin]:
    # A copy, as nobody promises that `work` leaves the order of its list alone.
    return work([*batch]), _origin()


def _here(work: Work[R], batches: list[list[R]]) -> Done[R]:
    for batch in batches:
        yield batch, *_with_origin(work, batch)


def _on(client: Client, work: Work[R], batches: list[list[R]]) -> Done[R]:
    from distributed import as_completed

    futures = {client.submit(_with_origin, work, batch, pure=False): batch for batch in batches}
    try:
        for future in as_completed(futures, loop=client.loop):
            results, origin = future.result()
            if origin[0] != _origin()[0]:
                raise InputError(
                    "scheduler",
                    allowed=f"one whose workers have version {_origin()[0]} of the package",
                    given=origin[0],
                )
            yield futures[future], results, origin
    finally:
        client.cancel(list(futures))


@contextmanager
def _client(scheduler: str | Client | None) -> Iterator[Client | None]:
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            "scheduler",
            allowed="None where dask and distributed are not installed",
            given=repr(scheduler),
            remedy="install them (they are the extra `cluster`)",
        ) from error
    if isinstance(scheduler, Client):
        if scheduler.status != "running":
            raise InputError("scheduler", allowed="a client that is connected", given=scheduler)
        yield scheduler
        return
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            "scheduler",
            allowed="the address of a dask scheduler that answers, such as tcp://host:8786, "
            "or a client",
            given=f"{scheduler!r} ({error})",
            remedy="start one (`dask scheduler`), or leave it out to run here",
        ) from error
    with client:
        yield client


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """``folder`` for this sweep alone; the system frees it whichever way the process ends."""
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _parts(folder)
        lock.acquire()
    except filelock.Timeout as error:
        raise ResultsError(
            folder,
            "is in use by another sweep",
            remedy="wait until that has ended, or choose another folder",
        ) from error
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(
            folder,
            "is a file" if folder.is_file() else f"cannot be written ({error.strerror})",
            remedy="name a folder that can be written",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _opened(folder: Path | None, table: _Table, record: type) -> Iterator[_Finished]:
    """The finished runs in ``folder``, which is made where there is none."""
    finished = _Finished(table, folder)
    if folder is None:
        yield finished
        return
    with _locked(folder):
        path, parts = folder / MANIFEST, _parts(folder)
        ours = {"version": _origin()[0], "record": table.record, "fields": table.dtypes}
        if path.exists():
            theirs = _manifest(path)
            for name, value in ours.items():
                if theirs[name] != value:
                    raise ResultsError(
                        path,
                        f"is of a sweep with {name} {theirs[name]}, this one has {value}",
                        remedy="choose another folder",
                    )
        elif parts:
            raise ResultsError(
                parts[0], f"lies there without {MANIFEST}", remedy="choose another folder"
            )
        for leftover in folder.glob(f"*{UNFINISHED}"):
            leftover.unlink()
        if not path.exists():
            _write(path, json.dumps({"format": FORMAT} | ours, indent=2).encode())
        finished.load(parts, record)
        yield finished


def _parts(folder: Path) -> list[Path]:
    """The folder's parts; raises `ResultsError` for a file that is none of a sweep's."""
    paths = sorted(folder.iterdir())
    for path in paths:
        name = path.name.removesuffix(UNFINISHED)
        if name not in (MANIFEST, LOCK) and not PART.fullmatch(name):
            raise ResultsError(
                path,
                "is no file of a sweep",
                remedy="move it out of the folder, or choose another folder",
            )
    return [path for path in paths if PART.fullmatch(path.name)]


def _manifest(path: Path) -> dict[str, Any]:
    """What the manifest says; raises `ResultsError` unless it is a whole one of this format."""
    elsewhere = "choose another folder"
    try:
        manifest = json.loads(path.read_bytes())
        written = manifest["format"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ResultsError(
            path, f"is torn or from elsewhere ({error!r})", remedy=elsewhere
        ) from error
    if written != FORMAT:
        raise ResultsError(
            path,
            f"is of format {written}, this version of the package has format {FORMAT}",
            remedy=elsewhere,
        )
    match manifest:
        case {"version": str(), "record": str(), "fields": dict(dtypes)} if DTYPES.issuperset(
            map(str, dtypes.values())
        ):
            return manifest
    raise ResultsError(path, f"is no manifest of a sweep ({manifest})", remedy=elsewhere)


def _write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ResultsError(
            path,
            f"cannot be written ({error.strerror})",
            remedy="what was finished before is kept; make room or give access, then call the "
            "same again, and it resumes",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


@functools.cache
def _origin() -> Origin:
    """Version of the package, and git revision of its code where that is a checkout."""
    try:
        version = metadata.version("lorapower")
    except metadata.PackageNotFoundError:
        version = "not installed"
    here = Path(__file__)
    git = functools.partial(
        subprocess.run, cwd=here.parent, check=True, capture_output=True, text=True
    )
    try:
        # A package that is installed below somebody's checkout is not tracked there.
        git(["git", "ls-files", "--error-unmatch", here.name])
        found = git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.CalledProcessError):
        return version, ""
    return version, found.stdout.strip()
