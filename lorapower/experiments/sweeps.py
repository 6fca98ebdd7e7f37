"""Sweeps: settings → runs → one tidy table, kept as it goes, resumable.

Settings are of a subclass of `Record`, results of one of `Results`. A setting may consist of a
``problem`` and a ``method``. What a run does with its setting is the caller's ``work``; nothing
here knows of networks.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from .. import _checks
from .._records import Record, Results
from ..errors import InputError, brief
from . import provenance, store, tables
from .provenance import Code, Origin
from .store import Row

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Record", "Results", "grid", "read", "run"]

R = TypeVar("R", bound=Record)
Work = Callable[[list[R]], Sequence[Record]]
Done = Generator[tuple[list[R], Sequence[Record], Origin]]


def grid(record: type[R], /, **values: Any) -> list[R]:
    """Records for the Cartesian product of ``values``, the last keyword varying fastest.

    A list, a range or a one-dimensional array is an axis; any other value, a tuple or a record
    among them, is one for all. A grid of records is an axis like others:
    ``grid(Setting, problem=grid(Problem, seed=range(3)), method=[Construction(ranks=2)])``. Raises
    `InputError` for an empty axis, and what ``record`` itself raises.
    """
    if not tables.is_record(record):
        raise InputError("record", allowed="a class of records", given=brief(record))
    axes = [_axis(name, value) for name, value in values.items()]
    return [record(**dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def run(
    settings: Sequence[R],
    work: Work[R],
    path: Path | str | None = None,
    *,
    size: int = 256,
    scheduler: str | Client | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per setting, in the order of ``settings``.

    Raises `InputError` for settings, work, sizes or a scheduler that are not usable, workers that
    have other code, and when ``work`` returns something else; `ResultsError` when ``path`` is
    another kind of file, is damaged, is in use by another sweep or cannot be written. What ``work``
    raises ends the sweep. In each case finished batches are kept, and the same call resumes.

    Parameters
    ----------
    settings
        Records of one class and different from one another.
    work : Work
        Takes a list of settings and returns as many records of results, all of one class.
    path : Path or str, optional
        A file that keeps the finished runs, a batch at a time, each of which is there whole or not
        at all. Runs that it holds are not repeated, whatever ended the sweep that made them, unless
        other code made them (`provenance.code`): these are kept aside, which is said in a line. By
        default nothing is kept.
    size : int
        Most settings that go to ``work`` together; they have the same ``problem``, where settings
        have one.
    scheduler : str or Client, optional
        Address of a dask scheduler, or a client, on whose workers the batches run; what a worker
        that dies had not delivered runs again on another. By default they run here.
    progress : bool
        Shows the runs done and the time remaining.
    """
    keys = _keys(settings)
    size = _checks.integer("size", size, 1)
    code = provenance.code(work)
    fingerprint = provenance.origin(code).fingerprint
    record = type(settings[0])
    place = None if path is None else _checks.path("path", path)
    with (
        _client(scheduler) as client,
        store.opened(place, f"{record.__module__}.{record.__qualname__}") as kept,
    ):
        rows = kept.rows(fingerprint)
        missing = [setting for setting in settings if keys[setting] not in rows]
        if aside := len({keys[setting] for setting in missing} & kept.settings()):
            # Not among the results of a notebook's cell.
            about = f"{place}: {aside} runs were made by other code; kept aside, done again"
            tqdm.write(about, file=sys.stderr)
        batches = _batches(missing, size)
        with (
            closing(
                _on(client, work, code, batches) if client else _here(work, code, batches)
            ) as done,
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
                        "scheduler",
                        allowed="one whose workers have this code and these libraries",
                        given=f"version {origin.version}, revision {origin.revision or 'unknown'}",
                    )
                texts = _texts(results, batch)
                new = [Row(keys[s], text, origin) for s, text in zip(batch, texts, strict=True)]
                kept.add(new)
                rows |= {row.setting: row for row in new}
                bar.update(len(batch))
    return tables.frame(rows[key] for key in keys.values())


def read(path: Path | str) -> pd.DataFrame:
    """All settings that have runs in ``path``, each with the newest, in the order of finishing.

    Whichever code made them, which ``fingerprint`` tells apart, and also while a sweep is at work.
    Raises `ResultsError` when it is no file of a sweep, or is damaged.
    """
    return tables.frame(store.newest(_checks.path("path", path)))


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
    """What each setting is called in the file; raises `InputError` for what makes no table."""
    if not isinstance(settings, Sequence) or not settings:
        raise InputError("settings", allowed="a list of at least one", given=brief(settings))
    if len(kinds := {type(setting) for setting in settings}) > 1 or not tables.is_record(*kinds):
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError("settings", allowed="of one class, made from sweeps.Record", given=given)
    tables.distinct(
        type(settings[0]).__name__, [*tables.columns(type(settings[0])), *Origin._fields]
    )
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
    """Results as they are kept; raises `InputError` for what does not fit into one table."""
    promise = f"a function that returns a list of sweeps.Results of one class, here {len(batch)}"
    kinds = {type(one) for one in results} if isinstance(results, Sequence) else set()
    if len(kinds) != 1 or not tables.is_record(*kinds) or len(results) != len(batch):
        raise InputError("work", allowed=promise, given=brief(results))
    (kind,) = kinds
    names = [*kind.model_fields]
    tables.distinct(kind.__name__, [*tables.columns(type(batch[0])), *names, *Origin._fields])
    return [one.model_dump_json() for one in results]


def _batches(settings: Iterable[R], size: int) -> list[list[R]]:
    groups = defaultdict(list)
    for setting in settings:
        groups[getattr(setting, "problem", None)].append(setting)
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _made(work: Work[R], code: Code, batch: list[R]) -> tuple[Sequence[Record], Origin]:
    # A copy, as nobody promises that `work` leaves the order of its list alone.
    return work([*batch]), provenance.origin(code)


def _here(work: Work[R], code: Code, batches: list[list[R]]) -> Done[R]:
    for batch in batches:
        yield batch, *_made(work, code, batch)


def _on(client: Client, work: Work[R], code: Code, batches: list[list[R]]) -> Done[R]:
    from distributed import as_completed

    futures = {client.submit(_made, work, code, batch, pure=False): batch for batch in batches}
    try:
        for future in as_completed(futures, loop=client.loop):
            yield futures[future], *future.result()
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
            given=brief(scheduler),
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
