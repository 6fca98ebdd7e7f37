"""Run settings and make one tidy table; keep the runs of chapters in ``sweeps/NAME.jsonl.gz``.

Settings are `Values`, often with a ``problem`` and a ``method``; a run gives `Results`. Fields of
both, and of values in them, are columns. The ``kind`` of nested values is the column of the field
that holds them: ``method=Trained(ranks=2)`` gives ``method`` ``"trained"`` and ``ranks`` 2. Fields
that the method of a row lacks are missing values. Columns of settings come first, then those of
results, the ``version`` and the git ``revision`` of the package that made the row.

Batches run through joblib: side by side in ``with joblib.parallel_config(n_jobs=2):``.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import joblib
import pandas as pd
from pydantic import ConfigDict
from tqdm import tqdm

from lorapower import book
from lorapower.book.values import Values
from lorapower.errors import InputError, ResultsError
from records import store
from records.store import Row

S = TypeVar("S", bound=Values)
Work = Callable[[list[S]], Sequence["Results"]]
#: The folder of the chapters' records.
SWEEPS = Path(__file__).parent / "sweeps"
#: Where runs that are in no record are kept while the code is the same.
OWN = Path(__file__).parents[1] / "_build" / "runs"


class Results(Values):
    """Hold what a run gives: numbers, truth values, texts; numbers may be NaN or infinite."""

    model_config = ConfigDict(allow_inf_nan=True)


def grid(kind: type[S], /, **values: Any) -> list[S]:
    """Make the settings of the Cartesian product of ``values``, the last keyword varying fastest.

    A list or a range is an axis. Any other value, such as a tuple or a record, is the same for all:
    ``grid(Run, problem=grid(Digits, seed=range(3)), method=Trained(ranks=2))``. Raises
    `InputError` for an empty axis and as ``kind`` does.
    """
    axes = []
    for name, value in values.items():
        axes.append(value if isinstance(value, list | range) else [value])
        if not axes[-1]:
            raise InputError(name, allowed="a value or a list of at least one", value=value)
    return [kind(**dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def run(
    settings: Sequence[S],
    work: Work[S],
    path: Path | str | None = None,
    *,
    size: int = 256,
) -> pd.DataFrame:
    """Run ``work`` on all settings and return a table with a row for each, in their order.

    ``work`` takes a list of at most ``size`` settings, of one ``problem`` if they have the field,
    and returns as many `Results`. What it raises ends the run. Raises `InputError` for no settings
    and for columns of one name.

    With a ``path``, each finished batch is appended to ``PATH.CODE.partial``, and what is there is
    not run again. ``CODE`` digests the notebook's cells so far, or the file of ``work``, the
    packages of this project, and the versions of libraries that compute: other code has another
    file.
    """
    return _tabulate(settings, _run(settings, work, path, size))


def sweep(
    name: str,
    settings: Sequence[S],
    work: Work[S],
    profile: str,
    *,
    protocol: str,
    repeat: int | Sequence[int] = 0,
) -> pd.DataFrame:
    """Give the table of `run` from the record ``sweeps/NAME.jsonl.gz``, and repeat some.

    Where the record lacks one or more of the settings, all are run, and kept in `OWN`, so that a
    cell that is run again goes on where it stopped. In profile
    paper all are run, the record is written, and an interrupted sweep goes on where it stopped, on
    as many processors as a chapter may take, or on the dask cluster at the address in the
    environment's ``DASK_SCHEDULER_ADDRESS``. A line of text says which it was. Raises as `run`
    does, and `ResultsError` if a repeated run differs.

    Parameters
    ----------
    protocol : str
        What was run, in a sentence or two, which is kept and said.
    repeat : int or sequence of int
        The indices of settings that are run once more, each alone and nowhere kept. Their results
        equal the recorded ones but for rounding: numbers to 10⁻⁵, or 10⁻²⁰ absolute. None
        where this machine lacks what the runs were made of. Where the record has other settings
        besides, nothing is repeated.
    """
    file = SWEEPS / f"{name}.jsonl.gz"
    if profile == "paper":
        with _processors():
            rows, end = _run(settings, work, SWEEPS / name), "were made now"
        store.write_record(file, settings, rows, protocol)
    else:
        kept = store.read_record(file, type(settings[0])) if settings else {}
        if any(one not in kept for one in settings):
            print(f"Not all of these runs are in a record: {len(settings)} start now.")
            OWN.mkdir(parents=True, exist_ok=True)
            with _processors():
                return run(settings, work, OWN / name)
        rows = [kept[one] for one in settings]
        others = kept.keys() - settings
        chosen = [repeat] if isinstance(repeat, int) else [*repeat]
        for index in [] if others else chosen:
            _repeat(file, rows[index], settings[index], work)
        if others:
            end = f"{len(others)} others are left out, and nothing was repeated"
        elif chosen:
            are = "is" if len(chosen) == 1 else "are"
            end = f"{len(chosen)} of them, repeated now, {are} equal"
        else:
            end = "none can be repeated here"
        end = f"read from a record; {end}"
    seconds = sum(row.seconds for row in rows)
    took = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    said = f"{protocol} {len(rows)} runs, {took} of a processor, {end}."
    print(textwrap.fill(said, 72))  # no wider than a page
    return _tabulate(settings, rows)


@contextmanager
def _processors() -> Iterator[None]:
    if address := os.environ.get("DASK_SCHEDULER_ADDRESS"):
        from distributed import Client

        with Client(address), joblib.parallel_config("dask"):
            yield
    else:
        with joblib.parallel_config("loky", n_jobs=book.THREADS, inner_max_num_threads=1):
            yield


def _run(
    settings: Sequence[S], work: Work[S], path: Path | str | None, size: int = 256
) -> list[Row]:
    """Run what a partial file does not have yet, and append it there."""
    if not settings:
        raise InputError("settings", allowed="a list of at least one", value=settings)
    partial = Path(f"{path}.{store.digest_code(work)}.partial") if path else None
    rows = store.read_partial(partial, type(settings[0])) if partial else {}
    batches = _batches([one for one in dict.fromkeys(settings) if one not in rows], size)
    parallel = joblib.Parallel(return_as="generator_unordered", pre_dispatch="2 * n_jobs")
    finished = parallel(joblib.delayed(_time)(work, batch) for batch in batches)
    total = len({*settings})
    done = total - sum(map(len, batches))
    with tqdm(total=total, initial=done, unit="run", delay=5) as bar:  # short runs say nothing
        for batch, results, seconds in finished:
            new = dict(zip(batch, _rows(batch, results, seconds / len(batch)), strict=True))
            if partial:
                store.append(partial, new)
            rows |= new
            bar.update(len(batch))
    return [rows[one] for one in settings]


def _batches(settings: Sequence[S], size: int) -> list[list[S]]:
    """Group settings by problem, at most ``size`` at a time."""
    groups = defaultdict(list)
    for one in settings:
        groups[getattr(one, "problem", None)].append(one)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _time(work: Work[S], batch: list[S]) -> tuple[list[S], Any, float]:
    """Run a batch; return it with its results and the seconds of a processor that they took."""
    start = time.process_time()
    return batch, work(batch), time.process_time() - start


def _rows(batch: Sequence[Values], results: Sequence[Results], seconds: float) -> list[Row]:
    """Make the rows of a batch; refuse columns of one name."""
    origin = metadata.version("lorapower"), _revision()
    rows = [Row(one.model_dump(), *origin, float(f"{seconds:.2g}")) for one in results]
    names = _tabulate(batch, rows).columns
    if twice := [*names[names.duplicated()].unique()]:
        raise InputError("columns", allowed="of different names", given=f"two {', '.join(twice)}")
    return rows


def _tabulate(settings: Sequence[Values], rows: Sequence[Row]) -> pd.DataFrame:
    """Make a row of each run, with nested fields in columns of their own."""
    origins = [{"version": row.version, "revision": row.revision} for row in rows]
    parts = [one.model_dump() for one in settings], [row.results for row in rows], origins
    table = pd.concat(map(pd.json_normalize, parts), axis=1)
    # A kind stands in the column of the values that have it.
    names = (str(name).removesuffix(".kind").rpartition(".")[2] for name in table)
    return table.set_axis([*names], axis=1)


@functools.cache
def _revision() -> str:
    """Give the git revision of this project if it is a checkout."""
    root = SWEEPS.parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def _repeat(file: Path, row: Row, setting: S, work: Work[S]) -> None:
    """Run a setting once more; refuse results other than the recorded ones."""
    (again,) = _rows([setting], work([setting]), 0.0)
    for name in row.results | again.results:
        before, now = row.results.get(name), again.results.get(name)
        if not store.equal(before, now):
            remedy = "if the new code is right, make the record again: make book PROFILE=paper"
            message = f"holds {name} = {before} of a run that now gives {now}"
            raise ResultsError(file, message, remedy=remedy)
