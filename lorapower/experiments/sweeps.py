"""Sweeps: settings → runs → one tidy table, kept as it goes, resumable.

Settings are of a subclass of `Record`, often with a ``problem`` and a ``method``, results of one of
`Results`. What a run does is the caller's ``work``.

A table has a row per run: the fields of the setting, the results, and what made them (``version``,
``revision``, ``fingerprint``). Fields of a nested record are columns too; its ``kind`` is the
column of the field that holds it: ``method=Lora(ranks=2)`` gives ``method`` ``"lora"`` and
``ranks`` 2. ``None`` and what a row's method lacks are missing; pandas then makes integers floats.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import _checks
from .._records import Record, Results
from ..errors import InputError, brief
from . import _store
from ._store import Code, Origin, Row

__all__ = ["Record", "Results", "columns", "grid", "read", "run"]

R = TypeVar("R", bound=Record)
Work = Callable[[list[R]], Sequence[Record]]
Done = Generator[tuple[list[R], Sequence[Record], Origin]]


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Records for the Cartesian product of ``values``, the last keyword varying fastest.

    A list, a range or a one-dimensional array is an axis; any other value, such as a tuple or a
    record, is one for all: ``grid(Setting, problem=grid(Problem, seed=range(3)),
    method=Lora(ranks=2))``. Raises `InputError` for an empty axis and as ``record`` does.
    """
    if not _is_record(record):
        raise InputError("record", allowed="a class of records", given=brief(record))
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
        changed; these are kept aside. Code is versions of the libraries that compute, and sources
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
            given=brief(executor),
            remedy="a dask client makes one by get_executor()",
        )
    code = _store.code(work)
    fingerprint = _store.origin(code).fingerprint
    place = None if path is None else _checks.path("path", path)
    with _store.opened(place) as kept:
        rows = kept.rows(fingerprint)
        missing = [setting for setting in settings if keys[setting] not in rows]
        if aside := len({keys[setting] for setting in missing} & kept.settings()):
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
                new = [Row(keys[s], text, *origin) for s, text in zip(batch, texts, strict=True)]
                kept.add(new)
                rows |= {row.setting: row for row in new}
                bar.update(len(batch))
    return _frame(rows[key] for key in keys.values())


def read(path: Path | str) -> pd.DataFrame:
    """The table of the newest run of each setting in ``path``, in the order of finishing.

    Any code may have made them (see ``fingerprint``), and a sweep may be at work. Raises
    `ResultsError` for a file that is damaged or not a sweep's.
    """
    return _frame(_store.newest(_checks.path("path", path)))


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
        raise InputError(name, allowed="a value or a list of at least one", given=brief(value))
    return list(value)


def _keys(settings: Sequence[R]) -> dict[R, str]:
    """What each setting is called in the file; refuses what makes no table."""
    if not isinstance(settings, Sequence) or not settings:
        raise InputError("settings", allowed="a list of at least one", given=brief(settings))
    if len(kinds := {type(setting) for setting in settings}) > 1 or not _is_record(*kinds):
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError("settings", allowed="of one class, made from sweeps.Record", given=given)
    _distinct(type(settings[0]).__name__, [*columns(type(settings[0])), *Origin._fields])
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
        raise InputError("work", allowed=promise, given=brief(results))
    (kind,) = kinds
    _distinct(kind.__name__, [*columns(type(batch[0])), *kind.model_fields, *Origin._fields])
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
    executor: Executor | None, work: Work[R], code: Code, batches: list[list[R]]
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


def _measured(work: Work[R], code: Code, batch: list[R]) -> tuple[Sequence[Record], Origin]:
    # A copy, as nobody promises that `work` leaves the order of its list alone.
    return work([*batch]), _store.origin(code)


def _frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per row, in their order."""
    rows = list(rows)
    parts: list[list[dict[str, Any]]] = [
        [_flat(row.setting) for row in rows],
        [_flat(row.results) for row in rows],
        [{name: getattr(row, name) for name in Origin._fields} for row in rows],
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
