"""Values and runs: tables are the same however often a sweep stopped, and old code gives none."""

from __future__ import annotations

import functools
import math
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext, suppress
from operator import or_
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, create_model, model_validator

from lorapower.errors import InputError, ResultsError
from lorapower.training import Tuning
from records import Results, Values, grid, run, runs, store, sweep, synthetic
from records.methods import Construction, Fitted, Trained


class Problem(Values):
    width: int = Field(1, ge=0)
    scale: float = 1.0
    note: str | None = None


class Plain(Values):
    kind: Literal["plain"] = "plain"
    ranks: int | tuple[int, ...] = 1
    biases: bool = True


class Fast(Values):
    kind: Literal["fast"] = "fast"
    rate: float = Field(1e-3, gt=0)


class Setting(Values):
    problem: Problem = Problem()
    method: Annotated[Plain | Fast, Field(discriminator="kind")] = Plain()


class Other(Values):
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
# Zero's sign, each bit of a number, and what JSON and tables might tell from nothing.
FLOATS = [-0.0, 5e-324, 0.1 + 0.2, 2.0**53, -1e308]
FOUND = [
    Found(loss=-0.0, steps=0),
    Found(loss=5e-324, steps=-(2**63), exact=True, device="NaN"),
    Found(loss=0.1 + 0.2, steps=2**63 - 1, device='1, "ü"\n\u2028'),
    Found(loss=math.inf, steps=1, shape=(1, 2)),
    Found(loss=math.nan, steps=2, device="None", shape=(2**62,)),
]


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


def kept(path: Path) -> Path:
    """The file of the only code that keeps runs."""
    (file,) = path.parent.glob(f"{path.name}.*.partial")
    return file


def count(path: Path) -> int:
    """Finished runs in a file."""
    return len(kept(path).read_text().splitlines())


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
def test_what_values_refuse_is_named_in_one_line(
    record: type[Values], values: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"^{name} must be ") as caught:
        record(**values)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_values_are_of_python_s_own_types() -> None:
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
    table = run(GRID, work, size=3)
    settings = ["width", "scale", "note", "method", "ranks", "biases", "rate"]
    results = ["loss", "steps", "exact", "device", "shape"]
    assert [*table.columns] == [*settings, *results, "version", "revision"]
    assert table.ranks.tolist()[:2] == [2, (2, 4, 8)]
    assert table.rate.isna().tolist() == [True, True, False, False] * 6
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        assert {*table.revision} <= {head, f"{head}-dirty"}


def test_a_table_is_what_was_given_bit_by_bit(tmp_path: Path) -> None:
    settings = grid(Setting, problem=grid(Problem, scale=FLOATS), method=Plain(ranks=(2, 2**62)))

    def given_results(batch: list[Setting]) -> list[Found]:
        return [FOUND[settings.index(setting)] for setting in batch]

    table = run(settings, given_results, tmp_path / "runs", size=2)
    same(run(settings, never, tmp_path / "runs"), table)
    for row, setting, found in zip(table.to_dict("records"), settings, FOUND, strict=True):
        given = {"scale": setting.problem.scale, "ranks": (2, 2**62), **dict(found)}
        assert {name: repr(row[name]) for name in given} == {n: repr(v) for n, v in given.items()}


@given(st.data())
def test_a_table_is_the_same_after_interruptions(data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(GRID), min_size=1, unique=True))
    size = data.draw(st.integers(1, 5))
    cut: Any = st.sampled_from(["", "{", '{"setting": {"pro'])
    done: list[Setting] = []
    left = iter(range(0))

    def interrupted(batch: list[Setting]) -> list[Found]:
        # What is done is in the file already, whatever happens to this process.
        assert not done or count(path) == len(done)
        if next(left, None) is None:
            raise KeyboardInterrupt
        done.extend(batch)
        return work(batch)

    with TemporaryDirectory() as folder:
        path = Path(folder, "runs")
        for failure in data.draw(st.lists(st.integers(0, 4), max_size=4)):
            left = iter(range(failure))
            with suppress(KeyboardInterrupt):
                run(wanted, interrupted, path, size=size)
            if done:
                with kept(path).open("a") as file:  # a crash in the middle of a line
                    file.write(data.draw(cut))
        left = iter(range(100))
        same(run(wanted, interrupted, path, size=size), run(wanted, work, size=size))
    assert sorted(done, key=repr) == sorted(wanted, key=repr)


def test_batches_are_of_one_problem() -> None:
    seen: list[list[int]] = []

    def watched(batch: list[Setting]) -> list[Found]:
        seen.append([s.problem.width for s in batch])
        return work(batch)

    run(GRID, watched, size=3)
    assert seen == [[width] * size for width in range(6) for size in (3, 1)]


def test_a_file_keeps_what_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    run(GRID, work, path, size=2)
    table = run([*GRID[5:2:-1], GRID[5]], never, path)
    assert table.width.tolist() == [s.problem.width for s in (*GRID[5:2:-1], GRID[5])]
    run([*GRID, Setting(problem=Problem(width=100))], work, path)
    assert count(path) == len(GRID) + 1


@pytest.mark.parametrize(
    ("settings", "function", "complaint"),
    [
        ([], never, "settings must be a list of at least one"),
        (GRID[:1], overlapping, "columns must be of different names; got two width"),
    ],
)
def test_what_makes_no_table_is_refused(
    settings: Any, function: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=complaint):
        run(settings, function, tmp_path / "runs")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="zip"):
        run(GRID[:2], lambda batch: [Found()], tmp_path / "runs")
    with pytest.raises(InputError, match="width must be a value or a list of at least one"):
        grid(Problem, width=[])


# A notebook whose function calls another one of its own; it stops after its first batch.
NOTEBOOK = """
import sys
from pathlib import Path
import records
from records import runs
runs.SWEEPS = Path.cwd()
class Number(records.Values):
    problem: int
class Found(records.Results):
    loss: float
def helper(number):
    return {factor} * number
def work(batch):
    assert batch[0].problem <= {last}, "stopped"
    return [Found(loss=helper(one.problem)) for one in batch]
settings = records.grid(Number, problem=[1, 2, 3])
table = records.sweep("numbers", settings, work, "paper", protocol="Numbers.")
print("losses", *table.loss)
"""
KERNEL = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell(sys.stdin.read(), store_history=True)
"""


def losses(folder: Path, factor: int, last: int) -> str:
    """What a fresh kernel prints of the notebook's losses."""
    cells = NOTEBOOK.format(factor=factor, last=last)
    process = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=cells,
        cwd=folder,
        env=os.environ
        | {"IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("stopped" in process.stdout) is (last < 3), process.stdout + process.stderr
    return process.stdout.rpartition("losses")[2].strip()


def test_old_results_of_a_notebook_are_never_new_ones(tmp_path: Path) -> None:
    """Nor when only a function has changed that its function calls, between two kernels."""
    losses(tmp_path, 1, last=1)
    assert count(tmp_path / "numbers") == 1
    assert losses(tmp_path, 100, last=3) == "100.0 200.0 300.0"
    assert [*tmp_path.glob("numbers*")] == [tmp_path / "numbers.jsonl.gz"]


def test_a_sweep_goes_on_with_the_same_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of a program and of this project's packages."""
    module = tmp_path / "a_package_of_the_project" / "__init__.py"
    module.parent.mkdir()
    module.write_text("SIZE = 1\n")
    monkeypatch.setattr(store, "_PACKAGES", (module.parent.name,))
    monkeypatch.syspath_prepend(tmp_path)
    before = store.digest_code(work)
    module.write_text("SIZE = 1\n")
    assert store.digest_code(work) == before != store.digest_code(store.equal)
    module.write_text("SIZE = 2\n")
    assert store.digest_code(work) != before


def test_a_sweep_goes_on_when_its_cell_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or with all before it, unless one of these has changed."""

    def digest(*cells: str) -> str:
        shell = SimpleNamespace(user_ns={"In": ["", *cells]})
        monkeypatch.setattr(store, "get_ipython", lambda: shell)
        return store.digest_code(work)

    first = digest("a", "b", "sweep")
    assert first == digest("a", "b", "sweep", "sweep")
    assert first == digest("a", "b", "sweep", "c", "a", "b", "sweep")
    assert first != digest("a", "b", "sweep", "b changed", "sweep")
    assert first != digest("a", "b changed", "sweep")


def test_runs_that_no_record_has_are_kept_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SWEEPS", tmp_path)
    monkeypatch.setattr(runs, "OWN", tmp_path / "own")
    monkeypatch.setattr(runs, "_processors", nullcontext)
    asked: list[int] = []

    def count(settings: list[Other]) -> list[Found]:
        asked.extend(one.width for one in settings)
        return [Found(loss=float(one.width)) for one in settings]

    for last in (2, 3):
        settings = grid(Other, width=range(last))
        table = sweep("numbers", settings, count, "quick", protocol="Numbers.")
        assert table.loss.tolist() == [*range(last)]
    assert asked == [0, 1, 2]


def test_side_by_side_the_table_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with joblib.parallel_config("threading", n_jobs=2):
        same(run(GRID, work, path, size=3), run(GRID, work))
        assert count(path) == len(GRID)
        with pytest.raises(InputError, match="width must be less than 4; got 4"):
            run(GRID, failing, path=None, size=2)


def test_sweeps_spread_over_the_cluster_of_the_environment(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with Client(**one) as client:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", client.scheduler.address)
        same(swept(profile="paper"), run(GRID, work))


REPEATED: list[Setting] = []
SCALE = [1.0]


def scaled(batch: list[Setting]) -> list[Found]:
    REPEATED.extend(batch)
    return [found.replace(loss=found.loss * SCALE[0]) for found in work(batch)]


def swept(settings: list[Any] = GRID, profile: str = "quick", **options: Any) -> pd.DataFrame:
    return sweep("widths", settings, scaled, profile, protocol="All widths.", **options)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of all runs, the only file in its folder."""
    monkeypatch.setattr(runs, "SWEEPS", tmp_path)
    monkeypatch.setattr(runs, "OWN", tmp_path.with_name("own"))
    monkeypatch.setattr("lorapower.book.THREADS", 1)
    same(swept(profile="paper"), run(GRID, work))
    REPEATED.clear()
    assert [*tmp_path.iterdir()] == [tmp_path / "widths.jsonl.gz"]
    return tmp_path / "widths.jsonl.gz"


def test_of_a_record_some_runs_are_repeated(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    same(swept(repeat=[5, -1]), run(GRID, work))
    assert REPEATED == [GRID[5], GRID[-1]]
    same(swept(repeat=()), run(GRID, work))
    # Of a part nothing is repeated, as another run may stand where the page chose one.
    same(swept(GRID[7:2:-2]), run(GRID[7:2:-2], work))
    assert len(REPEATED) == 2
    ends = ["2 of them, repeated now, are equal.", "none can be repeated here."]
    ends.append("21 others are left out, and nothing was repeated.")
    printed = " ".join(capsys.readouterr().out.split())
    begins = [
        f"All widths. {n} runs, 0.0 s of a processor, read from a record; " for n in (24, 24, 3)
    ]
    assert printed == " ".join(map(str.__add__, begins, ends))


@pytest.mark.parametrize("scale", [1 + 1e-4, math.nan])
def test_a_record_falls_with_the_code_that_made_it(
    scale: float, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SCALE", [1 + 1e-7])
    swept(repeat=5)
    monkeypatch.setattr(f"{__name__}.SCALE", [scale])
    with pytest.raises(ResultsError, match=r"holds loss = 0\.14\d* .* make book PROFILE=paper"):
        swept(repeat=5)


def test_settings_without_a_record_all_run(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [Setting(problem=Problem(width=7)), *GRID]
    before = record.read_bytes()
    same(swept(more), run(more, work))
    assert len(REPEATED) == len(more)
    assert [*record.parent.iterdir()] == [record]
    assert record.read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.endswith("Not all of these runs are in a record: 25 start now.\n")


def recorded_as(record: Path, problem: Any, *methods: Any) -> dict[Any, store.Row]:
    """Read a record as settings of other kinds of problem and method."""
    fields: Any = {"problem": (problem, ...), "method": (functools.reduce(or_, methods), ...)}
    return store.read_record(record, create_model("Setting", __base__=Values, **fields))


def with_field(kind: type[Any]) -> type[Any]:
    """The same kind of values with one more field, which has a default."""
    return create_model(kind.__name__, __base__=kind, added=(int, 0))


def test_a_record_is_found_by_what_differs_from_defaults(record: Path) -> None:
    before = store.read_record(record, Setting)
    assert [*before] == GRID
    problem, plain, fast = map(with_field, (Problem, Plain, Fast))
    newer = recorded_as(record, problem, plain, fast)
    assert [*newer.values()] == [*before.values()]
    first = next(iter(newer))
    assert (first.problem, first.method) == (problem(width=0), plain(ranks=2))
    assert first.replace(method=plain(ranks=2, added=2)) not in newer
    # A default that has changed changes no run.
    changed = create_model("Plain", __base__=Plain, biases=(bool, False))
    first = next(iter(recorded_as(record, Problem, changed, Fast)))
    assert first.method == changed(ranks=2, biases=True) != changed(ranks=2)
    # What cannot be read as such settings is none of them.
    assert all(isinstance(key, str) for key in store.read_record(record, synthetic.Run))


class NewTrained(Trained):
    """Training as it may once be."""

    optimizer: Literal["adam"] = "adam"

    def tuning(self) -> Tuning:
        return Trained(**self.model_dump(exclude={"optimizer"})).tuning()


@pytest.mark.parametrize("name", ["fitted", "stall", "training-linear", "training-stall"])
def test_a_new_field_with_a_default_loses_no_recorded_run(name: str) -> None:
    file, problem = runs.SWEEPS / f"{name}.jsonl.gz", with_field(synthetic.Synthetic)
    recorded = store.read_record(file, synthetic.Run)
    newer = recorded_as(file, problem, Construction, Fitted, NewTrained)
    assert [*newer.values()] == [*recorded.values()]
    for old, new in zip(recorded, newer, strict=True):
        assert isinstance(old, synthetic.Run)
        assert new.problem == problem(**dict(old.problem))
        assert new.method.model_dump(exclude={"optimizer"}) == old.method.model_dump()
