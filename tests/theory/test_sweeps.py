"""Records and sweeps: the table is the same however often a sweep stopped; nothing is lost."""

from __future__ import annotations

import functools
import importlib
import linecache
import math
import pickle
import resource
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from lorapower import _code
from lorapower._records import Record, Results
from lorapower.errors import InputError, ResultsError
from lorapower.experiments import digits, sweeps, synthetic
from lorapower.experiments.study import measure
from lorapower.experiments.sweeps import grid


class Problem(Record):
    width: int = Field(1, ge=0)
    scale: float = 1.0
    note: str | None = None


class Plain(Record):
    kind: Literal["plain"] = "plain"
    ranks: int | tuple[int, ...] = 1
    biases: bool = True


class Fast(Record):
    kind: Literal["fast"] = "fast"
    rate: float = Field(1e-3, gt=0)


class Setting(Record):
    problem: Problem = Problem()
    method: Annotated[Plain | Fast, Field(discriminator="kind")] = Plain()


class Other(Record):
    width: int

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.require("width", self.width != 5, "other than 5")
        return self


class Found(Results):
    loss: float = math.nan
    steps: int | None = None
    exact: bool = False
    device: str = ""
    shape: tuple[int, ...] = ()


GRID = grid(
    Setting,
    problem=grid(Problem, width=range(6)),
    method=[*grid(Plain, ranks=[2, (2, 4, 8)]), *grid(Fast, rate=[0.5, 0.25])],
)
BITS64 = st.integers(-(2**63), 2**63 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
RANKS = BITS64 | st.lists(BITS64).map(tuple)
SETTING = st.builds(
    Setting,
    problem=st.builds(
        Problem, width=st.integers(0, 2**63 - 1), scale=FINITE, note=st.none() | st.text()
    ),
    method=st.builds(Plain, ranks=RANKS, biases=st.booleans())
    | st.builds(Fast, rate=st.floats(0, exclude_min=True, allow_infinity=False)),
)
FOUND = st.builds(
    Found,
    loss=st.floats(),
    steps=st.none() | BITS64,
    exact=st.booleans(),
    device=st.text(),
    shape=st.lists(BITS64).map(tuple),
)
RUN: list[Setting] = []


def work(batch: list[Setting]) -> list[Found]:
    """Results that are missing or NaN here and there."""
    return [
        Found(
            loss=math.nan if s.problem.width == 3 else s.problem.width / 7,
            steps=None if s.problem.width == 3 else s.problem.width,
            exact=s.problem.width < 2,
            device=f"ünï {s.method.kind}",
        )
        for s in batch
    ]


def never(batch: list[Any]) -> list[Found]:
    pytest.fail(f"{batch} runs again")


def overlapping(batch: list[Any]) -> list[Other]:
    return [Other(width=1) for _ in batch]


def failing(batch: list[Setting]) -> list[Found]:
    if batch[0].problem.width == 4:
        raise InputError("width", allowed="less than 4", given=4)
    return work(batch)


def quiet(*arguments: Any, **options: Any) -> pd.DataFrame:
    return sweeps.run(*arguments, progress=False, **options)


def count(path: Path) -> int:
    """Finished runs in a file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


@pytest.mark.parametrize(
    ("record", "values", "name"),
    [
        (Plain, {"ranks": True}, "ranks"),
        (Plain, {"ranks": [1]}, "ranks"),
        (Plain, {"ranks": "x\n" * 1000}, "ranks"),
        (Fast, {"rate": "1"}, "rate"),
        (Fast, {"rate": np.nan}, "rate"),
        (Fast, {"rat": 1.0}, "names"),
        (Problem, {"width": -1}, "width"),
        (Other, {}, "width"),
        (Other, {"width": 5}, "width"),
        (Setting, {"method": {"kind": "plain", "biases": "x"}}, "biases"),
        (Setting, {"method": {"kind": "third"}}, "method"),
    ],
)
def test_what_a_record_refuses_is_named_in_one_line(
    record: type[Record], values: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"^{name} must be ") as caught:
        record(**values)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_records_are_values_of_python_s_own_types() -> None:
    ranks: Any = (np.int64(1), np.int32(2))
    found: Any = Plain(ranks=ranks, biases=np.bool_(True))  # type: ignore[arg-type]
    assert found == Plain(ranks=(1, 2))
    assert [type(rank) for rank in found.ranks] == [int, int]
    assert found.biases is True
    assert type(Fast(rate=1).rate) is float
    one = Setting(method=found)
    assert len({one, Setting(method=Plain(ranks=(1, 2))), one.replace(method=Fast())}) == 2
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(InputError, match="width must be other than 5"):
        Other(width=4).replace(width=5)
    with pytest.raises(ValueError, match="frozen"):
        one.method = Fast()  # type: ignore[misc]


def test_a_grid_is_the_product_with_the_last_axis_fastest() -> None:
    found = grid(Plain, ranks=range(3, 0, -2), biases=[True, False])
    assert found == [Plain(ranks=r, biases=b) for r in (3, 1) for b in (True, False)]
    assert grid(Plain, ranks=(1, 2)) == [Plain(ranks=(1, 2))]
    assert [s.problem.width for s in GRID] == [width for width in range(6) for _ in range(4)]


def test_a_table_has_columns_for_settings_results_and_origin() -> None:
    table = quiet(GRID, work, size=3)
    settings = ["width", "scale", "note", "method", "ranks", "biases", "rate"]
    results = ["loss", "steps", "exact", "device", "shape"]
    assert [*table.columns] == [*settings, *results, "version", "revision"]
    assert table.ranks.tolist()[:2] == [2, (2, 4, 8)]
    assert table.rate.isna().tolist() == [True, True, False, False] * 6
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        assert {*table.revision} <= {head, f"{head}-dirty"}


@given(st.dictionaries(SETTING, FOUND, min_size=1, max_size=8), st.integers(1, 8))
def test_a_table_is_what_was_given_bit_by_bit(runs: dict[Setting, Found], size: int) -> None:
    cells = [
        dict(s.problem)
        | {"method": s.method.kind}
        | s.method.model_dump(exclude={"kind"})
        | dict(found)
        for s, found in runs.items()
    ]
    wanted = [*runs]

    def given_results(batch: list[Setting]) -> list[Found]:
        return [runs.pop(setting) for setting in batch]

    with TemporaryDirectory() as folder:
        path = Path(folder, "runs")
        table = quiet(wanted, given_results, path, size=size)
        same(quiet(wanted, given_results, path), table)
        assert count(path) == len(wanted)
    # Zero's sign, each bit of a float, and the types of all count, but for what pandas makes of
    # columns in which values are missing.
    for row, wanted_cells in zip(table.astype(object).to_dict("records"), cells, strict=True):
        for name, value in wanted_cells.items():
            if value is not None and table[name].notna().all():
                assert repr(row[name]) == repr(value)


@given(st.data())
def test_a_table_is_the_same_after_interruptions(data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(GRID), min_size=1, unique=True))
    size = data.draw(st.integers(1, 5))
    done: list[Setting] = []
    left = iter(range(0))

    def interrupted(batch: list[Setting]) -> list[Found]:
        # What is done is in the file already, whatever happens to this process.
        assert count(path) == len(done)
        if next(left, None) is None:
            raise KeyboardInterrupt
        done.extend(batch)
        return work(batch)

    with TemporaryDirectory() as folder:
        path = Path(folder, "runs")
        for failure in data.draw(st.lists(st.integers(0, 4), max_size=4)):
            left = iter(range(failure))
            with suppress(KeyboardInterrupt):
                quiet(wanted, interrupted, path, size=size)
        left = iter(range(100))
        same(quiet(wanted, interrupted, path, size=size), quiet(wanted, work, size=size))
    assert sorted(done, key=repr) == sorted(wanted, key=repr)


def test_batches_are_of_one_problem() -> None:
    seen: list[list[int]] = []

    def watched(batch: list[Setting]) -> list[Found]:
        seen.append([s.problem.width for s in batch])
        return work(batch)

    quiet(GRID, watched, size=3)
    assert seen == [[width] * size for width in range(6) for size in (3, 1)]


def test_a_file_keeps_what_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "runs.sqlite"
    quiet(GRID, work, path, size=2)
    table = quiet([*GRID[5:2:-1], GRID[5]], work, path)
    assert table.width.tolist() == [s.problem.width for s in (*GRID[5:2:-1], GRID[5])]
    assert capsys.readouterr() == ("", "")
    assert count(path) == len(GRID)
    sweeps.run([*GRID, Setting(problem=Problem(width=100))], work, path)
    assert "25/25" in capsys.readouterr().err
    assert count(path) == len(GRID) + 1


WORK = "work must be a function that "


@pytest.mark.parametrize(
    ("settings", "function", "complaint"),
    [
        ([], never, "settings must be a list of at least one"),
        (GRID[:1], lambda batch: work(batch), f"{WORK}has a name"),
        (GRID[:1], functools.partial(work), f"{WORK}has a name"),
        (GRID[:1], overlapping, "columns must be of different names; got two width"),
        *(
            (GRID[:2], functools.wraps(work)(lambda batch, out=out: out), WORK)
            for out in (None, [], [Found()] * 3, [{"loss": 1.0}] * 2)
        ),
    ],
)
def test_what_makes_no_table_is_refused(
    settings: Any, function: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        quiet(settings, function, tmp_path / "runs")
    assert not (tmp_path / "runs").exists() or count(tmp_path / "runs") == 0
    with pytest.raises(InputError, match="width must be a value or a list of at least one"):
        grid(Problem, width=[])


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY)")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.write_bytes(b"mine" * 1000), "cannot be used"),
        (lambda path: path.write_bytes(path.read_bytes()[:9000]), "cannot be used"),
        (foreign, "is no file of runs"),
    ],
)
def test_a_file_of_another_kind_or_damaged_is_refused_and_stays(
    make: Callable[[Path], Any], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "runs"
    quiet(GRID, work, path)
    make(path)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=problem) as caught:
        quiet(GRID, work, path)
    assert caught.value.path == path
    assert path.read_bytes() == before


def test_what_was_kept_survives_a_full_disc(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    table = quiet(GRID, work, path)
    more = grid(Setting, method=grid(Plain, ranks=range(100, 600)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(ResultsError, match=r"cannot be used .* make room"):
            quiet(more, work, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(quiet(GRID, work, path), table)
    assert len(quiet(more, work, path)) == len(more)


CODE = {
    "unit/__init__.py": "",
    "unit/made.py": "from lorapower.experiments.sweeps import Results\n"
    "class Found(Results):\n    loss: float\n"
    "def work(batch):\n    from . import used\n"
    "    return [Found(loss=used.ours()) for _ in batch]\n",
    "unit/used.py": '"""Text."""\nSIZE = 1.0\ndef ours():\n    """Text."""\n    return SIZE\n',
    "unit/unused.py": "SIZE = 1.0\n",
}


def forget() -> None:
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "unit"]:
        del sys.modules[name]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package outside of the environment, imported from its source."""
    (tmp_path / "unit").mkdir()
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    forget()


def test_runs_of_other_code_are_done_again(written: Path) -> None:
    path, losses = written / "runs", []
    for size in ("1.0", "2.0", "1.0"):
        (written / "unit/used.py").write_text(CODE["unit/used.py"].replace("1.0", size))
        forget()
        losses.append(quiet(GRID[:4], importlib.import_module("unit.made").work, path).loss[0])
    assert losses == [1.0, 2.0, 1.0]
    # Runs of the first code were kept, and are not done again.
    assert count(path) == 8


@pytest.mark.parametrize(
    ("file", "change", "records", "counts"),
    [
        ("unit/__init__.py", ("", "import unit.unused\n"), "", True),
        ("unit/used.py", ("Text", "Other text"), "", False),
        ("unit/used.py", ("1.0", "(  # of all\n    1.0\n)"), "", False),
        ("unit/unused.py", ("1.0", "2.0"), "", False),
        ("unit/unused.py", ("1.0", "2.0"), "unit.unused", True),
    ],
)
def test_only_code_that_a_run_reaches_counts_loaded_already_or_not(
    file: str, change: tuple[str, str], records: str, counts: bool, written: Path
) -> None:
    given = importlib.import_module("unit.made").work, frozenset({records} - {""})
    fingerprint = functools.partial(sweeps._fingerprint.__wrapped__, *given)
    before = fingerprint()
    importlib.import_module("unit.used")
    assert fingerprint() == before
    (written / file).write_text(CODE[file].replace(*change))
    assert (before != fingerprint()) is counts


def test_runs_of_this_package_follow_its_imports() -> None:
    found = {*_code.reach(["lorapower.experiments.synthetic"], sweeps._places("lorapower"))}
    assert {"lorapower", "lorapower.training.engine", "lorapower._records"} <= found
    assert not {"lorapower.book", "lorapower.checkpoints", "lorapower.experiments.digits"} & found
    kinds = [frozenset({module.__name__}) for module in (synthetic, digits)]
    assert len({sweeps._fingerprint(measure, kind) for kind in kinds}) == 2


def test_work_of_a_notebook_counts_with_the_modules_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A notebook's module has no file; its cells' sources are in the cache of lines."""
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)

    def fingerprint(cell: str) -> str:
        name = f"<cell {cell}>"
        linecache.cache[name] = len(cell), None, cell.splitlines(keepends=True), name
        exec(compile(cell, name, "exec"), vars(notebook))
        return sweeps._fingerprint.__wrapped__(notebook.work)

    head = "from lorapower.experiments import {0}\nfrom lorapower import errors\n"
    code = head + "def work(batch):\n    return {0}.VECTORS, batch\n"
    one = fingerprint(code.format("residual"))
    assert one == fingerprint(code.format("residual") + "    # done\n")
    assert one != fingerprint(code.format("digits"))
    assert one != fingerprint(code.format("residual").replace("batch\n", "batch[:]\n"))


@contextmanager
def dask() -> Iterator[None]:
    one = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with Client(**one), joblib.parallel_config("dask"):
        yield


@pytest.mark.parametrize(
    "side_by_side", [functools.partial(joblib.parallel_config, "threading", n_jobs=2), dask]
)
def test_side_by_side_or_on_a_cluster_the_table_is_the_same(
    side_by_side: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "runs"
    with side_by_side():
        same(quiet(GRID, work, path, size=3), quiet(GRID, work))
        assert count(path) == len(GRID)
        with pytest.raises(InputError, match="width must be less than 4; got 4"):
            quiet(GRID, failing, path, size=2)


SCALE = [1.0]


def scaled(batch: list[Setting]) -> list[Found]:
    RUN.extend(batch)
    return [found.replace(loss=found.loss * SCALE[0]) for found in work(batch)]


def recorded(file: Path, settings: list[Setting] = GRID, **options: Any) -> pd.DataFrame:
    return sweeps.recorded(file, settings, scaled, protocol="All widths.", **options)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of all runs, the only file in its folder."""
    file = tmp_path / "new" / "widths.jsonl.gz"
    same(recorded(file, again=True), quiet(GRID, work))
    RUN.clear()
    return file


def test_of_a_record_some_runs_are_repeated(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    same(recorded(record, repeat=[5, -1]), quiet(GRID, work))
    assert RUN == [GRID[5], GRID[-1]]
    same(recorded(record, repeat=()), quiet(GRID, work))
    # Of a part nothing is repeated, as another run may stand where the page chose one.
    same(recorded(record, GRID[7:2:-2]), quiet(GRID[7:2:-2], work))
    assert len(RUN) == 2
    ends = ["2 of them, repeated now, are equal.", "none can be repeated here."]
    ends.append("21 others are left out, and nothing was repeated.")
    said = " ".join(capsys.readouterr().out.split())
    runs = [
        f"All widths. {n} runs, 0.0 s of a processor, read from a record; " for n in (24, 24, 3)
    ]
    assert said == " ".join(map(str.__add__, runs, ends))
    before = record.read_bytes()
    with pytest.raises(InputError, match="settings must be all recorded ones; got 23 of 24"):
        recorded(record, GRID[1:], again=True)
    assert record.read_bytes() == before
    assert [*record.parent.iterdir()] == [record]


@pytest.mark.parametrize("scale", [1 + 1e-4, math.nan])
def test_a_record_falls_with_the_code_that_made_it(
    scale: float, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SCALE", [1 + 1e-7])
    recorded(record, repeat=5)
    monkeypatch.setattr(f"{__name__}.SCALE", [scale])
    with pytest.raises(ResultsError, match=r"holds loss = 0\.14\d* .* make book PROFILE=paper"):
        recorded(record, repeat=5)


def test_settings_without_a_record_all_run(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [Setting(problem=Problem(width=7)), *GRID]
    path = record.parent / "runs"
    same(recorded(record, more, path=path), quiet(more, work))
    assert len(RUN) == len(more)
    assert count(path) == len(more)
    shown = capsys.readouterr()
    assert shown.out.endswith("Not all of these runs are in a record: 25 start now.\n")
    assert "25/25" in shown.err
