"""Sweeps: the table is the same however often the sweep was interrupted, and nothing is lost."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapower.errors import InputError, LorapowerError, PrecisionError, ResultsError
from lorapower.experiments import sweeps

SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(),
)
RESULTS = {
    "steps": st.none() | st.integers(-(2**63), 2**63 - 1),
    "loss": st.floats(),
    "accuracy": st.none() | st.floats() | st.integers(0, 100),
    "diverged": st.booleans(),
    "exact": st.none() | st.booleans(),
    "device": st.text(),
    "note": st.none() | st.text(),
    "nothing": st.none(),
}


@dataclass(frozen=True)
class Setting:
    """A run's settings, with one field of each kind."""

    width: int
    ranks: int | tuple[int, ...] = 1
    rate: float = 1e-3
    decay: float | None = None
    limit: int | None = None
    biases: bool = True
    method: str = "lora"
    extra: bool | int | float | str | tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.width < 0:
            raise InputError("width", allowed="at least 0", given=self.width)


@dataclass(frozen=True)
class Other:
    width: int


SETTING = st.builds(
    Setting,
    width=st.integers(0, 2**63 - 1),
    ranks=st.integers(0, 16) | st.lists(st.integers(0, 16)).map(tuple),
    rate=st.floats(allow_nan=False) | st.integers(0, 8),
    decay=st.none() | st.floats(allow_nan=False),
    limit=st.none() | st.integers(-(2**63), 2**63 - 1),
    biases=st.booleans(),
    method=st.text(),
    extra=SCALAR | st.lists(SCALAR).map(tuple),
)
Start = Callable[[Path, Path], tuple[ForkServerProcess, Connection]]
GRID = sweeps.grid(Setting, width=range(6), ranks=[2, (2, 4, 8)], decay=[None, 0.5])


def work(batch: list[Setting]) -> list[dict[str, Any]]:
    """Results that are missing, NaN and of mixed types here and there."""
    return [
        {
            "loss": math.nan if r.width == 3 else r.width / 7,
            "steps": None if r.width == 3 else r.width,
            "score": 1 if r.width < 3 else 0.5,
            "note": f"ünï {r.ranks}",
        }
        for r in batch
    ]


def by_width(record: Setting) -> int:
    return record.width


def quiet(*arguments: Any, **options: Any) -> pd.DataFrame:
    return sweeps.run(*arguments, progress=False, **options)


def logged(batch: list[Setting], log: Path) -> list[dict[str, Any]]:
    """`work` that first notes its records in a file."""
    with log.open("a") as file:
        file.writelines(f"{record}\n" for record in batch)
    return work(batch)


def endless(folder: Path, log: Path, channel: Connection) -> None:
    """A slow sweep, run by run, that stops before its last result until it is killed."""

    def endless_work(batch: list[Setting]) -> list[dict[str, Any]]:
        results = logged(batch, log)
        time.sleep(0.02)
        if GRID[-1] in batch:
            channel.send("at the last")
            signal.pause()
        return results

    channel.send("started")
    quiet(GRID, endless_work, folder, size=1)


def never(batch: list[Setting]) -> list[dict[str, Any]]:
    pytest.fail(f"{batch} runs again")


@pytest.fixture
def table() -> pd.DataFrame:
    """What an uninterrupted sweep in memory gives."""
    return quiet(GRID, work, size=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the finished sweep, in batches of two."""
    quiet(GRID, work, tmp_path / "results", size=2)
    return tmp_path / "results"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `endless` in a process of its own; returns that and what it has to say."""
    # Each is forked from one that has imported already what takes long.
    context = get_context("forkserver")
    context.set_forkserver_preload(["distributed", "hypothesis", "lorapower.experiments.sweeps"])
    started: list[ForkServerProcess] = []

    def start_(folder: Path, log: Path) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=endless, args=(folder, log, theirs))
        started.append(process)
        process.start()
        return process, ours

    yield start_
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


class TestGrid:
    def test_is_the_product_with_the_last_axis_fastest(self) -> None:
        found = sweeps.grid(
            Setting, width=range(2), ranks=(1, 2), rate=np.array([0.5, 0.25]), method="lora"
        )
        assert found == [Setting(width, (1, 2), rate) for width in range(2) for rate in (0.5, 0.25)]
        assert type(found[0].rate) is float

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"widht": 3}, "settings must be among width, ranks, .* (of Setting); got widht"),
            ({}, "settings must be given for width (of Setting); got none for width"),
            ({"width": []}, "width must be a setting or a list of at least one; got []"),
            ({"width": np.ones((2, 2))}, "width must be of one dimension; got shape (2, 2)"),
            ({"width": [1, -1]}, "width must be at least 0; got -1"),
        ],
    )
    def test_refuses(self, values: dict[str, Any], message: str) -> None:
        pattern = re.escape(message).replace(r"\.\*", ".*")
        with pytest.raises(InputError, match=pattern):
            sweeps.grid(Setting, **values)

    def test_refuses_what_is_no_dataclass(self) -> None:
        with pytest.raises(InputError, match="record must be a dataclass; got <class 'int'>"):
            sweeps.grid(int)


class TestTable:
    def test_has_a_row_for_each_record_in_their_order(self, table: pd.DataFrame) -> None:
        assert [*table.columns] == [
            *("width", "ranks", "rate", "decay", "limit", "biases", "method", "extra"),
            *("loss", "steps", "score", "note", "version", "revision"),
        ]
        assert table["width"].tolist() == [record.width for record in GRID]
        assert table["ranks"].tolist() == ["2", "2", "[2, 4, 8]", "[2, 4, 8]"] * 6
        assert table["decay"].isna().tolist() == [True, False] * 12
        assert [str(dtype) for dtype in table.dtypes] == [
            *("int64", "str", "float64", "float64", "Int64", "bool", "str", "str"),
            *("float64", "Int64", "float64", "str", "str", "str"),
        ]
        assert table["loss"].isna().tolist() == [record.width == 3 for record in GRID]
        assert table["version"].nunique() == table["revision"].nunique() == 1

    def test_revision_is_the_checkout_s(self, table: pd.DataFrame) -> None:
        revision = table["revision"][0]
        if not (ROOT / ".git").exists():
            assert revision == ""
            return
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(["git", "diff", "HEAD", "--name-only"], cwd=ROOT)
        assert revision == head + "-dirty" * bool(changed)

    @settings(max_examples=40)
    @given(
        st.lists(st.tuples(SETTING, st.fixed_dictionaries(RESULTS)), min_size=1, max_size=8),
        st.integers(1, 8),
    )
    def test_is_the_same_through_the_folder(
        self, runs: list[tuple[Setting, dict[str, Any]]], size: int
    ) -> None:
        results = dict(runs)
        records = list(results)
        in_memory = quiet(records, lambda batch: [results[r] for r in batch])
        with TemporaryDirectory() as folder:
            written = quiet(records, lambda batch: [results[r] for r in batch], folder, size=size)
            again = quiet(records, never, folder)
            assert len(sweeps.read(folder)) == len(records)
        for found in (written, again):
            pd.testing.assert_frame_equal(found, in_memory, check_exact=True)
        for name in ("width", "rate", "biases", "method"):
            assert in_memory[name].tolist() == [getattr(record, name) for record in records]

    @settings(max_examples=40)
    @given(st.data())
    def test_is_the_same_after_interruptions(self, data: st.DataObject) -> None:
        records = data.draw(st.lists(st.sampled_from(GRID), min_size=1, unique=True))
        options = {
            "size": data.draw(st.integers(1, 5)),
            "batch": data.draw(st.sampled_from([by_width, lambda record: None])),
        }
        expected = quiet(records, work, **options)
        done: list[Setting] = []
        with TemporaryDirectory() as folder:
            for failure in data.draw(st.lists(st.integers(0, 4), max_size=4)):
                countdown = iter(range(failure))

                def interrupted(
                    batch: list[Setting], countdown: Iterator[int] = countdown
                ) -> list[dict[str, Any]]:
                    if next(countdown, None) is None:
                        raise KeyboardInterrupt
                    done.extend(batch)
                    return work(batch)

                try:
                    quiet(records, interrupted, folder, **options)
                except KeyboardInterrupt:
                    assert len(sweeps.read(folder)) == len(done)

            def rest(batch: list[Setting]) -> list[dict[str, Any]]:
                done.extend(batch)
                return work(batch)

            found = quiet(records, rest, folder, **options)
        assert found.equals(expected)
        assert sorted(done, key=repr) == sorted(records, key=repr)

    def test_batches_hold_what_belongs_together(self) -> None:
        seen: list[list[Setting]] = []

        def watched(batch: list[Setting]) -> list[dict[str, Any]]:
            seen.append([*batch])
            batch.reverse()
            return work([*reversed(batch)])

        table = quiet(GRID, watched, batch=by_width, size=3)
        assert [[r.width for r in batch] for batch in seen] == [
            [width] * count for width in range(6) for count in (3, 1)
        ]
        assert table.equals(quiet(GRID, work))

    def test_keeps_and_ignores_what_is_not_asked_for(self, folder: Path) -> None:
        table = quiet(GRID[5:2:-1], never, folder)
        assert table["width"].tolist() == [record.width for record in GRID[5:2:-1]]
        more = Setting(width=100)
        quiet([more], work, folder)
        whole = sweeps.read(folder)
        assert len(whole) == len(GRID) + 1
        assert whole["width"].is_monotonic_increasing

    def test_rows_keep_the_revision_that_made_them(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version, revision = sweeps._origin()
        monkeypatch.setattr(sweeps, "_origin", lambda: (version, "later"))
        table = quiet([*GRID, Setting(width=100)], work, folder)
        assert table["revision"].tolist() == [revision] * len(GRID) + ["later"]

    def test_of_a_new_folder_is_empty(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            quiet(GRID, lambda batch: 1 / 0, tmp_path)
        assert sweeps.read(tmp_path).empty

    def test_progress_counts_runs(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        quiet(GRID, work)
        assert capsys.readouterr() == ("", "")
        sweeps.run([*GRID, Setting(width=100)], work, folder)
        assert re.search(r"25/25 \[.*run/s\]", capsys.readouterr().err)


class TestBadInput:
    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([], "records must be at least one; got none"),
            (Setting(1), "records must be a list, as `grid` makes it; got Setting"),
            ([Setting(1), Other(1)], "records must be of one type; got Other, Setting"),
            ([Setting(1), Setting(2), Setting(1)], "different from one another; got 2 times Set"),
            ([3], "record must be a dataclass; got <class 'int'>"),
            ([Setting(1, decay=math.nan)], "decay must be of type None or float, as .*; got nan"),
            ([Setting(2**63)], "Setting.width must be of type int, as it is declared, .*; got 92"),
            ([Setting(1, ranks=(1, math.nan))], "ranks must be of type int or tuple"),  # type: ignore[arg-type]
            ([Setting(1, rate=2**60 + 1)], "rate must be of type float"),
            ([Setting(1, method=torch.float32)], "method must be of type str.*; got torch.float32"),  # type: ignore[arg-type]
        ],
    )
    def test_records(self, records: list[Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            quiet(records, never)

    @pytest.mark.parametrize(
        ("name", "hint", "message"),
        [
            ("ranks", list[int], "Made.ranks must be declared as int, float, .*; got list"),
            ("version", int, "fields of Made must be other than version and revision"),
        ],
    )
    def test_declarations(self, name: str, hint: Any, message: str) -> None:
        made = make_dataclass("Made", [(name, hint)], frozen=True)
        with pytest.raises(InputError, match=message):
            quiet([made(1)], never)

    @pytest.mark.parametrize(
        ("results", "message"),
        [
            ([{"loss": 1.0}], "work must be a function that returns one mapping for each of its 2"),
            (None, "work must be a function that returns a list of mappings; got None"),
            ([{}, {}], "work must be a function that returns at least one result"),
            ([{"loss": 1.0}, {"los": 1.0}], "the same in all runs: loss; got los"),
            ([{"width": 1.0}] * 2, "names of results must be texts other than width, "),
            ([{"revision": "x"}] * 2, "names of results must be texts other than .*'revision'"),
            ([{3: 1.0}] * 2, "names of results must be texts"),
            ([{"loss": torch.tensor(1.0)}] * 2, "result loss must be a number .*; got tensor"),
            ([{"loss": 2**63}] * 2, "result loss must be a number of at most 64 bits"),
            ([{"loss": 1.0}, {"loss": "x"}], "loss must be of one type in all runs; got float or"),
        ],
    )
    def test_results(self, results: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            quiet(GRID[:2], lambda batch: results, tmp_path)
        assert not parts(tmp_path)

    def test_results_that_differ_from_those_in_the_folder(self, folder: Path) -> None:
        before = sweeps.read(folder)
        with pytest.raises(InputError, match="the same in all runs: loss, steps, score, note"):
            quiet([Setting(width=100)], lambda batch: [{"loss": 1.0}], folder)
        assert sweeps.read(folder).equals(before)

    def test_numpy_s_numbers_are_numbers(self) -> None:
        results = {"loss": np.float32(0.1), "steps": np.int32(3), "ok": np.bool_(True)}
        table = quiet([Setting(np.int64(1))], lambda batch: [results])  # type: ignore[arg-type]
        assert table["loss"].tolist() == [float(np.float32(0.1))]
        assert table[["width", "steps", "ok"]].dtypes.tolist() == ["int64", "int64", "bool"]

    def test_size(self) -> None:
        with pytest.raises(InputError, match="size must be an integer from 1; got 0"):
            quiet(GRID, never, size=0)

    def test_batch(self) -> None:
        with pytest.raises(InputError, match="batch must be a function of a record; got 3"):
            quiet(GRID, never, batch=3)
        with pytest.raises(InputError, match=r"batch must be .* hashable; got \[1\]"):
            quiet(GRID, never, batch=lambda record: [1])

    @pytest.mark.parametrize(
        "error",
        [
            InputError("rank", allowed="small", given=torch.float32, remedy="try"),
            PrecisionError(1, 9.0, limit=6.0, dtype=torch.float32),
            ResultsError(Path("here"), "is torn", remedy="mend it"),
        ],
    )
    def test_errors_survive_the_way_between_processes(self, error: LorapowerError) -> None:
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


class TestFolder:
    def refused(self, folder: Path, message: str, records: list[Any] = GRID) -> ResultsError:
        """The error for a sweep in ``folder``, which loses nothing by it."""
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(ResultsError, match=message) as caught:
            quiet(records, never, folder)
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        return caught.value

    def test_is_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "results"
        path.touch()
        for place, message in ((path, "is a file: name a folder"), (path / "x", "Not a directory")):
            with pytest.raises(ResultsError, match=message) as caught:
                quiet(GRID, never, place)
            assert caught.value.path == place

    @pytest.mark.parametrize("cut", [0, 3, 100, -1])
    def test_torn_part(self, folder: Path, cut: int) -> None:
        part = parts(folder)[4]
        part.write_bytes(part.read_bytes()[:cut])
        assert self.refused(folder, "is torn or from elsewhere .* move it out").path == part
        with pytest.raises(ResultsError, match=part.name):
            sweeps.read(folder)
        part.unlink()
        assert quiet(GRID, work, folder).equals(quiet(GRID, work))

    def test_flipped_bits(self, folder: Path) -> None:
        part = parts(folder)[0]
        content = bytearray(part.read_bytes())
        content[content.index("ünï".encode())] ^= 1
        part.write_bytes(content)
        self.refused(folder, f"{part.name} is torn or from elsewhere")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop(columns="width"), "columns must be width, ranks, .*, results, vers"),
            (lambda t: t.drop(columns="loss"), "names of results must be the same in all runs"),
            (lambda t: t.rename(columns={"loss": "los"}), "names of results must be the same"),
            (lambda t: t.iloc[:0], "columns must be"),
            (lambda t: t.assign(width=0.5), "column width must be int64; got float64"),
            (lambda t: t.assign(width=-1), "width must be at least 0; got -1"),
            (lambda t: t.assign(ranks="[1"), "Expecting"),
            (lambda t: t.assign(ranks='"x"'), "Setting.ranks must be of type int or tuple"),
            (lambda t: t.assign(loss=t["loss"] + 1), "runs must be there once, or with the same"),
            (lambda t: t.assign(loss="x"), "result loss must be of one type in all runs"),
            (lambda t: t.assign(loss=pd.Timestamp(0)), "result loss must be a number"),
        ],
    )
    def test_foreign_part(
        self, folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
    ) -> None:
        path = folder / f"part-{'f' * 16}.parquet"
        change(pd.read_parquet(parts(folder)[0])).to_parquet(path)
        assert self.refused(folder, message).path == path

    def test_the_same_run_twice_with_the_same_results(self, folder: Path) -> None:
        table = sweeps.read(folder)
        table.to_parquet(folder / f"part-{'f' * 16}.parquet")
        assert sweeps.read(folder).equals(table)

    @pytest.mark.parametrize("name", ["notes.txt", "part-1.parquet", "x.unfinished", "sub"])
    def test_foreign_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        error = self.refused(tmp_path, f"{name} is no file of a sweep: move it out of the folder")
        assert error.path == tmp_path / name

    def test_without_manifest(self, folder: Path, tmp_path: Path) -> None:
        (folder / "sweep.json").unlink()
        self.refused(folder, "lies there without sweep.json")
        for place in (folder, tmp_path / "nowhere"):
            with pytest.raises(ResultsError, match=r"has no sweep\.json: name a folder that"):
                sweeps.read(place)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 0}, "is of format 0, this version of the package has format 1"),
            ({"version": "0.0.0"}, "is of a sweep with version 0.0.0, this one has "),
            ({"record": "Old"}, "is of a sweep with record Old, this one has Setting: choose"),
            ({"fields": {"width": "int64"}}, "is of a sweep with fields {'width': 'int64'}, this"),
            ({"fields": ["width"]}, "is no manifest of a sweep"),
        ],
    )
    def test_of_another_kind(self, folder: Path, change: dict[str, Any], message: str) -> None:
        path = folder / "sweep.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert self.refused(folder, re.escape(message)).path == path

    def test_of_another_version_can_be_read(self, folder: Path) -> None:
        table = sweeps.read(folder)
        path = folder / "sweep.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "0.0.0"}))
        assert sweeps.read(folder).equals(table)

    def test_torn_manifest(self, folder: Path) -> None:
        path = folder / "sweep.json"
        path.write_bytes(path.read_bytes()[:20])
        assert self.refused(folder, "is torn or from elsewhere").path == path

    def test_of_other_records(self, folder: Path) -> None:
        self.refused(folder, "with record Setting, this one has Other", [Other(1)])

    def test_loses_what_was_left_unfinished(self, folder: Path) -> None:
        leftover = folder / f"part-{'f' * 16}.parquet.unfinished"
        leftover.write_bytes(b"torn")
        assert quiet(GRID, never, folder).equals(quiet(GRID, work))
        assert not leftover.exists()

    def test_serves_one_sweep_at_a_time(self, tmp_path: Path) -> None:
        def nested(batch: list[Setting]) -> list[dict[str, Any]]:
            quiet(GRID, never, tmp_path)
            raise AssertionError

        with pytest.raises(ResultsError, match="is in use by another sweep: wait until"):
            quiet(GRID, nested, tmp_path)
        assert quiet(GRID, work, tmp_path).equals(quiet(GRID, work))

    def test_file_that_cannot_grow(self, tmp_path: Path, table: pd.DataFrame) -> None:
        quiet(GRID[:4], work, tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(
                ResultsError, match=r"File too large.* is kept; make room"
            ) as caught:
                quiet(GRID, work, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.path.parent == tmp_path
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert quiet(GRID, work, tmp_path).equals(table)

    def test_full_disk(
        self, tmp_path: Path, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ResultsError, match=r"cannot be written \(No space left on device"):
                quiet(GRID, work, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["sweep.lock"]
        assert quiet(GRID, work, tmp_path).equals(table)

    def test_kill_9_at_random_moments(
        self, tmp_path: Path, start: Start, table: pd.DataFrame
    ) -> None:
        results, log = tmp_path / "results", tmp_path / "log"
        finished = 0
        for _ in range(5):
            log.write_text("")
            process, channel = start(results, log)
            assert channel.recv() == "started"
            time.sleep(random.uniform(0, 0.2))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert not {str(record) for record in GRID[:finished]} & {*log.read_text().splitlines()}
            finished = len(parts(results))
            if finished:
                quiet(GRID[:finished], never, results)
        log.write_text("")
        assert quiet(GRID, functools.partial(logged, log=log), results, size=1).equals(table)
        assert log.read_text().splitlines() == [str(record) for record in GRID[finished:]]
        assert len(sweeps.read(results)) == len(GRID)

    def test_two_processes(self, tmp_path: Path, start: Start, table: pd.DataFrame) -> None:
        results = tmp_path / "results"
        process, channel = start(results, tmp_path / "log")
        assert [channel.recv(), channel.recv()] == ["started", "at the last"]
        with pytest.raises(ResultsError, match="is in use by another sweep"):
            quiet(GRID, never, results)
        assert len(sweeps.read(results)) == len(GRID) - 1
        process.kill()
        process.join()
        assert quiet(GRID, work, results).equals(table)


class TestCluster:
    def test_worker_killed_in_the_middle(
        self, cluster: LocalCluster, tmp_path: Path, table: pd.DataFrame
    ) -> None:
        marker = tmp_path / "killed"

        def deadly(batch: list[Setting]) -> list[dict[str, Any]]:
            if batch[0].width == 2 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(batch)

        results = tmp_path / "results"
        found = quiet(GRID, deadly, results, size=2, scheduler=cluster.scheduler_address)
        assert marker.exists()
        assert found.equals(table)
        assert len(sweeps.read(results)) == sum(len(pd.read_parquet(p)) for p in parts(results))

    def test_errors_of_the_work(
        self, cluster: LocalCluster, tmp_path: Path, table: pd.DataFrame
    ) -> None:
        def failing(batch: list[Setting]) -> list[dict[str, Any]]:
            if batch[0].width == 4:
                raise InputError("width", allowed="less than 4", given=4)
            return work(batch)

        with Client(cluster, set_as_default=False) as client:
            with pytest.raises(InputError, match="width must be less than 4; got 4") as caught:
                quiet(GRID, failing, tmp_path, size=2, scheduler=client)
            assert caught.value.given == 4
            assert quiet(GRID, work, tmp_path, size=2, scheduler=client).equals(table)
        with pytest.raises(InputError, match="scheduler must be a client that is connected"):
            quiet(GRID, never, scheduler=client)

    def test_workers_of_another_version(
        self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version, revision = sweeps._origin()
        monkeypatch.setattr(sweeps, "_origin", lambda: ("9", revision))
        with pytest.raises(InputError, match=f"workers have version 9 of the .*; got {version}"):
            quiet(GRID, work, scheduler=cluster.scheduler_address)

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", 3])
    def test_no_scheduler_at_the_address(self, address: Any) -> None:
        message = f"scheduler must be the address of a dask scheduler that answers.*{address!r}"
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
            pytest.raises(InputError, match=message),
        ):
            quiet(GRID, never, scheduler=address)

    def test_distributed_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(InputError, match=r"where dask and distributed are not.*: install"):
            quiet(GRID, never, scheduler="tcp://127.0.0.1:1")
